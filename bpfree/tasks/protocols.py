"""Evaluation protocols: the quality of a rule's features, independent of its own readout.

A protocol is fitted on the features of the training split and then scores the features of other splits. What it has to choose it chooses
on the validation split, once, before the test; what it has chosen is recorded:

- ``linear-probe``: logistic (or ridge) regression, solved; it chooses its penalty (:func:`fit_linear_probe`);
- ``nearest-centroid``: the class whose mean is nearest; nothing to choose (:func:`fit_nearest_centroid`);
- ``clustering``: k-means that sees no labels, matched with the classes afterwards; nothing to choose (:func:`fit_clustering`).

Features may be larger than memory (a file that is mapped into it): all three go through them in chunks of examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bpfree.devices import with_doubles
from bpfree.tasks.linear import DEFAULT_PENALTY, LinearMap, centred, choose_penalty, classes_of, make_readout, mean_of, nearest
from bpfree.tasks.task import Split

__all__ = [
    "CLUSTERING",
    "LINEAR_PROBE",
    "NEAREST_CENTROID",
    "EvaluationProtocol",
    "FittedProbe",
    "LinearMap",
    "Score",
    "Setting",
    "clustering_accuracy",
    "fit_clustering",
    "fit_linear_probe",
    "fit_nearest_centroid",
    "result_key",
]

RESTARTS, KMEANS_LIMIT, MINI_BATCH = 10, 2**24, 1024
"""K-means: initialisations; numbers (64 MiB of float32) above which it uses mini-batches; examples of a mini-batch."""

Score = Callable[[Split], Mapping[str, float]]
"""A fitted protocol, which maps features (N, F) and targets to metrics by name, such as ``{"accuracy": 0.9}``."""


@dataclass(frozen=True)
class Setting:
    """The facts about a task that a protocol gets with the features.

    Attributes:
        classes: their number, or that of real outputs.
        seed: for what a protocol draws; a function of the run's seed and the protocol's name.
        device: the run's, where a protocol may compute; the CPU in place of one without float64.
        targets: their kind: ``classes``, ``soft`` or ``real``.
    """

    classes: int
    seed: int
    device: torch.device
    targets: str = "classes"

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", with_doubles(self.device))


@dataclass(frozen=True)
class EvaluationProtocol:
    """A registered evaluation protocol.

    Attributes:
        fit: takes the training split's features, a :class:`Setting` and the validation split's features (``None`` without one), and
            returns what scores another split's. A split's ``inputs`` are the features (N, F), float32 and on the CPU, perhaps in a
            mapped file: they are shared with other protocols and not to be overwritten, and a copy of them may not fit. ``targets``
            are classes (N,), int64, or what ``kinds`` says. The result may have two attributes, which are recorded: ``chosen``, a
            mapping of names to numbers that were chosen on validation, and ``operations``, the floating-point operations of the fit.
        summary: one line for listings.
        kinds: of targets that it can score.
    """

    fit: Callable[[Split, Setting, Split | None], Score]
    summary: str = ""
    kinds: tuple[str, ...] = ("classes",)


def result_key(name: str) -> str:
    """Return a protocol's name in metrics: ``linear-probe`` is measured as ``test/linear_probe/accuracy``."""
    return name.replace("-", "_")


# --- linear probe ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FittedProbe:
    """A fitted linear probe with its chosen penalty. Calling it on a split gives its accuracy, or its loss for real targets.

    Attributes:
        map: from features to scores.
        chosen: ``penalty``, and ``penalty_on_validation``: 1 if it was chosen there, 0 if it is the default.
        real: whether targets are real numbers.
        operations: floating-point operations of all fits, and of scoring them on validation.
    """

    map: LinearMap
    chosen: Mapping[str, float]
    real: bool = False
    operations: int = 0

    def decide(self, features: Tensor) -> Tensor:
        """Return (N,) int64: the class with the highest score."""
        return self.map.decide(features)

    def __call__(self, split: Split) -> dict[str, float]:
        return {"loss": float(self.map.losses(split).mean())} if self.real else self.map(split)


def fit_linear_probe(train: Split, setting: Setting, validation: Split | None = None) -> FittedProbe:
    """Fit the converged linear readout of standardised features: logistic regression, or ridge regression for real targets.

    :class:`~bpfree.tasks.linear.Logistic` and :class:`~bpfree.tasks.linear.Ridge` say what is solved. The penalty is chosen on
    validation by accuracy (by loss for real targets) from powers of ten; without a validation split it is 0.001.

    Args:
        train: features (N, F) and targets.
        setting: number and kind of outputs, and where to compute.
        validation: features and targets to choose the penalty by.
    """
    readout = make_readout(train, setting.targets, setting.classes, setting.device)
    fitted: dict[float, LinearMap] = {}

    def score(penalty: float) -> float:
        assert validation is not None
        fitted[penalty] = readout.fit(penalty)
        return readout.score(fitted[penalty], validation)

    if validation is None:
        chosen, best = DEFAULT_PENALTY, readout.fit(DEFAULT_PENALTY)
    else:
        chosen = choose_penalty(score).penalty
        best = fitted[chosen]
    recorded = {"penalty": chosen, "penalty_on_validation": float(validation is not None)}
    return FittedProbe(best, recorded, setting.targets == "real", readout.operations)


