"""Linear readouts of features that are solved rather than trained: logistic regression, ridge regression, nearest means.

Features are standardised by their training split. Each readout has one number to choose, the penalty of its weights, from powers of ten
(:func:`choose_penalty`), and for each penalty one solution. Features may be larger than memory (a file that is mapped into it): all go
through them in chunks of examples.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bpfree.devices import with_doubles
from bpfree.errors import BpfreeError
from bpfree.tasks.task import Split

__all__ = [
    "DEFAULT_PENALTY",
    "Choice",
    "LinearMap",
    "Logistic",
    "Readout",
    "Ridge",
    "centred",
    "choose_penalty",
    "chunks",
    "classes_of",
    "make_readout",
    "mean_of",
    "nearest",
]

logger = logging.getLogger("bpfree")

DEFAULT_PENALTY = 1e-3
"""Penalty of the weights if there is no validation split to choose it on."""
GRID = (1e-1, 1e-2, 1e-3, 1e-4)
"""Penalties that are always tried, the strongest first: each solution starts from the one before."""
WEAKEST, STRONGEST = 1e-8, 1e4
TOLERANCE, MOST_ITERATIONS, HISTORY = 1e-4, 1000, 10
"""Largest entry of the gradient at the end, iterations of L-BFGS, and pairs that it remembers."""
CONSTANT = 1e-6
"""A feature whose deviation is at most this share of its mean is constant but for float32's rounding."""
CHUNK = 2**22
"""Numbers per chunk of features: 16 MiB of float32."""
SHARE_OF_FREE = 0.5


# --- chunks ---------------------------------------------------------------------------------------------------------


