"""Leaderboards: the scores of each column with intervals, and their costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from bpfree.document.content import Folded, Part, Picture, Section, Table, Text
from bpfree.document.strips import Strip, shared_axis, strip, strip_axis
from bpfree.metric import LOSS
from bpfree.study.measures import Measure
from bpfree.study.model import MEMORY
from bpfree.study.report.view import WAITED, View, aligned, compact, counted, mean_of, spread, untimed, values_of
from bpfree.study.rows import TableRow, listed
from bpfree.study.statistics import FEW
from bpfree.study.store import CellRecord
from bpfree.tasks.protocols import result_key

__all__ = ["best_alternative", "leaderboards"]

SPAN = "reverse-mode span"
WORDS = ("row", "over draws", "best other prediction", "network", SPAN, "tuned")
SPANS = {"0": "none", "1": "inside a block", "all": "end to end"}
ABOVE = " (uses weights of blocks above)"

COSTS = (
    ("seconds", "of training, with what a rule prepares and solves; without evaluation"),
    ("processor seconds", "of all threads in training"),
    ("memory, MiB", "tensors at the peak of a step, without the data set"),
    ("passes", "forward-pass equivalents of one example, in all of training; per example: over the examples drawn"),
    ("operations", "floating-point operations of matrix products and convolutions, in all of training"),
    ("probe operations", "those of the converged probe of the features, which are not part of training"),
    ("trained", "parameters that training changes"),
    (SPAN, "how far one reverse-mode call (backward pass) reaches: inside a block, over some blocks, or end to end"),
    ("lines of code", "of the rule's class and those it inherits from, without the framework's"),
    ("tuned", "number of settings that were tuned, and the trials"),
)
"""Columns of the tables of costs and of rules, and what they mean."""


def leaderboards(view: View) -> Iterator[Section]:
    """Make a section for all columns, with one below it for each column if the study has several."""
    legend: list[Part] = [Text(_legend(view), "note")]
    meanings = Folded("What the columns of costs and rules mean", [Table(["column", "meaning"], _meanings(view), [1], "Columns")])
    above = any(_credit(row).endswith(ABOVE) for row in view.rows)
    said = f"{SPAN[0].upper()}{SPAN[1:]}: how far one backward pass (reverse-mode call) reaches. "
    said += (
        "Uses weights of blocks above: the update of a block reads weights of later blocks, which a local rule does not." if above else ""
    )
    spans = [Text(said.strip(), "note")] if any(map(_credit, view.rows)) else []
    notes = [Folded("How to read these tables", legend)] if len(view.columns) > 1 else legend
    return view.by_column("Results" if view.labelled else "Leaderboard", lambda column: _of_column(view, column), *notes, *spans, meanings)


def _meanings(view: View) -> list[list[str]]:
    shown = {str(header) for row in view.columns for table in _costs(view, row, view.ranked(row)) for header in table.headers}
    return [[name, meaning] for name, meaning in COSTS if name in shown]


def _of_column(view: View, column: str) -> list[Part]:
    rows = view.ranked(column)
    parts: list[Part] = [_scores(view, column, rows)]
    if any(row.finished for row in rows):
        note = f"* Not comparable for at least one cell: {WAITED}. Use --jobs 1 on an idle machine for comparable timings."
        for table in _costs(view, column, rows):
            parts += [table, *([Text(note, "note")] if "seconds" in table.headers and untimed(rows) else [])]
    return parts


def _legend(view: View) -> str:
    kind = "bootstrap (percentile)" if all(len(view.scores(row)) >= FEW for row in view.rows if row.finished) else "Student's t"
    mixed = kind != "bootstrap (percentile)" and any(len(view.scores(row)) >= FEW for row in view.rows)
    how = "Student's t below ten seeds, bootstrap from ten on" if mixed else kind
    if any(view.over_examples(row) for row in view.rows):
        how = "Student's t, over seeds and over new examples of the test split's kind"
    parts = [
        f"Sorted by the mean {view.measure.name} over seeds, best first. 95 % interval of the mean: {how}; none from one "
        "seed. In the strip: a dot for each seed, a bar for the interval, a stroke for the mean; a triangle at the edge stands for runs "
        "beyond the axis.",
    ]
    if view.plan.study.publishes("test"):
        parts.append("The diamond is the published number; difference: our mean minus it.")
    if any(best_alternative(row) for row in view.rows):
        parts.append(
            "Best other prediction: of a single block, the mean of blocks, another inference; chosen by the primary metric on "
            "validation after the last epoch."
        )
    if any(_draws(row) for row in view.rows):
        parts.append(
            "Over draws: for stochastic predictors, mean and standard error over all seeds and inference draws, as papers report it; "
            "draws of one seed share their weights, so that this error is smaller than one over seeds."
        )
    parts += _of_test_split(view)
    return " ".join(parts)


def _of_test_split(view: View) -> Iterator[str]:
    """State the error that the size of the test split causes, however equal seeds are."""
    best = next((row for column in view.columns for row in view.ranked(column) if view.binomial(row) is not None), None)
    if best is not None:
        (variance, count), mean = view.binomial(best) or (0.0, 0), view.mean(best) or 0.0
        of = f" of {best.column}" if best.column else ""
        yield (
            f"However equal the seeds are, {view.measure.text(mean)} % on the {count:,} test examples{of} have a binomial standard error "
            f"of {math.sqrt(variance):.2f} points."
        )
    scores = {id(row): view.scores(row) for row in view.rows}
    if any(len(each) > 1 and len(set(each)) == 1 for each in scores.values()):
        equal = [row.label for row in view.rows if len(scores[id(row)]) > 1 and len(set(scores[id(row)])) == 1]
        unknown = any(view.interval(row) is None for row in view.rows if row.label in equal)
        told = (
            "no interval is shown, since the error over new examples is not known" if unknown else "the interval is that over new examples"
        )
        yield f"All seeds have the same score in {listed(equal)}: {told}."


# --- scores -------------------------------------------------------------------------------------------------------------


def _scores(view: View, column: str, rows: Sequence[TableRow]) -> Table:
    strips = {row.written.label: _strip(view, row) for row in rows if view.scores(row)}
    axis = shared_axis(list(strips.values()), greater=view.greater)
    publishes = any(row.published(view.measure.key) for row in rows)
    others, draws = any(map(best_alternative, rows)), any(map(_draws, rows))
    headers: list[str | Picture] = ["row", "rank", view.measure.label, "95 % interval"]
    headers += [Picture(strip_axis(axis))] if strips else []
    further = _further(view, rows)
    headers += [measure.label for measure in further]
    headers += ["n", *(["published", "difference"] if publishes else [])]
    headers += [*(["over draws"] if draws else []), *(["best other prediction"] if others else [])]
    texts: list[list[str | Picture]] = []
    for place, row in enumerate(rows, start=1):
        mean = view.mean(row)
        ranked = mean is not None and math.isfinite(mean)
        known = view.interval(row)
        cells: list[str | Picture] = [view.label(row), f"{place}" if ranked else ""]
        cells.append(view.measure.text(mean) if mean is not None else "" if row.finished else row.status_text())
        cells.append(f"{view.measure.text(known.low)} to {view.measure.text(known.high)}" if known else "")
        if strips:
            cells.append(Picture(strip(strips[row.written.label], axis)) if row.written.label in strips else "")
        cells += [_mean_text(row, measure) for measure in further]
        cells.append(counted(row))
        cells += _published(view, row) if publishes else []
        cells += [_draws(row)] if draws else []
        cells += [best_alternative(row)] if others else []
        texts.append(cells)
    words = [place for place, header in enumerate(headers) if isinstance(header, Picture) or header in WORDS]
    return Table(headers, texts, words, f"Leaderboard {column}".strip(), [view.style(row) for row in rows])


def _further(view: View, rows: Sequence[TableRow]) -> list[Measure]:
    """List the other metrics of the task and ``evaluation.metrics`` that were measured, without the loss."""
    metrics = {name: metric for row in rows for name, metric in row.metrics.items()}
    found = (Measure("test", metric, name) for name, metric in metrics.items() if name not in (view.measure.measured, LOSS.name))
    return [measure for measure in found if any(row.by_seed(measure) for row in rows)]


def _mean_text(row: TableRow, measure: Measure) -> str:
    values = list(row.by_seed(measure).values())
    return measure.text(statistics.fmean(values)) if values else ""


def _strip(view: View, row: TableRow) -> Strip:
    by_seed, published = row.by_seed(view.measure), row.published(view.measure.key)
    values = list(by_seed.values())
    single = ", ".join(f"seed {seed}: {view.measure.text(value)}" for seed, value in by_seed.items())
    said = f"{row.written.label}: mean {view.measure.text(statistics.fmean(values))}; {single}"
    said += f"; published {view.measure.text(published.mean)}" if published else ""
    return Strip(view.key(row), values, view.interval(row), published.mean if published else None, said)


def _published(view: View, row: TableRow) -> list[str]:
    theirs, mean = row.published(view.measure.key), view.mean(row)
    if theirs is None:
        return ["", ""]
    difference = "" if mean is None else view.measure.signed(mean - theirs.mean)
    return [spread(theirs.mean, theirs.spread, view.measure), difference]


def _draws(row: TableRow) -> str:
    """Format the primary metric over all seeds and inference draws with its standard error; blank without several draws."""
    measure = Measure("test", row.primary, row.primary.name)
    found = [
        [measure.shown(value) for key, value in record.result.items() if key.removeprefix(f"{measure.key}_draw_").isdigit()]
        for record in row.finished
    ]
    values = [value for draws in found for value in draws]
    if not any(len(draws) > 1 for draws in found) or not all(map(math.isfinite, values)):
        return ""
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{_word(measure)} {spread(statistics.fmean(values), error, measure)} ({len(values)} draws)"


def _word(measure: Measure) -> str:
    return measure.metric.name.replace("_", " ")


def best_alternative(row: TableRow) -> str:
    """Describe the best other prediction of a row, such as a single block's, chosen on validation; protocols do not count."""
    measure = Measure("test", row.primary, row.primary.name)
    protocols = {result_key(name) for name in row.cells[0].recipe.settings.evaluation.protocols}
    keys = {key: None for record in row.finished for key in record.result}
    names = [parts[1] for key in keys if len(parts := key.split("/")) == 3 and parts[0] == "test" and parts[2] == measure.measured]
    names = [name for name in names if name not in protocols]
    scored = {
        name: [score for record in row.finished if (score := _last(record, f"val/{name}/{measure.measured}")) is not None] for name in names
    }
    known = [name for name, scores in scored.items() if scores]
    if not known:
        return ""
    best = max(known, key=lambda name: measure.metric.sign * statistics.fmean(scored[name]))
    mean = statistics.fmean(values_of(row, f"test/{best}/{measure.measured}"))
    return f"{_word(measure)} {measure.text(measure.shown(mean))} ({best})"


