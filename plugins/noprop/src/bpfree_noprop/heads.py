"""Output heads: what a state z of dimension d says of the target."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree_noprop.embeddings import ClassEmbedding, RealEmbedding, full_precision

__all__ = ["LabelsHead", "RadialHead", "RealHead", "SoftmaxHead", "make_head", "soft_cross_entropy"]


class SoftmaxHead(nn.Module):
    """``p(y|z)`` is the softmax of a linear map f of z (Eq. 14)."""

    def __init__(self, embed: ClassEmbedding) -> None:
        super().__init__()
        classes, dim = embed.weight.shape
        self.linear = nn.Linear(dim, classes)
        self.align(embed)

    @torch.no_grad()
    def align(self, embed: ClassEmbedding) -> None:
        """Make f rank classes by the distance of their embeddings from z: ``f_y(z) = (z u_y - |u_y|^2 / 2) / mean |u|^2``.

        From torch's usual initialisation the head needs hundreds of steps at 1e-3 before it even maps a clean one-hot
        state to its class, and until then the chain is near chance however good the blocks are.
        """
        lengths = embed.weight.pow(2).sum(1)
        self.linear.weight.copy_(embed.weight / lengths.mean())
        self.linear.bias.copy_(-lengths / (2 * lengths.mean()))

    def forward(self, z: Tensor, embed: ClassEmbedding) -> Tensor:
        """Return log-probabilities (N, m) of the state (N, d); in full precision under autocast."""
        with full_precision(z.device):
            return self.linear(z).log_softmax(1)  # type: ignore[no-any-return]

    def loss(self, z: Tensor, embed: ClassEmbedding, rows: Tensor) -> Tensor:
        """Return the batch mean of ``-log p(y|z)``, for labels as class weights ``rows`` (N, m)."""
        return soft_cross_entropy(self(z, embed), rows)


class LabelsHead(SoftmaxHead):
    """``p(Y|z)`` is the product over labels of ``sigmoid(+-f_k(z))``: f decides for each label alone whether it is in the set.

    It starts at the boundary between a state with a label's embedding and one without, as :meth:`SoftmaxHead.align` makes it.
    """

    def forward(self, z: Tensor, embed: ClassEmbedding) -> Tensor:
        """Return logits (N, m) of the state (N, d); in full precision under autocast."""
        with full_precision(z.device):
            return self.linear(z)  # type: ignore[no-any-return]

    def loss(self, z: Tensor, embed: ClassEmbedding, rows: Tensor) -> Tensor:
        """Return the batch mean of ``-log p(Y|z)``, for sets as ``rows`` (N, m) of 0 and 1."""
        return F.binary_cross_entropy_with_logits(self(z, embed), rows, reduction="sum") / len(rows)


class RadialHead(SoftmaxHead):
    """``p(y|z)`` falls with the distance of a class's embedding from a guess (Eq. 15-16; "posterior" in the paper).

    The guess is ``softmax(f(z)) W_Embed``, and ``p(y|z)`` proportional to ``exp(-|guess - u_y|^2 / (2 sigma^2))``.
    """

    def __init__(self, embed: ClassEmbedding, sigma: float) -> None:
        super().__init__(embed)
        self.sigma = sigma

    def forward(self, z: Tensor, embed: ClassEmbedding) -> Tensor:
        """Return log-probabilities (N, m) of the state (N, d); in full precision under autocast."""
        with full_precision(z.device):
            guess: Tensor = embed(self.linear(z).softmax(1))
            halved = guess @ embed.weight.T - embed.weight.pow(2).sum(1) / 2  # -|guess - u|^2 / 2, without what all classes share
            return (halved / self.sigma**2).log_softmax(1)


class RealHead(nn.Module):
    """The real target that a state stands for: z over its signal, in the target's units. Nothing in it learns.

    Attributes:
        signal: ``sqrt(abar)`` of the last state.
    """

    signal = 1.0

    def forward(self, z: Tensor, embed: RealEmbedding) -> Tensor:
        """Return the values (N, d) of the state (N, d)."""
        return embed.undo(z / self.signal)

    def loss(self, z: Tensor, embed: RealEmbedding, rows: Tensor) -> Tensor:
        """Return half the squared error of the state as whitened target, summed over d, batch mean, for targets ``rows`` (N, d)."""
        missed: Tensor = z / self.signal - embed(rows)
        return missed.pow(2).sum(1).mean() / 2


def make_head(kind: str, embed: ClassEmbedding | RealEmbedding, sigma: float) -> SoftmaxHead | RealHead:
    """Make the head of this name, or that of several labels or real targets; ``sigma`` concerns the radial head."""
    if isinstance(embed, RealEmbedding):
        return RealHead()
    if embed.several:
        return LabelsHead(embed)
    return SoftmaxHead(embed) if kind == "softmax" else RadialHead(embed, sigma)


def soft_cross_entropy(log_probabilities: Tensor, rows: Tensor) -> Tensor:
    """Return the batch mean of ``-sum_y rows_y log p_y``; both arguments are (N, m)."""
    return -(rows * log_probabilities).sum(1).mean()