def chunks(features: Tensor, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Iterate over rows of features (N, F) and where they are, on a device, in pieces of ``CHUNK`` numbers."""
    rows = max(1, CHUNK // max(1, features.shape[1]))
    for first in range(0, len(features), rows):
        place = slice(first, min(first + rows, len(features)))
        yield place, features[place].to(device)


def centred(features: Tensor, mean: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Iterate over :func:`chunks` minus the mean (F,), on its device; they share one buffer, which the next chunk overwrites."""
    buffer = torch.empty(0, device=mean.device)
    for place, rows in chunks(features, mean.device):
        if not len(buffer):
            buffer = torch.empty_like(rows)
        yield place, torch.sub(rows, mean, out=buffer[: len(rows)])


def mean_of(features: Tensor, device: torch.device) -> Tensor:
    """Average features (N, F) to (F,) float32, summed in float64."""
    total = torch.zeros(features.shape[1], dtype=torch.float64, device=device)
    for _, rows in chunks(features, device):
        total += rows.sum(0, dtype=torch.float64)
    return (total / len(features)).float()


def inverse_deviation(features: Tensor, mean: Tensor) -> Tensor:
    """Return (F,) float32: one over the deviation (of the population), and zero for features that are constant."""
    total = torch.zeros_like(mean, dtype=torch.float64)
    for _, rows in centred(features, mean):
        total += rows.square_().sum(0, dtype=torch.float64)
    deviation = (total / len(features)).sqrt().float()
    varies = deviation > CONSTANT * mean.abs()
    return torch.where(varies, 1 / torch.where(varies, deviation, 1.0), 0.0)


def near(features: Tensor, device: torch.device) -> Tensor:
    """Move features to a GPU if they take at most half of its free memory; else they stay, and chunks travel."""
    if device.type == "cuda" and features.nbytes <= SHARE_OF_FREE * torch.cuda.mem_get_info(device)[0]:
        return features.to(device)
    return features


def classes_of(split: Split) -> Tensor:
    """Return classes (N,) int64; of soft labels their largest entry.

    Raises:
        BpfreeError: the split has none.
    """
    targets = split.targets
    if targets is not None and targets.dim() == 2 and targets.is_floating_point():
        return targets.argmax(1)
    if targets is None or targets.dim() != 1 or targets.is_floating_point():
        raise BpfreeError("this readout scores classes, which this split does not have")
    return targets.long()


# --- a linear map ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearMap:
    """Scores (N, C) of features (N, F): ``(features - mean) @ weight.T + bias``. Calling it on a split gives its accuracy.

    Attributes:
        mean: (F,).
        weight: (C, F).
        bias: (C,).
        operations: floating-point operations of its fit, where they were counted.
    """

    mean: Tensor
    weight: Tensor
    bias: Tensor
    operations: int = 0

    def scores(self, features: Tensor) -> Iterator[Tensor]:
        """Iterate over the scores of features (N, F), chunk by chunk, on the map's device."""
        return (torch.addmm(self.bias, rows, self.weight.T) for _, rows in centred(features, self.mean))

    def decide(self, features: Tensor) -> Tensor:
        """Return (N,) int64, on the CPU: where the scores of features (N, F) are highest."""
        return torch.cat([part.argmax(1).cpu() for part in self.scores(features)])

    def correct(self, split: Split) -> Tensor:
        """Return (N,) bool: whether each example of a split is decided as its class."""
        return self.decide(split.inputs) == classes_of(split)

    def losses(self, split: Split) -> Tensor:
        """Return (N,) half the squared error of each example, summed over outputs, for real targets."""
        assert split.targets is not None
        outputs = torch.cat([part.cpu() for part in self.scores(split.inputs)])
        return 0.5 * (outputs - split.targets.reshape(len(split), -1).float()).square().sum(1)

    def __call__(self, split: Split) -> dict[str, float]:
        return {"accuracy": int(self.correct(split).sum()) / len(split)}


def nearest(centres: Tensor, mean: Tensor) -> LinearMap:
    """Make the linear map whose highest score is at the nearest of some centres (C, F), by Euclidean distance.

    ``|x - c|^2 / 2 = |x - mean|^2 / 2 - (x - mean)'(c - mean) + |c - mean|^2 / 2``, of which the first term decides nothing.
    """
    weight = centres - mean
    return LinearMap(mean, weight, -0.5 * weight.double().square().sum(1).float())


# --- readouts with a penalty ----------------------------------------------------------------------------------------


class Readout(ABC):
    """Linear readouts of one training split's standardised features, one for each penalty.

    Args:
        train: features (N, F) and targets.
        outputs: number of classes C, or of real outputs.
        device: where to compute.

    Attributes:
        worst: largest entry of a gradient that any solution was left with.
        operations: floating-point operations of all fits and scores so far. They follow from the sizes: products with the features,
            and the factorisations of ridge regression, with two for each multiplication and addition. Counting them while they are
            done (``counted_operations``) would take about twelve times as long as the fit.
    """

    def __init__(self, train: Split, outputs: int, device: torch.device) -> None:
        self.features, self.outputs, self.device = near(train.inputs, device), outputs, device
        self.mean = mean_of(self.features, device)
        self.scale = inverse_deviation(self.features, self.mean)
        self.worst = 0.0
        self.operations = 0

    @abstractmethod
    def fit(self, penalty: float) -> LinearMap:
        """Solve for a penalty; the map is in terms of the features as they are."""

    def score(self, fitted: LinearMap, split: Split) -> float:
        """Score a solution on a split, greater is better: the accuracy (0 to 1), or minus the mean loss."""
        self.operations += self._product(len(split))
        return self._score(fitted, split)

    @abstractmethod
    def _score(self, fitted: LinearMap, split: Split) -> float: ...

    def _product(self, examples: int) -> int:
        """Count the operations of one product of n examples' features with a weight matrix."""
        return 2 * examples * self.features.shape[1] * self.outputs


class Logistic(Readout):
    r"""Multinomial logistic regression, for classes or soft labels.

    Feature f of example n becomes ``z = (x - mean) / deviation``, by the mean and the deviation (of the population) of the
    training features; a constant feature becomes 0. Then

        J(W, b) = -1/N sum_n sum_c y_nc log softmax(W z_n + b)_c + penalty / 2 * sum(W ** 2)

    is minimised by L-BFGS (10 pairs, strong Wolfe line search; Nocedal and Wright, Numerical Optimization, 2006, ch. 3 and 7) until no
    entry of its gradient exceeds 1e-4. Rounding may end the search before that: then it continues in float64. 1000 iterations without
    success are reported in a warning. J is strictly convex in W, and the bias is determined up to a constant which moves no decision:
    so there is one solution, wherever the search begins. It is scikit-learn's ``LogisticRegression(C=1 / (penalty * N))`` after
    ``StandardScaler``.

    The gradient is the closed form ``(P - Y)' Z / N + penalty W``. Beside the features it takes a few chunks of 16 MiB, and
    about 30 times W for L-BFGS. Each evaluation reads all features once.
    """

    def __init__(self, train: Split, outputs: int, device: torch.device) -> None:
        super().__init__(train, outputs, device)
        assert train.targets is not None
        self._soft = train.targets.dim() == 2
        self._targets = (train.targets.float() if self._soft else classes_of(train)).to(device)
        self._weight = torch.zeros(outputs, self.features.shape[1], device=device)
        self._bias = torch.zeros(outputs, device=device)

    @torch.no_grad()
    def fit(self, penalty: float) -> LinearMap:
        """Solve for a penalty, from the solution before."""
        for dtype in (torch.float32, torch.float64):
            self._weight, self._bias = self._weight.to(dtype), self._bias.to(dtype)
            left = _minimise(lambda: self._objective(penalty), [self._weight, self._bias])
            if left <= TOLERANCE:
                break
        self._weight, self._bias = self._weight.float(), self._bias.float()
        self.worst = max(self.worst, left)
        if not left <= TOLERANCE:
            logger.warning("logistic regression has not converged: an entry of its gradient is %.1e, more than %.0e", left, TOLERANCE)
        return LinearMap(self.mean, self._weight * self.scale, self._bias.clone())

    @torch.no_grad()
    def _objective(self, penalty: float) -> float:
        """Compute J at the weights in their dtype, with its gradient in ``.grad``."""
        weight, bias, count = self._weight, self._bias, len(self.features)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        by_weight, by_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        scaled = (weight * self.scale).T
        self.operations += 2 * self._product(count)
        for place, chunk in centred(self.features, self.mean):
            rows = chunk.to(weight.dtype)
            logs = torch.addmm(bias, rows, scaled).log_softmax(1)
            targets = self._targets[place]
            if self._soft:
                loss -= (logs * targets).sum(dtype=torch.float64)
                error = logs.exp_() - targets
            else:
                loss -= logs.gather(1, targets[:, None]).sum(dtype=torch.float64)
                error = logs.exp_() - F.one_hot(targets, self.outputs)
            by_weight.addmm_(error.T, rows)
            by_bias += error.sum(0)
        weight.grad = by_weight.mul_(self.scale / count).add_(weight, alpha=penalty)
        bias.grad = by_bias / count
        return float(loss / count + penalty / 2 * weight.double().square().sum())

    def _score(self, fitted: LinearMap, split: Split) -> float:
        return fitted(split)["accuracy"]


class Ridge(Readout):
    r"""Linear regression with a quadratic penalty, for real targets.

    On the standardised features of :class:`Logistic`, ``J(W, b) = 1/2N sum_n |W z_n + b - y_n|^2 + penalty / 2 * sum(W ** 2)`` is
    solved by its normal equations in float64: ``(Z'Z / N + penalty I) W' = Z'Y / N`` with centred targets. It is scikit-learn's
    ``Ridge(alpha=penalty * N)`` after ``StandardScaler``.
    """

    @torch.no_grad()
    def __init__(self, train: Split, outputs: int, device: torch.device) -> None:
        super().__init__(train, outputs, device)
        assert train.targets is not None
        targets = train.targets.reshape(len(train), -1).double().to(device)
        width, count = self.features.shape[1], len(train)
        self._bias = targets.mean(0)
        self.operations += 2 * count * width**2 + self._product(count)
        self._gram = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._cross = torch.zeros(width, targets.shape[1], dtype=torch.float64, device=device)
        for place, rows in centred(self.features, self.mean):
            z = rows.double() * self.scale
            self._gram.addmm_(z.T, z, alpha=1 / count)
            self._cross.addmm_(z.T, targets[place] - self._bias, alpha=1 / count)

    @torch.no_grad()
    def fit(self, penalty: float) -> LinearMap:
        """Solve for a penalty."""
        system = self._gram + penalty * torch.eye(len(self._gram), dtype=torch.float64, device=self.device)
        weight = torch.linalg.solve(system, self._cross)
        self.operations += 2 * len(system) ** 3 // 3 + 2 * self._product(len(system))  # the LU factors, two triangles, the check below
        self.worst = max(self.worst, float((system @ weight - self._cross).abs().max()))
        return LinearMap(self.mean, weight.T.float() * self.scale, self._bias.float())

    def _score(self, fitted: LinearMap, split: Split) -> float:
        return -float(fitted.losses(split).mean())


def make_readout(train: Split, targets: str, outputs: int, device: torch.device) -> Readout:
    """Make the readout for a kind of targets: :class:`Ridge` for ``real``, :class:`Logistic` for ``classes`` and ``soft``."""
    return (Ridge if targets == "real" else Logistic)(train, outputs, with_doubles(device))


def _minimise(objective: Callable[[], float], parameters: list[Tensor]) -> float:
    """Minimise by L-BFGS in place, to the tolerance of the gradient alone: the objective's decrease does not bound the error."""
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
    return max(float(p.grad.abs().max()) for p in parameters if p.grad is not None)


# --- the choice -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """A penalty that validation has chosen.

    Attributes:
        penalty: the best; of equals the strongest.
        scores: of each penalty that was tried.
    """

    penalty: float
    scores: Mapping[float, float]

    @property
    def at_edge(self) -> bool:
        """Whether the penalty lies at an end of the grid of sensible penalties."""
        return self.penalty in (min(self.scores), max(self.scores))


def choose_penalty(score: Callable[[float], float]) -> Choice:
    """Choose a penalty from powers of ten, 0.1 to 0.0001; the grid is extended as long as the best lies at its edge.

    Args:
        score: of a penalty on validation, greater is better; called from strong to weak, so that each solution is near the last.
    """
    scores = {penalty: score(penalty) for penalty in GRID}
    while True:
        best = max(sorted(scores, reverse=True), key=scores.__getitem__)
        if best == min(scores) and best > 1.5 * WEAKEST:
            further = _tenfold(best, -1)
        elif best == max(scores) and best < STRONGEST / 1.5:
            further = _tenfold(best, 1)
        else:
            return Choice(best, scores)
        scores[further] = score(further)


def _tenfold(penalty: float, by: int) -> float:
    """Return the next power of ten, without the rounding error of a product."""
    return float(f"1e{round(torch.log10(torch.tensor(penalty)).item()) + by}")
