"""Remarks on a study in sentences: what was compared, what the results are, how the study differs from what is written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from bpfree.program_run import BLANK
from bpfree.study.cells import Plan
from bpfree.study.controls import compare, comparisons
from bpfree.study.older import older_cells
from bpfree.study.report.view import WAITED, View, compact, splits_of, untimed
from bpfree.study.rows import TableRow, listed, unused
from bpfree.study.store import CellRecord

__all__ = [
    "budget_text",
    "compared",
    "counted_noun",
    "data_text",
    "environments",
    "failures",
    "findings",
    "remarks",
    "selected_text",
    "software",
    "without_shorter",
]

PHRASES = {
    "row better": "better",
    "not distinguishable": "not distinguishable",
    "control better": "worse",
    "one seed only": "not known from one seed",
    "error not known": "not known from equal seeds",
}
ALL = {
    "row better": "All {} other rows are better than",
    "not distinguishable": "None of the {} other rows can be distinguished from",
    "control better": "All {} other rows are worse than",
    "one seed only": "With one seed, the {} other rows cannot be distinguished from",
    "error not known": "With equal seeds alone, the {} other rows cannot be distinguished from",
}
ENVIRONMENT = ("device_name", "threads", "torch", "python", "bpfree")


# --- what was compared --------------------------------------------------------------------------------------------------


def compared(view: View) -> str:
    """Describe rules, tasks, seeds, budget, tuning and selection in a paragraph."""
    plan, rows = view.plan, view.rows
    recipes = [row.cells[0].recipe for row in rows]
    rules = _distinct(recipe.trains for recipe in recipes if not recipe.is_program)
    programs = _distinct(recipe.trains for recipe in recipes if recipe.is_program)
    tasks = without_shorter(map(data_text, rows))
    count = len({row.written.label for row in rows})
    seeds = "one seed" if len(plan.seeds) == 1 else f"{len(plan.seeds)} seeds each"
    trainers = [
        f"the {kind if len(names) == 1 else f'{kind}s'} {listed(names)}"
        for kind, names in (("rule", rules), ("program", programs))
        if names
    ]
    what = f"{counted_noun(count, 'row')} with {listed(trainers)} on {listed(tasks)}"
    columns = f" in {len(view.columns)} columns" if len(view.columns) > 1 else ""
    budgets = _distinct(budget_text(row) for row in rows if not row.cells[0].recipe.is_program)
    parts = [f"{what[0].upper()}{what[1:]}{columns}, {seeds} ({', '.join(map(str, plan.seeds))})."]
    if budgets:
        parts.append(
            f"Training budget: {listed(budgets)}."
            if len(budgets) < 4
            else f"Training budgets differ between rows; the first is {budgets[0]}."
        )
    tuned = [row.tuned for row in rows if row.tuned is not None and row.tuned.keys]
    if tuned:
        keys, trials = _distinct(key for one in tuned for key in one.keys), _distinct(str(one.planned) for one in tuned)
        parts.append(f"Tuned on the validation split, with {listed(trials)} trials for each row and column: {listed(keys)}.")
    again = sum(record.tags.get("test_evaluations", "1") != "1" for row in rows for record in row.finished)
    parts.append(
        f"The test split was evaluated more than once in {counted_noun(again, 'run')}."
        if again
        else "The test split is evaluated once per run, after every choice was made."
    )
    return " ".join(parts)


def budget_text(row: TableRow) -> str:
    """Describe the training budget of a row."""
    patience = row.cells[0].recipe.settings.budget.patience
    return _limit(row) if patience is None else f"{_limit(row)}, or until validation is no better for {counted_noun(patience, 'epoch')}"


def _limit(row: TableRow) -> str:
    budget = row.cells[0].recipe.settings.budget
    if budget.samples is not None:
        return f"{budget.samples:,} examples drawn"
    if budget.forwards is not None:
        return f"{compact(budget.forwards)} forward-pass equivalents"
    if budget.operations is not None:
        return f"{compact(budget.operations)} operations"
    if budget.seconds is not None:
        return f"{budget.seconds:g} seconds"
    return counted_noun(10 if budget.epochs is None else budget.epochs, "epoch")


def counted_noun(number: int, noun: str) -> str:
    """Write a number with its noun, such as ``3 cells``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def data_text(row: TableRow) -> str:
    """Describe the data of a row: ``digits (1,295 train, 143 validation, 359 test examples)``."""
    counts = ", ".join(f"{count:,} {name}" for name, count in splits_of(row).items())
    name = row.cells[0].recipe.names["task"]
    return f"{name} ({counts} examples)" if counts else name


