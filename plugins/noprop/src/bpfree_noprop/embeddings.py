"""What stands for a target: the row ``u_y`` of a matrix ``W_Embed`` (m, d) for class y, sums of rows, or real values themselves."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bpfree.errors import UsageError
from bpfree.tasks.task import Examples, TaskSpec

__all__ = ["ClassEmbedding", "RealEmbedding", "full_precision", "medoid", "prototypes", "state_dim", "target_size"]

FLAT = 1e-6
"""Variance, as a share of the largest, below which a direction of real targets counts as constant."""

ROWS_AT_ONCE = 512
"""Rows of a class's distance matrix that are held at a time."""


class ClassEmbedding(nn.Module):
    """``W_Embed``: the fixed identity, or a learned matrix with orthonormal rows (columns if d < m) at the start.

    A set of labels Y is embedded as ``u_Y = sum_{k in Y} u_k``. That is linear, so the best estimate of it, ``E[u_Y | x, z]``, needs the
    probability of each label alone, though labels may depend on each other: what is known of the others is in z.

    Args:
        classes: m.
        dim: d; ignored for one-hot, where d = m.
        kind: ``one-hot`` is fixed; ``learned`` and ``prototype`` are parameters, the latter filled by the rule's ``prepare``.
        several: whether an example may have several labels, or none.
    """

    weight: Tensor

    def __init__(self, classes: int, dim: int, kind: str, *, several: bool = False) -> None:
        super().__init__()
        self.fixed, self.several = kind == "one-hot", several
        if self.fixed:
            self.register_buffer("weight", torch.eye(classes), persistent=False)
        else:
            self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(classes, dim)))

    def forward(self, rows: Tensor) -> Tensor:
        """Mix the embeddings: (N, m) class weights to (N, d); in full precision under autocast."""
        rows = rows.to(self.weight.dtype)
        with full_precision(rows.device):
            return rows if self.fixed else rows @ self.weight

    def estimate(self, outputs: Tensor) -> Tensor:
        """Return ``uhat`` (N, d): embeddings weighted by the probabilities of classes, or of labels, of which outputs (N, m) are logits."""
        logits = outputs.to(self.weight.dtype)
        return self(logits.sigmoid() if self.several else logits.softmax(1))  # type: ignore[no-any-return]

    def draw(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Return the embeddings (N, d) of classes, or of sets of labels, drawn from the probabilities of which outputs are logits.

        The uniform draws (N, m) do not depend on the outputs: the largest logit with Gumbel's noise is the class.
        """
        logits = outputs.to(self.weight.dtype)
        uniform = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=logits.dtype)
        if self.several:
            return self(uniform < logits.sigmoid())  # type: ignore[no-any-return]
        return self.weight.detach()[(logits - (-uniform.log()).log()).argmax(1)]

    def doubt(self, scores: Tensor, before: Tensor | None) -> Tensor:
        """Return (N,), 0 to 1, how far scores (N, m) are from certainty: 1 less the lead of the first class, or of the closest label."""
        if self.several:
            return 1 - (2 * scores.sigmoid() - 1).abs().amin(1)
        first, second = scores.softmax(1).topk(2, dim=1).values.unbind(1)
        return 1 - (first - second)

    def scores(self, outputs: Tensor) -> Tensor:
        """Return what a prediction is made of outputs (N, m): log-probabilities of classes, or logits of labels."""
        return outputs if self.several else outputs.log_softmax(1)

    def mean(self, scores: Tensor) -> Tensor:
        """Average the probabilities of several predictions (K, N, m)."""
        return scores.sigmoid().mean(0).logit() if self.several else scores.exp().mean(0).log()


class RealEmbedding(nn.Module):
    """Real targets as their own embedding: ``u = C^(-1/2) (y - mean)`` with mean and covariance C of the training targets.

    ``C^(-1/2)`` is the symmetric root; directions in which the training targets do not vary are zero in u. Before :meth:`fit` it is the
    identity.

    Args:
        dim: d, the numbers in a target.
    """

    weight: Tensor
    back: Tensor
    centre: Tensor
    fixed = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.eye(dim))
        self.register_buffer("back", torch.eye(dim))
        self.register_buffer("centre", torch.zeros(dim))

    @torch.no_grad()
    def fit(self, targets: Tensor) -> None:
        """Take mean and covariance from training targets (N, d)."""
        values = targets.double().cpu()
        centred = values - values.mean(0)
        variance, basis = torch.linalg.eigh(centred.T @ centred / len(values))
        deviation = variance.clamp_min(0).sqrt()
        varies = variance > FLAT * variance.amax().clamp_min(torch.finfo(torch.float64).tiny)
        inverse = torch.where(varies, 1 / deviation, 0.0)
        for buffer, root in ((self.weight, inverse), (self.back, torch.where(varies, deviation, 0.0))):
            buffer.copy_(basis * root @ basis.T)
        self.centre.copy_(values.mean(0))

    def forward(self, rows: Tensor) -> Tensor:
        """Whiten targets (N, d)."""
        with full_precision(rows.device):
            return (rows.to(self.weight.dtype) - self.centre) @ self.weight

    def undo(self, u: Tensor) -> Tensor:
        """Return the targets (N, d) that whitened ones stand for."""
        with full_precision(u.device):
            return u.to(self.weight.dtype) @ self.back + self.centre

    def estimate(self, outputs: Tensor) -> Tensor:
        """Return ``uhat`` (N, d): the outputs themselves."""
        return outputs.to(self.weight.dtype)

    def doubt(self, scores: Tensor, before: Tensor | None) -> Tensor:
        """Return (N,) the largest change of values (N, d) since the block before, in units of the embedding; without one it is infinite."""
        return torch.full_like(scores[:, 0], torch.inf) if before is None else (self(scores) - self(before)).abs().amax(1)

    def scores(self, outputs: Tensor) -> Tensor:
        """Return the values (N, d) that outputs stand for."""
        return self.undo(outputs)

    def mean(self, scores: Tensor) -> Tensor:
        """Average several predictions (K, N, d)."""
        return scores.mean(0)


def full_precision(device: torch.device) -> torch.autocast:
    """Disable autocast inside, where products are small, and results are compared to within the lowest noise levels."""
    return torch.autocast(device.type, enabled=False)


def target_size(spec: TaskSpec) -> int:
    """Return m, the outputs of a block: one for each class or label, or for each number of a real target."""
    return math.prod(spec.output_size) if spec.targets == "real" else spec.outputs


def state_dim(spec: TaskSpec, kind: str, dim: int) -> int:
    """Return d: the number of classes (one-hot), ``dim`` (learned), of the scalars in an input (prototype), or in a real target."""
    return {"one-hot": target_size(spec), "learned": dim, "prototype": spec.input_size}[kind]


def prototypes(data: Examples, spec: TaskSpec, device: torch.device) -> Tensor:
    """Return for each class the medoid of its training images as the network receives them: (m, input_size).

    Raises:
        UsageError: if a class has no example.
    """
    if data.targets is None:
        raise UsageError("prototypes need labelled training data", where=f"task {spec.name}", fix="use embedding=one-hot")
    labels = data.targets if data.targets.dim() == 1 else data.targets.argmax(1)
    rows = []
    for label in range(spec.outputs):
        members = (labels == label).nonzero().flatten()
        if len(members) == 0:
            raise UsageError(f"class {label} has no training example, so no prototype", where=f"task {spec.name}")
        images = spec.normalise(data.batch(members)[0].to(device)).flatten(1)
        rows.append(images[medoid(images)])
    return torch.stack(rows)


def medoid(points: Tensor) -> Tensor:
    """Return the index of the point (n, d) whose median Euclidean distance to the others is smallest (the lower median)."""
    n = len(points)
    medians = []
    for start in range(0, n, ROWS_AT_ONCE):
        distances = torch.cdist(points[start : start + ROWS_AT_ONCE], points)
        own = torch.arange(len(distances), device=points.device)
        distances[own, own + start] = -1  # the point itself comes first, so rank n // 2 + 1 is the median of the rest
        medians.append(distances.kthvalue(n // 2 + 1, dim=1).values)
    return torch.cat(medians).argmin()