def _last(record: CellRecord, key: str) -> float | None:
    return next((metrics[key] for metrics in reversed(record.history) if key in metrics), None)


# --- costs --------------------------------------------------------------------------------------------------------------


def _costs(view: View, column: str, rows: Sequence[TableRow]) -> list[Table]:
    """Make the tables of what training costs, and of rules and their networks."""
    found: dict[str, list[str]] = {}

    def add(name: str, cells: list[str]) -> None:
        if any(cells):
            found[name] = cells

    def table(name: str) -> list[Table]:
        headers, columns = ["row", *found], [[view.label(row) for row in rows], *found.values()]
        words = [place for place, header in enumerate(headers) if header in WORDS]
        texts = [list(cells) for cells in zip(*columns, strict=True)]
        styles = [view.style(row) for row in rows]
        return [Table(headers, texts, words, f"{name} {column}".strip(), styles)] if found else []

    seconds = aligned([mean_of(row, "train/seconds") for row in rows])
    marks = ["*" if untimed([row]) else "\u2007" if untimed(rows) else "" for row in rows]
    add("seconds", [text and text + mark for text, mark in zip(seconds, marks, strict=True)])
    add("processor seconds", aligned([mean_of(row, "train/processor_seconds") for row in rows]))
    add("memory, MiB", aligned([mean_of(row, "train/peak_memory_mb") for row in rows]))
    add("published memory, MiB", aligned([known.mean if known else None for known in (row.published(MEMORY) for row in rows)]))
    add("passes per example", aligned([_ratio(row, "train/forwards", "train/samples") for row in rows]))
    add("passes", [_compact(row, "train/forwards") for row in rows])
    add("operations", [_compact(row, "train/operations") for row in rows])
    add("probe operations", [_compact(row, "linear_probe/operations") for row in rows])
    costs = table("Costs")
    found.clear()
    add("network", [_network(row) for row in rows])
    add("parameters", [_whole(row, "parameters") for row in rows])
    add("trained", [_whole(row, "parameters_trained") for row in rows])
    add(SPAN, [_credit(row) for row in rows])
    add("lines of code", [_tag(row, "rule_lines") for row in rows])
    add("tuned", [_tuned(row) for row in rows])
    return [*costs, *table("Rules and networks")]


