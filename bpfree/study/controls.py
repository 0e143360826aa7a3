"""The rows of a study beside its controls: what a row adds to random features, say, and what these reach alone.

A row and a control are compared seed by seed, over the seeds that both have: with d_i the gain of seed i, the gain is their mean and
its standard error ``stdev(d) / sqrt(n)``. A pair without results is left out until it has some.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bpfree.study.cells import Plan
from bpfree.study.line import Line, percent, table_metric

__all__ = ["Comparison", "Section", "compare", "comparisons", "section_on"]


@dataclass(frozen=True)
class Comparison:
    """A row beside a control, in one column.

    Attributes:
        row, column, control: labels.
        gains: of each seed that both have: what the row is better by, in the unit of the metric (percentage points, or loss).
        share: ``(control - chance) / (row - chance)`` of their mean accuracies over these seeds, with chance one over the number of
            classes; ``None`` for a loss, a task without classes, and a row at chance or below.
    """

    row: str
    column: str
    control: str
    gains: Sequence[float]
    share: float | None

    @property
    def gain(self) -> float:
        """Mean over the paired seeds; positive: the row is better."""
        return statistics.fmean(self.gains)

    @property
    def standard_error(self) -> float | None:
        """Of the gain; not known from one seed."""
        return statistics.stdev(self.gains) / math.sqrt(len(self.gains)) if len(self.gains) > 1 else None

    @property
    def verdict(self) -> str:
        """What may be said: differences within two standard errors, or from one seed, name no winner."""
        if self.standard_error is None:
            return "one seed only"
        if abs(self.gain) <= 2 * self.standard_error:
            return "not distinguishable"
        return "row better" if self.gain > 0 else "control better"


def comparisons(plan: Plan, lines: Sequence[Line]) -> list[Comparison]:
    """Each column's rows beside each of its controls, where both have results of a seed."""
    metric, controls = table_metric(plan.study, lines), plan.study.controls
    places = {(line.column, line.row.label): line for line in lines}
    pairs = [
        (places[column.label, row.label], places[column.label, control])
        for column in plan.study.columns
        for row in plan.study.rows
        for control in controls
        if row.label not in controls and {(column.label, row.label), (column.label, control)} <= places.keys()
    ]
    return [found for row, control in pairs if (found := compare(row, control, metric))]


def compare(row: Line, control: Line, metric: str) -> Comparison | None:
    """A row beside a control of its column; ``None`` if no seed has finite results of both."""
    ours, theirs = row.by_seed(metric), control.by_seed(metric)
    seeds = [seed for seed in ours if seed in theirs and math.isfinite(ours[seed] - theirs[seed])]
    if not seeds:
        return None
    sign = 1 if metric.endswith("accuracy") else -1  # of errors and losses, less is better
    gains = [sign * (ours[seed] - theirs[seed]) for seed in seeds]
    chance = _chance(row) if percent(metric) else None
    share = None
    if chance is not None and chance == _chance(control):
        reached, alone = (_accuracy([line[seed] for seed in seeds], metric) - chance for line in (ours, theirs))
        share = alone / reached if reached > 1e-9 else None  # rounding lifts nobody above chance
    return Comparison(row.row.label, row.column, control.row.label, gains, share)


def _accuracy(values: Iterable[float], metric: str) -> float:
    mean = statistics.fmean(values)
    return mean if metric.endswith("accuracy") else 100 - mean


def _chance(line: Line) -> float | None:
    """Accuracy of guessing one of the task's classes, in per cent; ``None`` for other tasks."""
    spec = line.cells[0].recipe.spec()
    return 100 / spec.outputs if spec.targets in ("classes", "soft") else None


# --- as text ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """The section "Against the controls" of a report.

    Attributes:
        headers, table: its cells, as text.
        numeric: the columns of numbers.
        legend: what they mean.
    """

    headers: Sequence[str]
    table: Sequence[Sequence[str]]
    numeric: range
    legend: str


def section_on(plan: Plan, lines: Sequence[Line]) -> Section | None:
    """The comparisons as text; ``None`` as long as there are none."""
    found, metric = comparisons(plan, lines), table_metric(plan.study, lines)
    if not found:
        return None
    labelled, shares = any(column.label for column in plan.study.columns), any(each.share is not None for each in found)
    labels = ["row", *(["column"] if labelled else []), "control"]
    numbers = ["gain, points" if percent(metric) else "gain", "std. error", "n", *(["control's share %"] if shares else [])]
    table = [
        [
            *(each.row, *([each.column] if labelled else []), each.control),
            *_numbers(each, len(plan.seeds), 2 if percent(metric) else 4),
            *([_share(each)] if shares else []),
            each.verdict,
        ]
        for each in found
    ]
    return Section([*labels, *numbers, "verdict"], table, range(len(labels), len(labels) + len(numbers)), _legend(metric, shares=shares))


def _numbers(found: Comparison, seeds: int, digits: int) -> list[str]:
    error, paired = found.standard_error, len(found.gains)
    return [
        f"{found.gain:+z.{digits}f}",
        "" if error is None else f"{error:.{digits}f}",
        f"{paired}" if paired == seeds else f"{paired} of {seeds}",
    ]


def _share(found: Comparison) -> str:
    return "" if found.share is None else f"{100 * found.share:z.1f}"


def _legend(metric: str, *, shares: bool) -> str:
    name = metric.replace("/", " ")
    difference = f"the row's {name} minus the control's" if metric.endswith("accuracy") else f"the control's {name} minus the row's"
    unit = ", in percentage points" if percent(metric) else ""
    text = (
        f"Gain: {difference}{unit}, so that positive means that the row is better. Mean over the n seeds that both have, paired by seed, "
        "with the standard error of that mean. Not distinguishable: within two standard errors."
    )
    if shares:
        text += (
            " Control's share: the control alone reaches this much of what the row reaches above chance, "
            "(control - chance) / (row - chance) of their accuracies; chance is one over the number of classes."
        )
    return text