def without_shorter(texts: Iterable[str]) -> list[str]:
    """Leave out texts with which a longer one begins: data of rows that have not finished have no counts."""
    known = list(dict.fromkeys(texts))
    return [text for text in known if not any(other.startswith(f"{text} (") for other in known)]


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


# --- what came out ------------------------------------------------------------------------------------------------------


def findings(view: View) -> Iterator[str]:
    """Describe the best mean of each column, and whether it can be distinguished from the second best; then the rows beside controls."""
    for column in view.columns:
        rows = [row for row in view.ranked(column) if (mean := view.mean(row)) is not None and math.isfinite(mean)]
        if len(rows) > 1:
            yield (f"{column}: " if len(view.columns) > 1 else "") + _first_two(view, rows[0], rows[1])
    for control in view.plan.study.controls:
        yield from _over_control(view, control)


def _first_two(view: View, best: TableRow, second: TableRow) -> str:
    measure = view.measure
    a, b = (f"{measure.text(view.mean(row) or 0.0)}{measure.unit}" for row in (best, second))
    extreme = "highest" if view.greater else "lowest"
    text = f"{best.written.label} has the {extreme} mean {measure.name}, {a}; {second.written.label} is second with {b}"
    found = compare(view.plan, best, second, measure)
    if found is None:
        return f"{text}. They share no seed, so that the difference cannot be judged."
    if found.standard_error is None and len(found.gains) > 2:
        return f"{text}. All seeds that they share differ by as much, which does not tell the error of the difference."
    if len(found.gains) < 3:
        return f"{text}. They share {counted_noun(len(found.gains), 'seed')}, too few to judge the difference."
    said = f"{measure.text(abs(found.gain))} +- {measure.text(found.standard_error or 0.0)}"
    if found.verdict == "not distinguishable":
        return f"{text}. The two cannot be distinguished: the difference over {len(found.gains)} shared seeds is {said} (standard error)."
    if found.gain > 0:
        return f"{text}. The difference over {len(found.gains)} shared seeds is {said} (standard error)."
    return f"{text}; but over the {len(found.gains)} seeds that both have, {second.written.label} is better."


def _over_control(view: View, control: str) -> Iterator[str]:
    texts: dict[str, list[str]] = {}
    verdicts = _verdicts(view, control)
    kinds = {verdict for by_column in verdicts.values() for verdict in by_column.values()}
    if len(kinds) == 1 and len(verdicts) > 2:
        everywhere = " in every column" if len(view.columns) > 1 else ""
        yield f"{ALL[kinds.pop()].format(len(verdicts))} the control {control}{everywhere}."
        return
    for label, by_column in verdicts.items():
        for verdict in dict.fromkeys(by_column.values()):
            columns = [column for column in by_column if by_column[column] == verdict]
            whole = len(columns) == len(by_column)
            texts.setdefault(verdict, []).append(label if whole else f"{label} [{', '.join(columns)}]")
    told = [f"{PHRASES[verdict]}: {listed(texts[verdict])}" for verdict in PHRASES if verdict in texts]
    if told:
        yield f"Against the control {control}: {'; '.join(told)}."


def _verdicts(view: View, control: str) -> dict[str, dict[str, str]]:
    """Judge each row against a control, by row and column, if both have a result."""
    found: dict[str, dict[str, str]] = {}
    for each in comparisons(view.plan, view.rows):
        if each.control == control:
            found.setdefault(each.row, {})[each.column] = each.verdict
    return found


# --- what must be known -------------------------------------------------------------------------------------------------


def remarks(plan: Plan, rows: Sequence[TableRow], *, hidden: int = 0) -> Iterator[str]:
    """State how this differs from the study as written, its progress, the selection of weights, and whether data differ."""
    if plan.changes:
        word = "shortened: this is not" if plan.shortened else "changed: this is not"
        yield f"The study was {word} the study as written. {'; '.join(plan.changes)}."
    finished, cells = sum(len(row.finished) for row in rows), sum(len(row.cells) for row in rows)
    if finished < cells:
        yield f"{finished} of {cells} cells are finished" + (", without counting trials of tuning." if plan.study.tune else ".")
    for version, count in older_cells(rows).items():
        again = "`bpfree study run` would compute them again"
        yield f"{counted_noun(count, 'cell')} measured by bpfree {version} from other sources than those installed here; {again}."
    yield from unused(rows)
    yield from _selection(rows)
    yield from _patience(rows)
    yield from _programs(rows)
    if any(row.cells[0].recipe.settings.quick for row in rows):
        yield "This is a smoke run (quick) with a few batches of each split; its numbers are meaningless."
    if plan.study.publishes("train"):
        yield "Training split: all its examples, scored by the weights that were tested."
    edges = [row.label for row in rows if row.tuned is not None and row.tuned.complete and row.tuned.at_edge]
    if edges:
        yield f"The best value lies at the edge of what was tried, so that better values may lie beyond it: {', '.join(edges)}."
    yield from _data(rows)
    if untimed(rows):
        by_clock = any(row.cells[0].recipe.settings.budget.seconds is not None and untimed([row]) for row in rows)
        what = "cannot be compared, nor can results of runs with a time budget" if by_clock else "cannot be compared"
        cells = sum(not record.comparable for row in rows for record in row.finished)
        yield f"* The seconds of {counted_noun(cells, 'cell')} {what}: {WAITED}. Use --jobs 1 on an idle machine for comparable timings."
    if hidden:
        yield f"Not shown: {hidden} finished cells of other settings, seeds, versions or sources."


