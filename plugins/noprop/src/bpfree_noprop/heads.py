"""Output heads: ``log p_out(y|z)`` of a state z of dimension d, for m classes."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from bpfree_noprop.embeddings import ClassEmbedding

__all__ = ["Head", "HeadName", "RadialHead", "SoftmaxHead", "make_head", "soft_cross_entropy"]

HeadName = Literal["softmax", "radial"]


class SoftmaxHead(nn.Module):
    """``p(y|z)`` is the softmax of a linear map of z (Eq. 14)."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, classes)

    def forward(self, z: Tensor, embed: ClassEmbedding) -> Tensor:
        """Log-probabilities (N, m) of the state (N, d)."""
        return self.linear(z).log_softmax(1)  # type: ignore[no-any-return]


class RadialHead(nn.Module):
    """``p(y|z)`` falls with the distance of a class's embedding from a guess (Eq. 15-16; "posterior" in the paper).

    The guess is ``softmax(f(z)) W_Embed`` with a linear f, and ``p(y|z)`` proportional to ``exp(-|guess - u_y|^2 / (2 sigma^2))``.
    """

    def __init__(self, dim: int, classes: int, sigma: float) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, classes)
        self.sigma = sigma

    def forward(self, z: Tensor, embed: ClassEmbedding) -> Tensor:
        """Log-probabilities (N, m) of the state (N, d)."""
        guess = embed(self.linear(z).softmax(1))
        distance = (guess.unsqueeze(1) - embed.weight).pow(2).sum(2)
        return (-distance / (2 * self.sigma**2)).log_softmax(1)  # type: ignore[no-any-return]


Head = SoftmaxHead | RadialHead


def make_head(kind: HeadName, dim: int, classes: int, sigma: float) -> Head:
    """The head by name; ``sigma`` concerns the radial one."""
    return SoftmaxHead(dim, classes) if kind == "softmax" else RadialHead(dim, classes, sigma)


def soft_cross_entropy(log_probabilities: Tensor, rows: Tensor) -> Tensor:
    """Mean over the batch of ``-sum_y rows_y log p_y``; both (N, m)."""
    return -(rows * log_probabilities).sum(1).mean()
