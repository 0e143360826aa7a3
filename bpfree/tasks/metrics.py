"""The metrics that come with the core, and the two ways to accumulate one: a mean over examples, or a function of a whole split."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from bpfree import metric as described
from bpfree.devices import doubled, summed
from bpfree.metric import Accumulator, Metric
from bpfree.step import Batch
from bpfree.tasks import intervals

__all__ = ["ACCURACY", "BUILT_IN", "LOSS", "SAMPLED", "mean_metric", "whole_metric"]

Values = Callable[[Any, Tensor, Batch], Tensor]
Measure = Callable[[Any, Tensor, Tensor | None], float]


class About(TypedDict, total=False):
    """Fields of a :class:`bpfree.Metric` that describe it."""

    greater: bool
    share: bool
    unit: str
    summary: str
    kinds: tuple[str, ...]
    of_samples: bool


BINS = 15
"""Bins of the expected calibration error (Guo et al. 2017)."""


class _Mean:
    """The mean of values over all examples or tokens; sums stay on the device until they are read."""

    def __init__(self, values: Values, spec: Any) -> None:
        self._values, self._spec = values, spec
        self._total: Tensor | None = None
        self._count = 0

    def add(self, outputs: Tensor, batch: Batch) -> None:
        values = self._values(self._spec, outputs, batch)
        total = summed(values)
        self._total = total if self._total is None else self._total + total
        self._count += values.numel()

    def value(self) -> float:
        return math.nan if self._total is None or not self._count else float(self._total) / self._count


class _MeanLoss:
    """The task's loss: the mean over batches, weighted by the number of terms of each."""

    def __init__(self, spec: Any) -> None:
        self._spec = spec
        self._total: Tensor | None = None
        self._count: int | Tensor = 0

    def add(self, outputs: Tensor, batch: Batch) -> None:
        count = self._spec.counted(batch)
        total = doubled(self._spec.loss(outputs if outputs.dtype == torch.float64 else outputs.float(), batch))
        count = count.to(total.device) if isinstance(count, Tensor) else count
        total = total * count
        if isinstance(count, Tensor):  # of a batch in which every token is ignored the mean is NaN
            total = torch.where(count > 0, total, 0.0)
        self._total = total if self._total is None else self._total + total
        self._count = self._count + count

    def value(self) -> float:
        count = int(self._count)
        return math.nan if self._total is None or not count else float(self._total) / count


class _Whole:
    """The accumulator of a function of all outputs and targets, which are kept on the CPU."""

    def __init__(self, measure: Measure, spec: Any) -> None:
        self._measure, self._spec = measure, spec
        self._outputs: list[Tensor] = []
        self._targets: list[Tensor] = []

    def add(self, outputs: Tensor, batch: Batch) -> None:
        self._outputs.append(outputs.detach().float().cpu())
        if batch.targets is not None:
            self._targets.append(batch.targets.cpu())

    def value(self) -> float:
        if not self._outputs:
            return math.nan
        return float(self._measure(self._spec, torch.cat(self._outputs), torch.cat(self._targets) if self._targets else None))


def mean_metric(name: str, values: Values, **about: Unpack[About]) -> Metric:
    """Make a metric that is a mean over examples.

    Args:
        name: as in ``test/NAME``.
        values: ``(spec, outputs, batch) -> (M,)``, a value for each example, or for each token that counts.
        about: ``greater``, ``share``, ``unit``, ``summary``, ``kinds``, ``of_samples``, as :class:`bpfree.Metric` has them.
    """
    return Metric(name, **about, begin=lambda spec, predict: _Mean(values, spec))


def whole_metric(name: str, measure: Measure, **about: Unpack[About]) -> Metric:
    """Make a metric of a whole split, such as an area under a curve.

    Args:
        name: as in ``test/NAME``.
        measure: ``(spec, outputs, targets) -> float`` of all outputs (N, ...), float32, and targets of a split, on the CPU; NaN where it
            is not defined.
        about: ``greater``, ``share``, ``unit``, ``summary``, ``kinds``, as :class:`bpfree.Metric` has them.
    """
    return Metric(name, **about, begin=lambda spec, predict: _Whole(measure, spec))


# --- means ----------------------------------------------------------------------------------------------------------------


def _targets(batch: Batch) -> Tensor:
    assert batch.targets is not None
    return batch.targets


def _correct(spec: Any, outputs: Tensor, batch: Batch) -> Tensor:
    right: Tensor = spec.correct(outputs, _targets(batch))
    return right


