"""Evaluation protocols: how good a rule's features are, whatever its own readout makes of them.

A protocol is fitted on the features of the training split and then scores the features of other splits. Those that ship
have nothing to tune, so that their numbers can be compared between rules:

- ``linear-probe``: multinomial logistic regression, trained to convergence (:func:`fit_linear_probe`);
- ``nearest-centroid``: the class whose mean is nearest (:func:`fit_nearest_centroid`);
- ``clustering``: k-means that sees no labels, matched with the classes afterwards (:func:`fit_clustering`).

Features may be larger than memory (a file that is mapped into it): all three go through them in chunks of examples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bpfree.errors import BpfreeError
from bpfree.tasks.task import Split

__all__ = [
    "CLUSTERING",
    "LINEAR_PROBE",
    "NEAREST_CENTROID",
    "EvaluationProtocol",
    "LinearMap",
    "Score",
    "Setting",
    "clustering_accuracy",
    "fit_clustering",
    "fit_linear_probe",
    "fit_nearest_centroid",
    "result_key",
]

logger = logging.getLogger("bpfree")

PENALTY, TOLERANCE, MOST_ITERATIONS, HISTORY = 1e-3, 1e-4, 1000, 10
"""Of the linear probe: L2 penalty, largest entry of the gradient at the end, iterations, pairs that L-BFGS remembers."""
CONSTANT = 1e-6
"""A feature whose deviation is at most this share of its mean is constant but for float32's rounding."""
CHUNK = 2**22
"""Numbers per chunk of features: 16 MiB of float32."""
RESTARTS, KMEANS_LIMIT, MINI_BATCH = 10, 2**24, 1024
"""Of k-means: initialisations; numbers (64 MiB of float32) above which it learns from mini-batches, and of how many examples."""
SHARE_OF_FREE = 0.5

Score = Callable[[Split], Mapping[str, float]]
"""What a fitted protocol is: features (N, F) and classes (N,) to metrics by name, such as ``{"accuracy": 0.9}``."""


@dataclass(frozen=True)
class Setting:
    """What a protocol is told beside the features.

    Attributes:
        classes: their number; targets are integers below it.
        seed: for what a protocol draws; a function of the run's seed and the protocol's name.
        device: the run's, where a protocol may compute.
    """

    classes: int
    seed: int
    device: torch.device


@dataclass(frozen=True)
class EvaluationProtocol:
    """A registered evaluation protocol.

    Attributes:
        fit: takes the training split's features and a :class:`Setting`, and returns what scores another split's. A split's
            ``inputs`` are the features (N, F), float32 and on the CPU, perhaps in a mapped file: they are shared with other
            protocols and not to be overwritten, and a copy of them may not fit. ``targets`` are classes (N,), int64.
        summary: one line for listings.
    """

    fit: Callable[[Split, Setting], Score]
    summary: str = ""


def result_key(name: str) -> str:
    """A protocol's name in metrics: ``linear-probe`` is measured as ``test/linear_probe/accuracy``."""
    return name.replace("-", "_")


# --- chunks ---------------------------------------------------------------------------------------------------------


