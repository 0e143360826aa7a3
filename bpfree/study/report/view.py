"""The view that the sections of a report share: rows by column, metrics, colours, and numbers as text."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bpfree.document.content import Key, Part, Section
from bpfree.metric import LOSS
from bpfree.study.cells import Plan
from bpfree.study.examples import scores_of
from bpfree.study.measures import Measure
from bpfree.study.rows import TableRow, table_measure
from bpfree.study.statistics import Interval, interval
from bpfree.study.store import SHARE, CellRecord

__all__ = [
    "WAITED",
    "View",
    "aligned",
    "compact",
    "counted",
    "mean_of",
    "splits_of",
    "spread",
    "tested",
    "timed",
    "untimed",
    "values_of",
]

WAITED = (
    f"their threads had a processor for less than {SHARE:.0%} of the time (on a GPU: other cells ran at the same time), so "
    "that part of their seconds was waiting"
)
"""Reason why seconds of cells cannot be compared."""
MOST_STRONG = 8
"""Number of rows above which the others of a figure stay in the background: as many as there are colours."""


@dataclass(frozen=True)
class View:
    """A study's plan and rows, for the sections of its report."""

    plan: Plan
    rows: Sequence[TableRow]

    @cached_property
    def measure(self) -> Measure:
        """Measure that is reported of the test split."""
        return table_measure(self.plan.study, self.rows)

    @property
    def greater(self) -> bool:
        """Whether a greater value of the measure is better."""
        return self.measure.metric.greater

    @cached_property
    def columns(self) -> list[str]:
        """Labels of the columns that have rows."""
        return [column.label for column in self.plan.study.columns if any(row.column == column.label for row in self.rows)]

    @property
    def labelled(self) -> bool:
        """Whether the study has columns."""
        return any(self.columns)

    def of(self, column: str) -> list[TableRow]:
        """Return the rows of a column, in the order of the study."""
        return [row for row in self.rows if row.column == column]

    def by_column(self, title: str, parts: Callable[[str], Iterable[Part]], *notes: Part) -> Iterator[Section]:
        """Make a section of the parts of every column; if columns have labels, with a section below it for each column.

        Notes follow the parts of a single column, and precede those of several.
        """
        found = {column: made for column in self.columns if (made := list(parts(column)))}
        if not found:
            return
        if not self.labelled:
            yield Section(title, [*next(iter(found.values())), *notes])
            return
        single = len(found) == 1
        yield Section(title, [] if single else list(notes))
        for column, made in found.items():
            yield Section(column, [*made, *(notes if single else ())], level=3)

    def style(self, row: TableRow) -> int:
        """Return the number of the row in the study, which determines its colour."""
        return self._styles[row.written.label]

    @cached_property
    def _styles(self) -> dict[str, int]:
        return {row.label: number for number, row in enumerate(self.plan.study.rows)}

    def label(self, row: TableRow) -> str:
        """Return the label of a row, marked if the row is a control."""
        return f"{row.written.label} (control)" if row.written.label in self.plan.study.controls else row.written.label

    def key(self, row: TableRow, among: Sequence[TableRow] = ()) -> Key:
        """Make the legend entry of a row in a figure; ``among`` more than eight rows, all but the eight best stay in the background."""
        return Key(self.style(row), self.label(row), faint=len(among) > MOST_STRONG and row not in self._by_rank(among)[:MOST_STRONG])

    def keys(self, rows: Sequence[TableRow]) -> list[Key]:
        """Make the legend of a figure of rows of a column: in the study's order, of more than eight rows by their mean score."""
        return [self.key(row, rows) for row in (self._by_rank(rows) if len(rows) > MOST_STRONG else rows)]

    def background(self, rows: Sequence[TableRow]) -> str:
        """Say in a sentence which rows of a figure are drawn faintly; empty if none is."""
        if len(rows) <= MOST_STRONG:
            return ""
        return f" The {MOST_STRONG} rows with the best scores are drawn strongly; pointing at another one brings it out."

    def _by_rank(self, rows: Sequence[TableRow]) -> list[TableRow]:
        return [row for row in self.ranked(rows[0].column) if row in rows]

    def scores(self, row: TableRow) -> list[float]:
        """Return the measure of each finished cell that has it."""
        return list(row.by_seed(self.measure).values())

    def mean(self, row: TableRow) -> float | None:
        """Return the mean score; ``None`` without scores."""
        scores = self.scores(row)
        return statistics.fmean(scores) if scores else None

    def interval(self, row: TableRow) -> Interval | None:
        """Compute the interval of the mean score, over seeds and (where predictions are available) new examples.

        Intervals of shares are clipped to 0 and 100 per cent, because Student's t knows no bounds. Accuracies whose predictions are not
        available have the binomial error in their place, where the number of test examples is known.
        """
        scores = scores_of(row, self.measure, self.plan.output)
        several = list(scores.examples.values())
        whole = len(several) == len(scores.means) and len({len(each) for each in several}) == 1
        examples = np.mean(several, axis=0) if whole and several else None
        known = interval(self.scores(row), examples, binomial=self.binomial(row))
        low, high = self.measure.bounds
        return None if known is None else Interval(max(low, known.low), min(high, known.high))

    def binomial(self, row: TableRow) -> tuple[float, int] | None:
        """Compute the binomial variance of a row's mean accuracy or error over new test examples, and their number; ``None`` if unknown."""
        kept = scores_of(row, self.measure, self.plan.output).examples
        mean, count = self.mean(row), tested(row) or max((len(examples) for examples in kept.values()), default=0)
        if mean is None or not count or not self.measure.metric.share or not self.measure.of_predictions:
            return None
        factor = self.measure.metric.factor
        return max(0.0, mean * (factor - mean)) / count, count

    def over_examples(self, row: TableRow) -> bool:
        """Tell whether the interval of a row is over new examples too."""
        scores = scores_of(row, self.measure, self.plan.output)
        kept = bool(scores.means) and len(scores.examples) == len(scores.means)
        return kept or (bool(scores.means) and self.binomial(row) is not None)

    def ranked(self, column: str) -> list[TableRow]:
        """Sort the rows of a column by mean score, best first; rows without a finite mean come last, in the order of the study."""

        def key(row: TableRow) -> tuple[bool, float]:
            mean = self.mean(row)
            known = mean is not None and math.isfinite(mean)
            return (not known, (-mean if self.greater else mean) if known and mean is not None else 0.0)

        return sorted(self.of(column), key=key)

    def validation(self, rows: Iterable[TableRow]) -> Measure | None:
        """Choose the measure of learning curves: the primary metric on validation, else the loss; ``None`` without either."""
        records = [record for row in rows for record in row.records if record is not None]
        keys = {key for record in records for metrics in record.history for key in metrics}
        primaries = {record.primary.name: record.primary for record in records if record.history}
        chosen = sorted([*primaries.values(), LOSS], key=lambda metric: metric.name == LOSS.name)
        return next((Measure("val", metric, metric.name) for metric in chosen if f"val/{metric.name}" in keys), None)


