"""A metric: its name, its direction and unit, how it is shown, and how it is accumulated over a split. Nothing here imports torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ACCURACY",
    "COVERAGE",
    "CRPS",
    "ERROR",
    "LEVEL",
    "LOSS",
    "WIDTH",
    "Accumulator",
    "Metric",
    "metric_of",
    "metrics_from",
    "recorded_metrics",
    "scores_in",
]

DERIVED = re.compile(r"_(selected|se|draw_\d+)$")
"""What is appended to a metric's name for the same quantity, measured otherwise."""
DIGITS = 4


class Accumulator(Protocol):
    """An accumulator of a metric over one pass of a split."""

    def add(self, outputs: Tensor, batch: Any) -> None:
        """Add the outputs for a :class:`bpfree.Batch`; this does not copy anything to the host."""

    def value(self) -> float:
        """Return the metric of all added outputs; NaN if it is not defined for them."""


@dataclass(frozen=True)
class Metric:
    """Describe a number that says how good predictions are.

    Attributes:
        name: the last part of its keys, such as ``accuracy`` in ``test/accuracy``; letters, digits and ``_``.
        greater: whether greater values are better.
        share: whether it is a share of something, 0 to 1 in most cases: logged as such, shown in per cent.
        unit: shown behind values that are no shares, such as ``nats``.
        summary: one line for listings.
        kinds: of targets for which it can be measured; empty: all.
        of_samples: whether it is of draws from a rule's predictive distribution (``Rule.sample``), in place of its prediction: ``add`` gets
            them as outputs (K, N, ...). Measured in the final evaluation, where the rule has such a distribution.
        begin: makes what accumulates it over one pass: called with the task's spec and the rule's ``predict`` (inputs to outputs), for
            metrics that need more than the outputs for the split's inputs. ``None``: described alone, as in the record of a run.
    """

    name: str
    greater: bool = True
    share: bool = False
    unit: str = ""
    summary: str = ""
    kinds: tuple[str, ...] = ()
    of_samples: bool = False
    begin: Callable[[Any, Callable[[Any], Tensor]], Accumulator] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z]\w*", self.name):
            raise ValueError(f"a metric cannot be named {self.name!r}: letters, digits and _, beginning with a letter")

    @property
    def sign(self) -> int:
        """1 where greater values are better, -1 where smaller ones are."""
        return 1 if self.greater else -1

    @property
    def label(self) -> str:
        """Label of columns and axes: ``accuracy, %`` or ``bits per character``."""
        unit = "%" if self.share else self.unit
        return f"{self.name.replace('_', ' ')}, {unit}" if unit else self.name.replace("_", " ")

    @property
    def factor(self) -> float:
        """Factor by which values are multiplied for display: 100 for shares."""
        return 100.0 if self.share else 1.0

    def best(self, values: Iterable[float]) -> float:
        """Return the best of some values.

        Raises:
            ValueError: there are none.
        """
        return max(values) if self.greater else min(values)

    def text(self, value: float) -> str:
        """Write a value as people read it: ``97.49 %``, or four significant digits and the unit."""
        if self.share:
            return f"{100 * value:.2f} %"
        number = f"{value:.{DIGITS}g}"
        return f"{number} {self.unit}" if self.unit else number

    def recorded(self) -> dict[str, Any]:
        """Return the metric as plain values, for the record of a run."""
        return {"greater": self.greater, "share": self.share, "unit": self.unit}


LOSS = Metric("loss", greater=False, summary="the task's loss, mean over examples (or tokens)")
ACCURACY = Metric("accuracy", share=True, summary="share of examples (or tokens) whose best score is at the target's class")
ERROR = Metric("error", greater=False, share=True, summary="1 less the accuracy")
LEVEL = 0.9
"""Of the intervals that every final evaluation of a predictive distribution reports."""
CRPS = Metric(
    "crps", greater=False, summary="continuous ranked probability score of draws from the predictive distribution (fair estimate)"
)
COVERAGE = Metric(
    "coverage_90", share=True, summary="share of targets inside the central 90 % of the predictive distribution; right is 90 %"
)
WIDTH = Metric("interval_width_90", greater=False, summary="mean width of the central 90 % of the predictive distribution")
SAMPLED = (CRPS, COVERAGE, WIDTH)
"""Of draws from a predictive distribution."""
KNOWN = {metric.name: metric for metric in (LOSS, ACCURACY, ERROR, *SAMPLED)}


def metric_of(key: str, known: Mapping[str, Metric] = KNOWN) -> Metric:
    """Find the metric of a key: that of ``val/linear_probe/accuracy`` is the accuracy.

    Args:
        key: of a result or of the metrics of an epoch; also of what is derived, such as ``test/accuracy_se``.
        known: metrics of the task, by name.

    Returns:
        The metric; for an unknown name one that is no share, greater being better unless the name ends with ``loss`` or ``error``.
    """
    last = key.rsplit("/", 1)[-1]
    name = DERIVED.sub("", last)
    found = known.get(last) or known.get(name) or KNOWN.get(name)
    if found is not None:
        return found
    name = re.sub(r"\W", "_", name) or "value"
    name = name if name[0].isalpha() else f"m{name}"
    if name.endswith("accuracy"):
        return Metric(name, share=True)
    return Metric(name, greater=not name.endswith(("loss", "error")))


def scores_in(values: Mapping[str, float], split: str, metrics: Iterable[Metric]) -> list[tuple[Metric, float]]:
    """Find a split's metrics among numbers, in their order; the loss where it comes first, or there is nothing else.

    Args:
        values: by key, such as ``val/accuracy``.
        split: ``train``, ``val`` or ``test``.
        metrics: of the run, first the primary one.
    """
    measured = list(metrics)
    found = [(metric, values[key]) for metric in measured if (key := f"{split}/{metric.name}") in values]
    others = [(metric, value) for metric, value in found if metric.name != LOSS.name]
    return others if others and measured[0].name != LOSS.name else found


def recorded_metrics(metrics: Iterable[Metric]) -> dict[str, Any]:
    """Return metrics as plain values in their order; the first is the primary metric."""
    return {metric.name: metric.recorded() for metric in metrics}


def metrics_from(recorded: Mapping[str, Any]) -> dict[str, Metric]:
    """Read what ``recorded_metrics`` returned; entries that do not describe a metric are skipped."""
    found = {}
    for name, values in recorded.items():
        try:
            found[name] = Metric(name, bool(values["greater"]), bool(values["share"]), str(values.get("unit", "")))
        except (KeyError, TypeError, ValueError, AttributeError):
            continue
    return found
