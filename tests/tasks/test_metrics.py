"""The metrics that come with the core, over random draws.

Oracles: scikit-learn for what is written by hand, numpy by the definitions for what calls scikit-learn; one batch for several.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn import metrics as sklearn_metrics
from torch import Tensor

import bpfree
from bpfree import Metric, TaskSpec
from bpfree.metric import ACCURACY, KNOWN, LOSS, metric_of, metrics_from, recorded_metrics, scores_in
from bpfree.run import Run
from bpfree.step import Batch
from bpfree.tasks.metrics import BUILT_IN
from bpfree.tasks.metrics import LOSS as MEASURED_LOSS
from bpfree.tasks.spec import IGNORED

Array = NDArray[Any]
DRAWS = range(12)
CLASSES = 7


def draw(kind: str, seed: int) -> tuple[TaskSpec, Tensor, Tensor]:
    """A spec, outputs and targets of a kind; of tokens a third is ignored, of classes one never occurs."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(20, 90, (), generator=generator))
    scores = 2 * torch.randn(count, CLASSES, generator=generator)
    if kind == "classes":
        classes = torch.randint(0, CLASSES - 1, (count,), generator=generator)
        return TaskSpec("t", (3,), CLASSES), scores, classes
    if kind == "soft":
        return TaskSpec("t", (3,), CLASSES, targets="soft"), scores, torch.rand(count, CLASSES, generator=generator).softmax(1)
    if kind == "tokens":
        tokens = torch.randint(0, CLASSES - 1, (count, 4), generator=generator)
        tokens[torch.rand(count, 4, generator=generator) < 1 / 3] = IGNORED
        tokens[0] = IGNORED
        return TaskSpec("t", (4,), CLASSES, targets="tokens"), torch.randn(count, 4, CLASSES, generator=generator), tokens
    if kind == "multilabel":
        labels = (torch.rand(count, CLASSES, generator=generator) < 0.4).long()
        return TaskSpec("t", (3,), CLASSES, targets="multilabel"), scores, labels
    truth = torch.randn(count, CLASSES, generator=generator)
    truth[:, 0] = 1.5  # constant, of which no share can be explained
    return TaskSpec("t", (3,), CLASSES, targets="real"), truth + 0.7 * scores, truth


def rows_of(spec: TaskSpec, outputs: Tensor, targets: Tensor) -> tuple[Array, Array]:
    """Scores (M, C) and classes (M,), by numpy alone."""
    scores, classes = outputs.double().numpy(), targets.numpy()
    if spec.targets == "tokens":
        return scores[classes != IGNORED], classes[classes != IGNORED]
    return scores, classes.argmax(1) if spec.targets == "soft" else classes


def softmax(scores: Array) -> Array:
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def recall(made: Array, classes: Array) -> float:
    return float(np.mean([(made[classes == one] == one).mean() for one in np.unique(classes)]))


def f1(made: Array, truth: Array) -> float:
    """Of two vectors of 0 and 1: 2 TP / (2 TP + FP + FN), 0 where there is neither."""
    hit, wrong = float((made & truth).sum()), float((made != truth).sum())
    return 2 * hit / (2 * hit + wrong) if hit or wrong else 0.0


def area(scores: Array, truth: Array) -> float:
    """The probability that one of the class has the greater score, ties one half (Mann and Whitney)."""
    above = np.greater.outer(scores[truth], scores[~truth]) + 0.5 * np.equal.outer(scores[truth], scores[~truth])
    return float(above.mean())


def precision(scores: Array, truth: Array) -> float:
    """The precision at each example of the label, mean over them, from the best score on."""
    ordered = truth[np.argsort(-scores)]
    return float((np.cumsum(ordered) / np.arange(1, len(ordered) + 1))[ordered].mean())