# --- records -----------------------------------------------------------------------------------------------------------


def values_of(row: TableRow, key: str) -> list[float]:
    """Return an entry of the results of finished cells that have it."""
    return [record.result[key] for record in row.finished if key in record.result]


def mean_of(row: TableRow, key: str) -> float | None:
    """Return the mean of :func:`values_of`; ``None`` without values."""
    values = values_of(row, key)
    return statistics.fmean(values) if values else None


def splits_of(row: TableRow) -> dict[str, int]:
    """Return the number of examples of each split of a row's data, by name; empty for runs from before it was recorded."""
    text = next((record.tags["examples"] for record in row.finished if "examples" in record.tags), "")
    return {name: int(count) for count, name in re.findall(r"(\d+) (\w+)", text)}


def tested(row: TableRow) -> int:
    """Return the number of test examples of a row's data; 0 if it is not known."""
    return splits_of(row).get("test", 0)


def timed(row: TableRow) -> list[CellRecord]:
    """List finished cells whose seconds can be compared."""
    return [record for record in row.finished if record.comparable]


def untimed(rows: Iterable[TableRow]) -> bool:
    """Tell whether there are finished cells whose seconds cannot be compared."""
    return any(not record.comparable for row in rows for record in row.finished)


# --- texts --------------------------------------------------------------------------------------------------------------


def spread(mean: float, deviation: float | None, measure: Measure) -> str:
    """Format a mean and its deviation, such as ``97.65 +- 0.21``."""
    return measure.text(mean) + ("" if deviation is None else f" +- {measure.text(deviation)}")


def counted(row: TableRow) -> str:
    """Format the number of finished cells of a row, such as ``2 of 3`` if some are missing."""
    finished, planned = len(row.finished), len(row.cells)
    return f"{finished}" if finished == planned else f"{finished} of {planned}"


def compact(value: float) -> str:
    """Format a number with three digits and a letter: 43.1k, 5.20M, 318."""
    for limit, suffix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * limit:
            scaled = value / limit
            return f"{scaled:.{2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0}f}{suffix}"
    return f"{value:.3g}"


def aligned(values: Sequence[float | None]) -> list[str]:
    """Format a column of numbers with equal decimals: as many as the smallest needs for two digits, at most three; ``None``: blank."""
    sizes = [abs(value) for value in values if value is not None and math.isfinite(value) and value]
    least = min(sizes, default=1.0)
    decimals = 0 if least >= 10 or max(sizes, default=1.0) >= 100_000 else 1 if least >= 1 else 2 if least >= 0.1 else 3
    return ["" if value is None else f"{value:,.{decimals}f}" for value in values]