def chunks(features: Tensor, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Rows of features (N, F) and where they are, on a device, so many that they hold ``CHUNK`` numbers."""
    rows = max(1, CHUNK // max(1, features.shape[1]))
    for first in range(0, len(features), rows):
        place = slice(first, min(first + rows, len(features)))
        yield place, features[place].to(device)


def centred(features: Tensor, mean: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """:func:`chunks` less the mean (F,), on its device. They share one buffer: a chunk is gone when the next one comes."""
    buffer = torch.empty(0, device=mean.device)
    for place, rows in chunks(features, mean.device):
        if not len(buffer):
            buffer = torch.empty_like(rows)
        yield place, torch.sub(rows, mean, out=buffer[: len(rows)])


def mean_of(features: Tensor, device: torch.device) -> Tensor:
    """(F,) float32, summed in float64."""
    total = torch.zeros(features.shape[1], dtype=torch.float64, device=device)
    for _, rows in chunks(features, device):
        total += rows.sum(0, dtype=torch.float64)
    return (total / len(features)).float()


def inverse_deviation(features: Tensor, mean: Tensor) -> Tensor:
    """(F,) float32: one over the deviation (of the population), and zero for features that are constant."""
    total = torch.zeros_like(mean, dtype=torch.float64)
    for _, rows in centred(features, mean):
        total += rows.square_().sum(0, dtype=torch.float64)
    deviation = (total / len(features)).sqrt().float()
    varies = deviation > CONSTANT * mean.abs()
    return torch.where(varies, 1 / torch.where(varies, deviation, 1.0), 0.0)


def near(features: Tensor, device: torch.device) -> Tensor:
    """The features on a GPU if they take at most half of its free memory; else where they are, and chunks travel."""
    if device.type == "cuda" and features.nbytes <= SHARE_OF_FREE * torch.cuda.mem_get_info(device)[0]:
        return features.to(device)
    return features


def targets_of(split: Split) -> Tensor:
    """Classes (N,) int64.

    Raises:
        BpfreeError: the split has none.
    """
    if split.targets is None or split.targets.dim() != 1 or split.targets.is_floating_point():
        raise BpfreeError("evaluation protocols score integer classes, which this split does not have")
    return split.targets.long()


@dataclass(frozen=True)
class LinearMap:
    """Scores (N, C) of features (N, F): ``(features - mean) @ weight.T + bias``. Calling it on a split gives its accuracy.

    Attributes:
        mean: (F,).
        weight: (C, F).
        bias: (C,).
    """

    mean: Tensor
    weight: Tensor
    bias: Tensor

    def decide(self, features: Tensor) -> Tensor:
        """(N,) int64, on the CPU: where the scores of features (N, F) are highest."""
        scores = (torch.addmm(self.bias, rows, self.weight.T) for _, rows in centred(features, self.mean))
        return torch.cat([part.argmax(1).cpu() for part in scores])

    def __call__(self, split: Split) -> dict[str, float]:
        hits = self.decide(split.inputs) == targets_of(split)
        return {"accuracy": int(hits.sum()) / len(split)}


def nearest(centres: Tensor, mean: Tensor) -> LinearMap:
    """The linear map whose highest score is at the nearest of some centres (C, F), by Euclidean distance.

    ``|x - c|^2 / 2 = |x - mean|^2 / 2 - (x - mean)'(c - mean) + |c - mean|^2 / 2``, of which the first term decides nothing.
    """
    weight = centres - mean
    return LinearMap(mean, weight, -0.5 * weight.double().square().sum(1).float())


# --- linear probe ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def fit_linear_probe(train: Split, setting: Setting) -> LinearMap:
    r"""Multinomial logistic regression on standardised features, trained to convergence.

    Feature f of example n becomes ``z = (x - mean) / deviation``, by the mean and the deviation (of the population) of the
    training features; a constant feature becomes 0. Then

        J(W, b) = -1/N sum_n log softmax(W z_n + b)[y_n] + penalty / 2 * sum(W ** 2),    penalty = 1e-3

    is minimised from W = 0, b = 0 by L-BFGS (10 pairs, strong Wolfe line search; Nocedal and Wright, Numerical Optimization,
    2006, ch. 3 and 7) until no entry of its gradient exceeds 1e-4, or for 1000 iterations, which is said in a warning. J is
    strictly convex in W, and the bias is determined up to a constant which moves no decision: so there is one solution, and
    nothing to tune. It is scikit-learn's ``LogisticRegression(C=1 / (penalty * N))`` after ``StandardScaler``.

    The gradient is the closed form ``(P - Y)' Z / N + penalty W``. Beside the features it takes a few chunks of 16 MiB, and
    about 30 times W for L-BFGS. Each evaluation reads all features once.

    Args:
        train: features (N, F) and classes (N,).
        setting: number of classes C, and where to compute.

    Returns:
        The probe in terms of the features as they are: its weight is ``W / deviation``.
    """
    device = setting.device
    features, targets = near(train.inputs, device), targets_of(train).to(device)
    mean = mean_of(features, device)
    scale = inverse_deviation(features, mean)
    weight = torch.zeros(setting.classes, features.shape[1], device=device)
    bias = torch.zeros(setting.classes, device=device)

    @torch.no_grad()
    def objective() -> float:
        """J, with its gradient in ``.grad``."""
        loss = torch.zeros((), dtype=torch.float64, device=device)
        by_weight, by_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        scaled = (weight * scale).T
        for place, rows in centred(features, mean):
            logs = torch.addmm(bias, rows, scaled).log_softmax(1)
            loss -= logs.gather(1, targets[place, None]).sum(dtype=torch.float64)
            error = logs.exp_() - F.one_hot(targets[place], setting.classes)
            by_weight.addmm_(error.T, rows)
            by_bias += error.sum(0)
        count = len(features)
        weight.grad = by_weight.mul_(scale / count).add_(weight, alpha=PENALTY)
        bias.grad = by_bias / count
        return float(loss / count + PENALTY / 2 * weight.double().square().sum())

    _minimise(objective, [weight, bias])
    return LinearMap(mean, weight * scale, bias)


def _minimise(objective: Callable[[], float], parameters: list[Tensor]) -> None:
    """L-BFGS in place, to the tolerance of the gradient alone: how little the objective moves says nothing of the rest."""
    solver = torch.optim.LBFGS(
        parameters,
        max_iter=MOST_ITERATIONS,
        max_eval=2 * MOST_ITERATIONS,
        tolerance_grad=TOLERANCE,
        tolerance_change=0.0,
        history_size=HISTORY,
        line_search_fn="strong_wolfe",
    )
    solver.step(objective)
    left = max(float(p.grad.abs().max()) for p in parameters if p.grad is not None)
    if not left <= TOLERANCE:
        logger.warning("the linear probe has not converged: an entry of its gradient is %.1e, more than %.0e", left, TOLERANCE)


# --- nearest centroid -----------------------------------------------------------------------------------------------


def fit_nearest_centroid(train: Split, setting: Setting) -> LinearMap:
    """The class whose mean of the training features is nearest, by Euclidean distance; features as they are.

    Nothing is standardised: what the distances of the representation itself are worth is the question. A class without
    training examples is never chosen. It is scikit-learn's ``NearestCentroid``.

    Args:
        train: features (N, F) and classes (N,).
        setting: number of classes C, and where to compute.
    """
    device, targets = setting.device, targets_of(train)
    mean = mean_of(train.inputs, device)
    sums = torch.zeros(setting.classes, train.inputs.shape[1], dtype=torch.float64, device=device)
    for place, rows in centred(train.inputs, mean):
        sums += F.one_hot(targets[place], setting.classes).to(rows).T @ rows
    counts = targets.bincount(minlength=setting.classes).to(device)
    chosen = nearest((sums / counts.clamp(min=1)[:, None]).float() + mean, mean)
    return LinearMap(mean, chosen.weight, chosen.bias.masked_fill(counts == 0, -torch.inf))


# --- clustering -----------------------------------------------------------------------------------------------------


def clustering_accuracy(clusters: Tensor, targets: Tensor) -> float:
    """The share of examples in the class that their cluster stands for, under the best one-to-one assignment (ACC).

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


def fit_clustering(train: Split, setting: Setting) -> Score:
    """K-means on the training features, without labels, with as many clusters as there are classes; features as they are.

    scikit-learn's ``KMeans`` from 10 initialisations by k-means++, the best of which is kept; ``MiniBatchKMeans`` (1,024
    examples at a time) where the features are more than 2**24 numbers (64 MiB), so that no copy of them is made. It runs on
    one thread of the CPU, whose sums have one order: the same seed gives the same clusters.

    Another split's examples are assigned to the nearest centre, and the clusters to classes as fits that split best: the
    score is its :func:`clustering_accuracy`.

    Args:
        train: features (N, F); its targets are not looked at.
        setting: number of classes, seed, and where examples are assigned.
    """
    centres = torch.from_numpy(_k_means(train.inputs.numpy(), min(setting.classes, len(train)), setting.seed)).to(setting.device)
    found = nearest(centres, centres.mean(0))
    return lambda split: {"accuracy": clustering_accuracy(found.decide(split.inputs), targets_of(split))}


def _k_means(features: np.ndarray[Any, np.dtype[np.float32]], clusters: int, seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Centres (clusters, F)."""
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # it has no annotations

    options = {"n_clusters": clusters, "n_init": RESTARTS, "random_state": seed % 2**32}
    small = features.size <= KMEANS_LIMIT
    model = KMeans(**options) if small else MiniBatchKMeans(**options, batch_size=MINI_BATCH, compute_labels=False)
    with threadpool_limits(1):
        model.fit(features)
    return np.asarray(model.cluster_centers_, dtype=np.float32)


LINEAR_PROBE = EvaluationProtocol(fit_linear_probe, "logistic regression on the features, trained to convergence")
NEAREST_CENTROID = EvaluationProtocol(fit_nearest_centroid, "the class whose mean of the features is nearest")
CLUSTERING = EvaluationProtocol(fit_clustering, "k-means on the features, its clusters matched with the classes")