def _among(count: int) -> Values:
    def values(spec: Any, outputs: Tensor, batch: Batch) -> Tensor:
        scores, classes = spec.scored_classes(outputs, _targets(batch))
        best = scores.topk(min(count, scores.shape[1]), dim=1).indices
        found: Tensor = (best == classes[:, None]).any(1)
        return found

    return values


def _labels_right(spec: Any, outputs: Tensor, batch: Batch) -> Tensor:
    return ((outputs > 0) == (_targets(batch) > 0.5)).flatten()


def _all_labels_right(spec: Any, outputs: Tensor, batch: Batch) -> Tensor:
    return ((outputs > 0) == (_targets(batch) > 0.5)).flatten(1).all(1)


def _absolute(spec: Any, outputs: Tensor, batch: Batch) -> Tensor:
    distance: Tensor = outputs - spec.beside(outputs, _targets(batch))
    return doubled(distance.abs()).flatten()


# --- of draws from a predictive distribution ------------------------------------------------------------------------------


def _crps(spec: Any, draws: Tensor, batch: Batch) -> Tensor:
    return intervals.crps(draws, spec.beside(draws[0], _targets(batch))).flatten()


def _covered(spec: Any, draws: Tensor, batch: Batch) -> Tensor:
    low, high = intervals.central(draws, described.LEVEL)
    targets = spec.beside(low, _targets(batch).to(low.dtype))
    inside: Tensor = (low <= targets) & (targets <= high)
    return inside.flatten()


def _width(spec: Any, draws: Tensor, batch: Batch) -> Tensor:
    low, high = intervals.central(draws, described.LEVEL)
    return (high - low).flatten()


# --- of a whole split ----------------------------------------------------------------------------------------------------