def calibration(scores: Array, classes: Array) -> float:
    shares = softmax(scores)
    confidence, right, total = shares.max(1), shares.argmax(1) == classes, 0.0
    for place in range(15):
        inside = (confidence > place / 15) & (confidence <= (place + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return float(total)


def of_classes(measure: Callable[[Array, Array], float]) -> Callable[[TaskSpec, Tensor, Tensor], float]:
    return lambda spec, outputs, targets: float(measure(*rows_of(spec, outputs, targets)))


def of_labels(measure: Callable[[Array, Array], float]) -> Callable[[TaskSpec, Tensor, Tensor], float]:
    return lambda spec, outputs, targets: float(measure(outputs.double().numpy(), targets.numpy().astype(bool)))


def of_numbers(measure: Callable[[Array, Array], float]) -> Callable[[TaskSpec, Tensor, Tensor], float]:
    return lambda spec, outputs, targets: float(measure(targets.double().numpy(), outputs.double().numpy()))


def decided(scores: Array) -> Array:
    return scores.argmax(1)


CASES: dict[tuple[str, str], Callable[[TaskSpec, Tensor, Tensor], float]] = {
    ("perplexity", kind): of_classes(lambda scores, classes: np.exp(-np.log(softmax(scores)[range(len(classes)), classes]).mean()))
    for kind in ("classes", "tokens")
}
for _kind in ("classes", "soft", "tokens"):
    CASES |= {
        ("accuracy", _kind): of_classes(lambda scores, classes: sklearn_metrics.accuracy_score(classes, decided(scores))),
        ("top5", _kind): of_classes(
            lambda scores, classes: sklearn_metrics.top_k_accuracy_score(classes, scores, k=5, labels=range(CLASSES))
        ),
        ("balanced-accuracy", _kind): of_classes(lambda scores, classes: recall(decided(scores), classes)),
        ("macro-f1", _kind): of_classes(
            lambda scores, classes: np.mean([f1(decided(scores) == one, classes == one) for one in np.union1d(classes, decided(scores))])
        ),
        ("auc", _kind): of_classes(
            lambda scores, classes: np.mean(
                [area(softmax(scores.astype(np.float32))[:, one], classes == one) for one in np.unique(classes)]
            )
        ),
        ("ece", _kind): of_classes(calibration),
    }
CASES |= {
    ("label-accuracy", "multilabel"): of_labels(lambda scores, truth: ((scores > 0) == truth).mean()),
    ("exact-match", "multilabel"): of_labels(lambda scores, truth: sklearn_metrics.accuracy_score(truth, scores > 0)),
    ("micro-f1", "multilabel"): of_labels(lambda scores, truth: f1((scores > 0).ravel(), truth.ravel())),
    ("macro-f1", "multilabel"): of_labels(lambda scores, truth: np.mean([f1(scores[:, one] > 0, truth[:, one]) for one in range(CLASSES)])),
    ("auc", "multilabel"): of_labels(lambda scores, truth: np.mean([area(scores[:, one], truth[:, one]) for one in range(CLASSES)])),
    ("average-precision", "multilabel"): of_labels(
        lambda scores, truth: np.mean([precision(scores[:, one], truth[:, one]) for one in range(CLASSES)])
    ),
    ("mae", "real"): of_numbers(sklearn_metrics.mean_absolute_error),
    ("rmse", "real"): of_numbers(lambda truth, made: math.sqrt(sklearn_metrics.mean_squared_error(truth, made))),
    ("r2", "real"): of_numbers(lambda truth, made: sklearn_metrics.r2_score(truth[:, 1:], made[:, 1:])),
}


def measured(metric: Metric, spec: TaskSpec, outputs: Tensor, targets: Tensor, sizes: list[int]) -> float:
    """The metric, accumulated in batches of these sizes."""
    assert metric.begin is not None
    accumulator, begin = metric.begin(spec, lambda inputs: inputs), 0
    for size in sizes:
        part = slice(begin, begin + size)
        accumulator.add(outputs[part], Batch(torch.zeros(size, 3), targets[part]))
        begin += size
    assert begin == len(outputs)
    return accumulator.value()


def batches_of(count: int, seed: int) -> list[int]:
    """Sizes of batches that differ, of which the first has one example."""
    generator, sizes = np.random.default_rng(seed), [1]
    while sum(sizes) < count:
        sizes.append(min(int(generator.integers(1, 30)), count - sum(sizes)))
    return sizes


def test_each_metric_has_an_oracle_for_each_kind_of_targets() -> None:
    """Metrics of draws are in ``test_intervals.py``."""
    assert set(CASES) == {(name, kind) for name, metric in BUILT_IN.items() for kind in metric.kinds if not metric.of_samples}


@pytest.mark.parametrize(("name", "kind"), CASES, ids=lambda each: str(each))
def test_a_metric_is_that_of_its_oracle_in_one_batch_and_in_several(name: str, kind: str) -> None:
    for seed in DRAWS:
        spec, outputs, targets = draw(kind, seed)
        whole = measured(BUILT_IN[name], spec, outputs, targets, [len(outputs)])
        assert whole == pytest.approx(CASES[name, kind](spec, outputs, targets), rel=2e-5, abs=2e-6), seed
        assert whole == pytest.approx(measured(BUILT_IN[name], spec, outputs, targets, batches_of(len(outputs), seed)), rel=1e-6), seed


@pytest.mark.parametrize("kind", ["classes", "soft", "tokens", "multilabel", "real"])
def test_the_loss_of_several_batches_is_that_of_one(kind: str) -> None:
    """Also where all tokens of a batch are ignored. Oracle: the spec's own loss of all examples."""
    for seed in DRAWS:
        spec, outputs, targets = draw(kind, seed)
        whole = float(spec.loss(outputs, Batch(torch.zeros(len(outputs), 3), targets)))
        assert measured(MEASURED_LOSS, spec, outputs, targets, batches_of(len(outputs), seed)) == pytest.approx(whole, rel=1e-5)


def test_what_is_not_defined_is_nan() -> None:
    """No examples; a single class; targets that do not vary."""
    spec, outputs, targets = draw("classes", 0)
    for metric in BUILT_IN.values():
        if "classes" in metric.kinds:
            assert math.isnan(measured(metric, spec, outputs[:0], targets[:0], [])), metric.name
    assert math.isnan(measured(BUILT_IN["auc"], spec, outputs, torch.zeros_like(targets), [len(outputs)]))
    real, made, truth = draw("real", 0)
    assert math.isnan(measured(BUILT_IN["r2"], real, made, torch.ones_like(truth), [len(made)]))


# --- descriptions ---------------------------------------------------------------------------------------------------------


def test_numbers_are_shown_as_people_read_them() -> None:
    """Oracle: written by hand."""
    assert ACCURACY.text(0.97491) == "97.49 %"
    assert LOSS.text(1e-9) == "1e-09"
    assert LOSS.text(-12.34567) == "-12.35"
    assert Metric("bpc", greater=False, unit="bits").text(1.25) == "1.25 bits"
    assert (ACCURACY.label, LOSS.label, Metric("cut_size").label) == ("accuracy, %", "loss", "cut size")
    assert ACCURACY.best([0.1, 0.3, 0.2]) == 0.3
    assert LOSS.best([0.1, -0.3, 0.2]) == -0.3


def test_a_key_leads_to_its_metric() -> None:
    known = {"cut": Metric("cut", unit="edges"), "loss": LOSS}
    assert metric_of("val/b1/cut", known) is known["cut"]
    assert metric_of("test/cut_se", known) is metric_of("test/cut_draw_3", known) is metric_of("val/cut_selected", known) is known["cut"]
    assert metric_of("test/linear_probe/accuracy", known) == ACCURACY
    own = {"mean_se": Metric("mean_se", greater=False)}
    assert metric_of("test/mean_se", own) is own["mean_se"]
    assert not metric_of("val/reconstruction_loss").greater
    assert not metric_of("val/reconstruction_loss").share


def test_a_record_brings_metrics_back_in_their_order() -> None:
    metrics = [Metric("cut", unit="edges"), LOSS, BUILT_IN["ece"]]
    found = metrics_from(recorded_metrics(metrics))
    assert list(found) == ["cut", "loss", "ece"]
    assert [(each.greater, each.share, each.unit) for each in found.values()] == [
        (True, False, "edges"),
        (False, False, ""),
        (False, True, ""),
    ]
    assert metrics_from({"cut": {"greater": True}, "1": {"greater": True, "share": False}, "x": None}) == {}


def test_runs_that_do_not_say_their_metrics_are_judged_by_what_they_measured() -> None:
    """As those of version 0.1: by the accuracy, or the loss where they have none."""
    assert Run("a", "a", result={"test/accuracy": 0.5, "test/loss": 1.0}).primary == ACCURACY
    assert Run("a", "a", history=[{"epoch": 1, "val/loss": 1.0}]).primary == LOSS
    assert list(Run("a", "a", result={"test/accuracy": 0.5, "test/loss": 1.0}).measures) == ["accuracy", "loss"]


def test_scores_name_the_primary_metric_first_and_the_loss_only_where_it_counts() -> None:
    values = {"test/loss": -1.0, "test/cut": 7.0, "val/loss": -2.0}
    cut = Metric("cut")
    assert scores_in(values, "test", [cut, LOSS]) == [(cut, 7.0)]
    assert scores_in(values, "val", [cut, LOSS]) == [(LOSS, -2.0)]
    assert scores_in(values, "test", [LOSS, cut]) == [(LOSS, -1.0), (cut, 7.0)]
    assert scores_in(values, "train", [LOSS, cut]) == []


def test_names_that_cannot_be_keys_are_refused() -> None:
    for name in ("", "1st", "macro-f1", "a/b"):
        with pytest.raises(ValueError, match="cannot be named"):
            Metric(name)
    assert {"Metric"} <= set(dir(bpfree))
    assert set(KNOWN) == {"loss", "accuracy", "error", "crps", "coverage_90", "interval_width_90"}
