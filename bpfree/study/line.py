"""A line of a study's table: a row in one of its columns, with what is known of its seeds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from bpfree.study.cells import Cell
from bpfree.study.model import Published, Row, Study
from bpfree.study.state import Outcome
from bpfree.study.trials import Tuned

__all__ = ["Line", "percent", "table_metric", "value_of"]


@dataclass
class Line:
    """A row of the study in one of its columns, over its seeds.

    Attributes:
        row: of the study.
        column: its label.
        cells: one per seed.
        outcomes: of those cells, where anything is known.
        tuned: the trials of its tuning; ``None`` where the study does not tune.
        twins: by seed, of the own-prediction twin that had the same trials and as many operations; empty where the study asks for none.
    """

    row: Row
    column: str
    cells: list[Cell] = field(default_factory=list)
    outcomes: list[Outcome | None] = field(default_factory=list)
    tuned: Tuned | None = None
    twins: dict[int, Outcome | None] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Row and column."""
        return f"{self.row.label} [{self.column}]" if self.column else self.row.label

    @property
    def finished(self) -> list[Outcome]:
        """Those with a result."""
        return [outcome for outcome in self.outcomes if outcome is not None and outcome.status == "finished"]

    def by_seed(self, metric: str) -> dict[int, float]:
        """A metric of the finished cells, as far as they measured it; in the table's unit."""
        pairs = zip(self.cells, self.outcomes, strict=True)
        results = ((cell.seed, value_of(known, metric)) for cell, known in pairs if known is not None and known.status == "finished")
        return {seed: value for seed, value in results if value is not None}

    def published(self, metric: str) -> Published | None:
        """The paper's number, where it is known."""
        return self.row.published.get(self.column, {}).get(metric)

    def standing(self) -> str:
        """Why there is no result yet."""
        return next((outcome.status for outcome in self.outcomes if outcome is not None), "not run")


def percent(metric: str) -> bool:
    """Whether a metric is in per cent."""
    return not metric.endswith("loss")


def value_of(outcome: Outcome, metric: str) -> float | None:
    """A metric of a finished cell: errors and accuracies in per cent; ``None`` if it was not measured."""
    split, _, kind = metric.partition("/")
    measured = outcome.result.get(f"{split}/loss" if kind == "loss" else f"{split}/accuracy")
    if measured is None or kind == "loss":
        return measured
    return 100 * measured if kind == "accuracy" else 100 - 100 * measured


def table_metric(study: Study, lines: Iterable[Line], split: str = "test") -> str:
    """What is reported of a split: the kind that is published; otherwise the error, or the loss where no run has an accuracy."""
    if study.publishes(split):
        return study.metric(split)
    measured = {key for line in lines for outcome in line.finished for key in outcome.result}
    only_loss = f"{split}/loss" in measured and f"{split}/accuracy" not in measured
    return f"{split}/loss" if only_loss else study.metric(split)