def _selection(rows: Sequence[TableRow]) -> Iterable[str]:
    """State the share of examples for training, and how the tested weights were selected."""
    told: dict[str, list[str]] = {}
    for row in rows:
        if not row.cells[0].recipe.is_program:  # a program selects its weights itself
            told.setdefault(selected_text(row), []).append(row.label)
    for text, labels in told.items():
        yield f"{text}." if len(told) == 1 else f"{', '.join(labels)}: {text[0].lower()}{text[1:]}."


def selected_text(row: TableRow) -> str:
    """State how the tested weights of a row were selected."""
    recipe = row.cells[0].recipe
    validation, select = recipe.task.validation, recipe.settings.select
    if not validation:
        return "Trained on the whole training set; the last weights are tested, without selection"
    chosen = "the weights with the best validation score are tested" if select == "best-val" else "the last weights are tested"
    return f"{100 * validation:g} % of the training examples are held out for validation; {chosen}"


def _programs(rows: Sequence[TableRow]) -> Iterator[str]:
    """Name the rows that are other trainers, and explain why some of their numbers are missing."""
    told = [row.label for row in rows if row.cells[0].recipe.is_program]
    if told:
        yield f"{listed(told)}: {'another trainer' if len(told) == 1 else 'other trainers'}, without a bpfree budget; {BLANK}."


def _patience(rows: Sequence[TableRow]) -> Iterator[str]:
    """State the number of cells that ended early because validation no longer improved."""
    told = [ended for row in rows for record in row.finished if (ended := record.result.get("train/out_of_patience")) is not None]
    if told:
        yield f"budget.patience ended {sum(map(bool, told))} of {counted_noun(len(told), 'cell')} before their budget was used."


def _data(rows: Sequence[TableRow]) -> Iterable[str]:
    """Report finished cells on one task whose data have different fingerprints."""
    seen: dict[str, set[str]] = {}
    for row in rows:
        recipe = row.cells[0].recipe
        key = str((recipe.names["task"], recipe.options["task"], recipe.task.validation, recipe.task.split_seed, recipe.task.subset))
        seen.setdefault(key, set()).update(record.tags["data_fingerprint"] for record in row.finished if "data_fingerprint" in record.tags)
    if any(len(fingerprints) > 1 for fingerprints in seen.values()):
        yield "Not all cells of one task saw the same data: their fingerprints differ."


def failures(rows: Sequence[TableRow]) -> Iterator[tuple[TableRow, CellRecord]]:
    """List row and record of each cell that ended without a result, or with a part of it missing; twins are separate rows."""
    for row in rows:
        for each in filter(None, (row, row.twin)):
            for record in filter(None, each.records):
                own = (
                    record.status == "finished" and record.reason == record.seen().reason
                )  # such as the remark that patience ended the run
                if (record.reason and not own) or record.status in ("diverged", "failed", "timeout", "refused"):
                    yield each, record


def environments(rows: Sequence[TableRow]) -> dict[str, int]:
    """Count the finished cells of each environment."""
    tags: list[Mapping[str, str]] = [record.tags for row in rows for record in row.finished]
    counts: dict[str, int] = {}
    for place in tags:
        text = ", ".join(f"{key.removeprefix('device_name')} {place[key]}".strip() for key in ENVIRONMENT if place.get(key))
        if text:
            counts[text] = counts.get(text, 0) + 1
    return counts


def software(rows: Sequence[TableRow]) -> str:
    """List the versions of bpfree, torch and Python of the finished cells."""
    parts = []
    for name, key in (("bpfree", "bpfree"), ("PyTorch", "torch"), ("Python", "python")):
        versions = sorted({record.tags[key] for row in rows for record in row.finished if record.tags.get(key)})
        parts += [f"{name} {' and '.join(versions)}"] if versions else []
    return ", ".join(parts)