# --- nearest centroid -----------------------------------------------------------------------------------------------


def fit_nearest_centroid(train: Split, setting: Setting, validation: Split | None = None) -> LinearMap:
    """Fit the classifier by the nearest mean of the training features, by Euclidean distance; features as they are.

    Nothing is standardised: what the distances of the representation itself are worth is the question. A class without
    training examples is never chosen. It is scikit-learn's ``NearestCentroid``.

    Args:
        train: features (N, F) and classes (N,).
        setting: number of classes C, and where to compute.
        validation: not used: there is nothing to choose.
    """
    device, targets = setting.device, classes_of(train)
    mean = mean_of(train.inputs, device)
    sums = torch.zeros(setting.classes, train.inputs.shape[1], dtype=torch.float64, device=device)
    for place, rows in centred(train.inputs, mean):
        sums += F.one_hot(targets[place], setting.classes).to(rows).T @ rows
    counts = targets.bincount(minlength=setting.classes).to(device)
    chosen = nearest((sums / counts.clamp(min=1)[:, None]).float() + mean, mean)
    bias = chosen.bias.masked_fill(counts == 0, -torch.inf)
    return LinearMap(mean, chosen.weight, bias, operations=2 * train.inputs.numel() * setting.classes)


# --- clustering -----------------------------------------------------------------------------------------------------


def clustering_accuracy(clusters: Tensor, targets: Tensor) -> float:
    """Compute the share of examples in the class of their cluster, under the best one-to-one assignment (ACC).

    ``max_m 1/N sum_n [y_n = m(c_n)]`` over all one-to-one maps m of clusters to classes: Xie, Girshick and Farhadi,
    "Unsupervised deep embedding for clustering analysis", ICML 2016. The Hungarian algorithm finds it.

    Args:
        clusters: (N,) integers from 0.
        targets: (N,) classes, integers from 0.
    """
    from scipy.optimize import linear_sum_assignment

    rows, columns = int(clusters.max()) + 1, int(targets.max()) + 1
    table = (clusters * columns + targets).bincount(minlength=rows * columns).view(rows, columns)
    return int(table[linear_sum_assignment(table.numpy(), maximize=True)].sum()) / len(targets)


def fit_clustering(train: Split, setting: Setting, validation: Split | None = None) -> Score:
    """Cluster the training features by k-means, without labels, into as many clusters as classes; features as they are.

    scikit-learn's ``KMeans`` from 10 initialisations by k-means++, the best of which is kept; ``MiniBatchKMeans`` (1,024
    examples at a time) where the features are more than 2**24 numbers (64 MiB), so that no copy of them is made. It runs on
    one thread of the CPU, whose sums have one order: the same seed gives the same clusters.

    Another split's examples are assigned to the nearest centre, and the clusters to classes as fits that split best: the
    score is its :func:`clustering_accuracy`.

    Args:
        train: features (N, F); its targets are not used.
        setting: number of classes, seed, and where examples are assigned.
        validation: not used: there is nothing to choose.
    """
    centres = torch.from_numpy(_k_means(train.inputs.numpy(), min(setting.classes, len(train)), setting.seed)).to(setting.device)
    found = nearest(centres, centres.mean(0))
    return lambda split: {"accuracy": clustering_accuracy(found.decide(split.inputs), classes_of(split))}


def _k_means(features: np.ndarray[Any, np.dtype[np.float32]], clusters: int, seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Find the centres (clusters, F) by k-means."""
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # it has no annotations

    options = {"n_clusters": clusters, "n_init": RESTARTS, "random_state": seed % 2**32}
    small = features.size <= KMEANS_LIMIT
    model = KMeans(**options) if small else MiniBatchKMeans(**options, batch_size=MINI_BATCH, compute_labels=False)
    with threadpool_limits(1):
        model.fit(features)
    return np.asarray(model.cluster_centers_, dtype=np.float32)


LINEAR_PROBE = EvaluationProtocol(
    fit_linear_probe,
    "logistic (or ridge) regression on the features, solved; its penalty chosen on validation",
    ("classes", "soft", "real"),
)
NEAREST_CENTROID = EvaluationProtocol(fit_nearest_centroid, "the class whose mean of the features is nearest")
CLUSTERING = EvaluationProtocol(fit_clustering, "k-means on the features, its clusters matched with the classes")
