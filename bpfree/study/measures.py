"""Measures that a study reports: a metric of a split, in the unit that is shown to readers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from bpfree.metric import ACCURACY, DIGITS, ERROR, LOSS, Metric, metric_of
from bpfree.recipe import Recipe
from bpfree.study.store import CellRecord
from bpfree.training.evaluation import scored_by

__all__ = ["Measure", "measure_of", "metrics_of"]

Number = TypeVar("Number", float, NDArray[np.float64])


@dataclass(frozen=True)
class Measure:
    """A metric of a split, shares in per cent.

    Attributes:
        split: ``test``, ``train`` or ``val``.
        metric: its direction and unit.
        measured: name under which runs have it: the error is 1 less the accuracy that they measure.
    """

    split: str
    metric: Metric
    measured: str

    @property
    def key(self) -> str:
        """Key in study files, such as ``test/error``."""
        return f"{self.split}/{self.metric.name}"

    @property
    def name(self) -> str:
        """Name for sentences, such as ``test error``."""
        return f"{self.split} {self.metric.name.replace('_', ' ')}"

    @property
    def label(self) -> str:
        """Label of columns and axes, such as ``test error, %``."""
        return f"{self.split} {self.metric.label}"

    @property
    def unit(self) -> str:
        """Unit with a space before it, `` %``; empty without a unit."""
        unit = "%" if self.metric.share else self.metric.unit
        return f" {unit}" if unit else ""

    @property
    def bounds(self) -> tuple[float, float]:
        """Least and greatest possible value, in the unit that is shown."""
        return (0.0, 100.0) if self.metric.share else (-math.inf, math.inf)

    @property
    def of_predictions(self) -> bool:
        """Whether the measure is a mean over stored predictions of single examples: accuracy, error and loss."""
        return self.measured in (ACCURACY.name, LOSS.name)

    def shown(self, value: Number) -> Number:
        """Convert a run's value to the unit that is shown."""
        scaled = self.metric.factor * value
        return scaled if self.measured == self.metric.name else self.metric.factor - scaled

    def of(self, values: Mapping[str, float], which: str = "") -> float | None:
        """Look up the measure in a run's metrics, in the unit that is shown; ``None`` if it was not measured.

        Args:
            values: the run's result, or the metrics of an epoch.
            which: prediction, such as ``linear_probe``; empty: the rule's own.
        """
        value = values.get(f"{self.split}/{which}/{self.measured}" if which else f"{self.split}/{self.measured}")
        return None if value is None else self.shown(value)

    def text(self, shown: float) -> str:
        """Write a number without its unit: shares with two decimals, others with four significant digits."""
        return f"{shown:.2f}" if self.metric.share else f"{shown:.{DIGITS}g}"

    def signed(self, shown: float) -> str:
        """Write a difference with its sign."""
        return f"{shown:+z.2f}" if self.metric.share else f"{shown:+z.{DIGITS}g}"


def measure_of(key: str, known: Mapping[str, Metric]) -> Measure:
    """Make the measure of a key such as ``test/macro_f1``; ``test/error`` is 1 less the accuracy, unless a task defines its own error."""
    split, _, name = key.partition("/")
    if name == ERROR.name and name not in known:
        return Measure(split, ERROR, ACCURACY.name)
    metric = metric_of(key, known)
    return Measure(split, metric, metric.name)


def metrics_of(recipe: Recipe, records: Iterable[CellRecord] = ()) -> dict[str, Metric]:
    """Return the metrics that score the predictions of a recipe's runs, the primary one first.

    Args:
        recipe: resolved.
        records: of its finished cells, which say what they measured.
    """
    recorded = next((record.seen() for record in records), None)
    if recorded is not None:
        return recorded.measures
    return {metric.name: metric for metric in scored_by(recipe.spec(), recipe.settings.evaluation.metrics)}