def _classes(spec: Any, outputs: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return scores (M, C) and classes (M,)."""
    assert targets is not None
    found: tuple[Tensor, Tensor] = spec.scored_classes(outputs, targets)
    return found


def _of_decisions(name: str, **options: Any) -> Measure:
    """Make a measure of a function of ``sklearn.metrics`` of true and predicted classes or labels, in per-class means."""

    def measure(spec: Any, outputs: Tensor, targets: Tensor | None) -> float:
        from sklearn import metrics

        if spec.targets == "multilabel":
            assert targets is not None
            truth, made = (targets > 0.5).int().numpy(), (outputs > 0).int().numpy()
        else:
            scores, classes = _classes(spec, outputs, targets)
            truth, made = classes.numpy(), scores.argmax(1).numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # classes that never occur: their share is 0, as zero_division says
            return float(getattr(metrics, name)(truth, made, **options))

    return measure


def _auc(spec: Any, outputs: Tensor, targets: Tensor | None) -> float:
    """Compute the area under the ROC curve, mean over classes that occur but not always, each against all others."""
    from sklearn.metrics import roc_auc_score

    if spec.targets == "multilabel":
        assert targets is not None
        truth, scores = targets > 0.5, outputs
    else:
        scores, classes = _classes(spec, outputs, targets)
        truth, scores = F.one_hot(classes, scores.shape[1]).bool(), scores.softmax(1)
    areas = [
        float(roc_auc_score(truth[:, place].numpy(), scores[:, place].numpy()))
        for place in range(truth.shape[1])
        if 0 < int(truth[:, place].sum()) < len(truth)
    ]
    return sum(areas) / len(areas) if areas else math.nan


def _average_precision(spec: Any, outputs: Tensor, targets: Tensor | None) -> float:
    from sklearn.metrics import average_precision_score

    assert targets is not None
    found = [
        float(average_precision_score((targets[:, place] > 0.5).numpy(), outputs[:, place].numpy()))
        for place in range(targets.shape[1])
        if bool((targets[:, place] > 0.5).any())
    ]
    return sum(found) / len(found) if found else math.nan


def _calibration_error(spec: Any, outputs: Tensor, targets: Tensor | None) -> float:
    """Compute the expected calibration error: |confidence - accuracy| over 15 equal bins (Guo et al. 2017, equation 3)."""
    scores, classes = _classes(spec, outputs, targets)
    confidence, made = scores.double().softmax(1).max(1)
    right = (made == classes).double()
    place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1  # bins are ((m - 1)/M, m/M]
    gap = torch.zeros(BINS, dtype=torch.float64).index_add_(0, place, right - confidence)
    return float(gap.abs().sum()) / len(classes)


def _explained(spec: Any, outputs: Tensor, targets: Tensor | None) -> float:
    """Compute the coefficient of determination, mean over outputs; an output that is constant in the split is left out."""
    assert targets is not None
    made, truth = outputs.double().flatten(1), spec.beside(outputs, targets).double().flatten(1)
    spread = (truth - truth.mean(0)).pow(2).sum(0)
    varies = spread > 0
    if not bool(varies.any()):
        return math.nan
    return float((1 - (made - truth).pow(2).sum(0)[varies] / spread[varies]).mean())


def _rms(spec: Any, outputs: Tensor, targets: Tensor | None) -> float:
    assert targets is not None
    return float((outputs.double() - spec.beside(outputs, targets).double()).pow(2).mean().sqrt())


CLASSES = ("classes", "soft", "tokens")
LOSS = replace(described.LOSS, begin=lambda spec, predict: _MeanLoss(spec))
ACCURACY = replace(described.ACCURACY, kinds=CLASSES, begin=lambda spec, predict: _Mean(_correct, spec))
PERPLEXITY = Metric(
    "perplexity",
    greater=False,
    summary="exp of the mean negative log-likelihood of a token or class",
    kinds=("classes", "tokens"),
    begin=lambda spec, predict: _Exponential(_MeanLoss(spec)),
)
LABEL_ACCURACY = mean_metric("label_accuracy", _labels_right, share=True, summary="share of labels that are right", kinds=("multilabel",))
EXACT = mean_metric(
    "exact_match", _all_labels_right, share=True, summary="share of examples of which all labels are right", kinds=("multilabel",)
)


class _Exponential:
    def __init__(self, inner: Accumulator) -> None:
        self._inner = inner

    def add(self, outputs: Tensor, batch: Batch) -> None:
        self._inner.add(outputs, batch)

    def value(self) -> float:
        value = self._inner.value()
        return math.inf if value >= 700 else math.exp(value)


def _of_samples(metric: Metric, values: Values) -> Metric:
    return replace(metric, kinds=("real",), of_samples=True, begin=lambda spec, predict: _Mean(values, spec))


SAMPLED = {
    "crps": _of_samples(described.CRPS, _crps),
    "coverage-90": _of_samples(described.COVERAGE, _covered),
    "interval-width-90": _of_samples(described.WIDTH, _width),
}
"""Metrics of draws from a predictive distribution, which are measured wherever a rule has one."""
BUILT_IN: dict[str, Metric] = {
    "accuracy": ACCURACY,
    "top5": mean_metric(
        "top5", _among(5), share=True, summary="share of examples whose class has one of the five best scores", kinds=CLASSES
    ),
    "balanced-accuracy": whole_metric(
        "balanced_accuracy",
        _of_decisions("balanced_accuracy_score"),
        share=True,
        summary="accuracy of each class, mean over classes that occur (scikit-learn)",
        kinds=CLASSES,
    ),
    "macro-f1": whole_metric(
        "macro_f1",
        _of_decisions("f1_score", average="macro", zero_division=0),
        share=True,
        summary="F1 of each class, mean over classes (scikit-learn)",
        kinds=(*CLASSES, "multilabel"),
    ),
    "micro-f1": whole_metric(
        "micro_f1",
        _of_decisions("f1_score", average="micro", zero_division=0),
        share=True,
        summary="F1 over all labels together (scikit-learn)",
        kinds=("multilabel",),
    ),
    "auc": whole_metric(
        "auc",
        _auc,
        share=True,
        summary="area under the ROC curve, each class against all others, mean over classes (scikit-learn)",
        kinds=(*CLASSES, "multilabel"),
    ),
    "average-precision": whole_metric(
        "average_precision",
        _average_precision,
        share=True,
        summary="area under the precision-recall curve of each label, mean over labels (scikit-learn)",
        kinds=("multilabel",),
    ),
    "ece": whole_metric(
        "ece", _calibration_error, greater=False, share=True, summary="expected calibration error, 15 bins (Guo et al. 2017)", kinds=CLASSES
    ),
    "label-accuracy": LABEL_ACCURACY,
    "exact-match": EXACT,
    "perplexity": PERPLEXITY,
    "mae": mean_metric("mae", _absolute, greater=False, summary="mean absolute error of an output", kinds=("real",)),
    "rmse": whole_metric("rmse", _rms, greater=False, summary="root of the mean squared error of an output", kinds=("real",)),
    "r2": whole_metric("r2", _explained, summary="coefficient of determination, mean over outputs", kinds=("real",)),
    **SAMPLED,
}
"""The metrics by the names that ``evaluation.metrics`` takes."""
