"""The table of a study: our means and deviations beside what was published, and what a reader must know of them."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bpfree.study.cells import Plan
from bpfree.study.controls import Section, section_on
from bpfree.study.line import Line, percent
from bpfree.study.state import State

__all__ = ["Report", "report_on"]

ENVIRONMENT = ("device_name", "threads", "torch", "python", "bpfree")


@dataclass
class Report:
    """All that terminal and page show.

    Attributes:
        plan: the study with what the command line said.
        lines: the table's, row by row.
        command: the words that run it.
        headers, table: the cells of the table, as text.
        controls: the rows beside the study's controls, where there is anything to compare.
        remarks: what a reader must know, a sentence each: how this differs from the study as written comes first.
        failures: a sentence for each cell that did not finish.
        environment: where the finished cells ran.
    """

    plan: Plan
    lines: list[Line]
    command: str
    headers: list[str]
    table: list[list[str]]
    controls: Section | None
    remarks: list[str]
    failures: list[str]
    environment: str

    @property
    def page_name(self) -> str:
        """A changed study has a page of its own, so that it does not replace the page of the whole one."""
        import hashlib

        changes = "; ".join(self.plan.changes)
        return f"report-{hashlib.sha256(changes.encode()).hexdigest()[:8]}.html" if changes else "report.html"


def report_on(plan: Plan, state: State, words: Sequence[str]) -> Report:
    """The report on what is finished so far.

    Args:
        plan: the study, resolved.
        state: of its cells.
        words: those of the command line after ``bpfree study run``.
    """
    places = {(row.label, column.label): Line(row, column.label) for row, column in plan.study.cells()}
    for cell in plan.cells:
        line = places[cell.row, cell.column]
        line.cells.append(cell)
        line.outcomes.append(state.seen(cell.id))
    lines = list(places.values())
    headers = _headers(plan)
    return Report(
        plan,
        lines,
        shlex.join(["bpfree", "study", "run", *words]),
        headers,
        [_texts(plan, line, len(headers)) for line in lines],
        section_on(plan, lines),
        list(_remarks(plan, lines, state)),
        list(_failures(lines)),
        "; ".join(_environments(lines)),
    )


# --- the table --------------------------------------------------------------------------------------------------------


def _has_columns(plan: Plan) -> bool:
    return any(column.label for column in plan.study.columns)


def _headers(plan: Plan) -> list[str]:
    study = plan.study
    test, train = (_header(study.metric(split)) for split in ("test", "train"))
    beside = ["published", "difference"]
    return [
        *(["row", "column"] if _has_columns(plan) else ["row"]),
        *[test, *(beside if study.publishes("test") else []), "n"],
        *([train, *beside] if study.publishes("train") else []),
        *["seconds", "samples/s", "parameters", "trained"],
    ]


def _header(metric: str) -> str:
    name = metric.replace("/", " ")
    return f"{name} %" if percent(metric) else name


def _texts(plan: Plan, line: Line, width: int) -> list[str]:
    study = plan.study
    test, train = study.metric("test"), study.metric("train")
    label = f"{line.row.label} (control)" if line.row.label in study.controls else line.row.label
    cells = [label, *([line.column] if _has_columns(plan) else [])]
    cells += _beside(line, test, published=study.publishes("test"), empty=line.standing())
    cells.append(f"{len(line.finished)}" if len(line.finished) == len(line.cells) else f"{len(line.finished)} of {len(line.cells)}")
    cells += _beside(line, train, published=True) if study.publishes("train") else []
    for key, form in (
        ("train/seconds", ".1f"),
        ("train/samples_per_second", ",.0f"),
        ("parameters", ",.0f"),
        ("parameters_trained", ",.0f"),
    ):
        values = [outcome.result[key] for outcome in line.finished if key in outcome.result]
        cells.append(f"{statistics.fmean(values):{form}}" if values else "")
    return cells + [""] * (width - len(cells))


def _beside(line: Line, metric: str, *, published: bool, empty: str = "") -> list[str]:
    """Ours; and where the table has them, the published number and the difference. What is not known stays blank."""
    digits = 2 if percent(metric) else 4
    values = list(line.by_seed(metric).values())
    measurable = len(values) > 1 and all(map(math.isfinite, values))  # the loss of a finished run can be infinite
    ours = _spread(statistics.fmean(values), statistics.stdev(values) if measurable else None, digits) if values else ""
    if not published:
        return [ours or ("" if line.finished else empty)]
    theirs = line.published(metric)
    return [
        ours or ("" if line.finished else empty),
        _spread(theirs.mean, theirs.spread, digits) if theirs else "",
        f"{statistics.fmean(values) - theirs.mean:+.{digits}f}" if values and theirs else "",
    ]


def _spread(mean: float, deviation: float | None, digits: int) -> str:
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" +- {deviation:.{digits}f}")


# --- what a reader must know ------------------------------------------------------------------------------------------


def _remarks(plan: Plan, lines: Sequence[Line], state: State) -> Iterable[str]:
    if plan.changes:
        word = "shortened: this is not" if plan.shortened else "changed: this is not"
        yield f"The study was {word} the study as written. {'; '.join(plan.changes)}."
    finished, cells = sum(len(line.finished) for line in lines), sum(len(line.cells) for line in lines)
    if finished < cells:
        yield f"{finished} of {cells} cells are finished."
    yield from _selection(lines)
    if plan.study.publishes("train"):
        yield "Training split: all its examples, scored by the weights that were tested."
    yield from _data(lines)
    others = state.others({cell.id for cell in plan.cells})
    if others:
        yield f"Not shown: {others} finished cells in {state.folder} of other settings, seeds, versions or sources."


def _selection(lines: Sequence[Line]) -> Iterable[str]:
    """On how much the cells were trained, and what chose the weights that were tested."""
    told: dict[str, list[str]] = {}
    for line in lines:
        recipe = line.cells[0].recipe
        told.setdefault(_selected(recipe.task.validation, recipe.settings.select), []).append(line.label)
    for text, labels in told.items():
        yield f"{text}." if len(told) == 1 else f"{', '.join(labels)}: {text[0].lower()}{text[1:]}."


def _selected(validation: float, select: str) -> str:
    if not validation:
        return "Trained on the whole training set; nothing was selected: the last weights are tested"
    chosen = "the weights best on them are tested" if select == "best-val" else "the last weights are tested"
    return f"{100 * validation:g} % of the training examples are held out for validation; {chosen}"


def _data(lines: Sequence[Line]) -> Iterable[str]:
    """Cells on one task must have seen the same data; a fingerprint is known once they have run."""
    seen: dict[str, set[str]] = {}
    for line in lines:
        recipe = line.cells[0].recipe
        key = str((recipe.names["task"], recipe.options["task"], recipe.task.validation, recipe.task.split_seed))
        seen.setdefault(key, set()).update(
            outcome.tags["data_fingerprint"] for outcome in line.finished if "data_fingerprint" in outcome.tags
        )
    if any(len(fingerprints) > 1 for fingerprints in seen.values()):
        yield "Not all cells of one task saw the same data: their fingerprints differ."


def _failures(lines: Sequence[Line]) -> Iterable[str]:
    for line in lines:
        for cell, outcome in zip(line.cells, line.outcomes, strict=True):
            if outcome is not None and outcome.reason:
                yield f"{cell.label}: {outcome.status}: {outcome.reason}"


def _environments(lines: Sequence[Line]) -> list[str]:
    """Each place in which finished cells ran."""
    tags: list[Mapping[str, str]] = [outcome.tags for line in lines for outcome in line.finished]
    texts = (
        ", ".join(f"{key.removeprefix('device_name')} {place[key]}".strip() for key in ENVIRONMENT if place.get(key)) for place in tags
    )
    return list(dict.fromkeys(texts))