def _ratio(row: TableRow, key: str, over: str) -> float | None:
    ratios = [record.result[key] / record.result[over] for record in row.finished if key in record.result and record.result.get(over)]
    return statistics.fmean(ratios) if ratios else None


def _compact(row: TableRow, key: str) -> str:
    mean = mean_of(row, key)
    return "" if mean is None else compact(mean)


def _whole(row: TableRow, key: str) -> str:
    mean = mean_of(row, key)
    return "" if mean is None else f"{mean:,.0f}"


def _tag(row: TableRow, key: str) -> str:
    return ", ".join(dict.fromkeys(record.tags[key] for record in row.finished if record.tags.get(key)))


def _network(row: TableRow) -> str:
    """Name the network of a row, and mark a network of the rule's own, which must not be mistaken for the shared one."""
    recipe = row.cells[0].recipe
    if recipe.is_program:
        return f"none (program {recipe.trains})"
    name = _tag(row, "network") or recipe.names["network"]
    return f"{name} (its own)" if _own_network(row) else name


def _own_network(row: TableRow) -> bool:
    tag = _tag(row, "own_network")
    if tag:
        return tag.lower() in ("true", "1", "yes")
    recipe = row.cells[0].recipe
    return bool(recipe.registry.get("rules", recipe.names["rule"]).brings_network)


def _credit(row: TableRow) -> str:
    span, weights = _tag(row, "reverse_span"), _tag(row, "downstream_weights")
    if not span:
        return ""
    text = SPANS.get(span, f"{span} blocks")
    return text + ABOVE if weights not in ("", "0") and span != "all" else text


def _tuned(row: TableRow) -> str:
    if row.tuned is None or not row.tuned.keys:
        return ""
    edge = ", at the edge of what was tried" if row.tuned.complete and row.tuned.at_edge else ""
    return f"{len(row.tuned.keys)} ({len(row.tuned.trials)} trials{edge})"
