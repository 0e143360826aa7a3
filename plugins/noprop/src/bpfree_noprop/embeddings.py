"""Class embeddings: the row ``u_y`` of a matrix ``W_Embed`` (m, d) stands for class y."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bpfree.errors import UsageError
from bpfree.tasks.task import Examples, TaskSpec

__all__ = ["ClassEmbedding", "full_precision", "medoid", "prototypes", "state_dim"]

ROWS_AT_ONCE = 512
"""Rows of a class's distance matrix that are held at a time."""


class ClassEmbedding(nn.Module):
    """``W_Embed``: the fixed identity, or a learned matrix with orthonormal rows (columns if d < m) at the start.

    Args:
        classes: m.
        dim: d; ignored for one-hot, where d = m.
        kind: ``one-hot`` is fixed; ``learned`` and ``prototype`` are parameters, the latter filled by the rule's ``prepare``.
    """

    weight: Tensor

    def __init__(self, classes: int, dim: int, kind: str) -> None:
        super().__init__()
        self.fixed = kind == "one-hot"
        if self.fixed:
            self.register_buffer("weight", torch.eye(classes), persistent=False)
        else:
            self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(classes, dim)))

    def forward(self, rows: Tensor) -> Tensor:
        """Mix the embeddings: (N, m) class weights to (N, d); in full precision under autocast."""
        rows = rows.to(self.weight.dtype)
        with full_precision(rows.device):
            return rows if self.fixed else rows @ self.weight


def full_precision(device: torch.device) -> torch.autocast:
    """Disable autocast inside, where products are small, and results are compared to within the lowest noise levels."""
    return torch.autocast(device.type, enabled=False)


def state_dim(spec: TaskSpec, kind: str, dim: int) -> int:
    """Return d: the number of classes (one-hot), ``dim`` (learned), or of the scalars in an input (prototype)."""
    return {"one-hot": spec.outputs, "learned": dim, "prototype": spec.input_size}[kind]


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
