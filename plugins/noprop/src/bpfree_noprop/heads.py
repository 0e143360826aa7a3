"""Output heads: ``log p_out(y|z)`` of a state z of dimension d, for m classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bpfree_noprop.embeddings import ClassEmbedding, full_precision

__all__ = ["RadialHead", "SoftmaxHead", "make_head", "soft_cross_entropy"]


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


def make_head(kind: str, embed: ClassEmbedding, sigma: float) -> SoftmaxHead:
    """Make the head of this name; ``sigma`` concerns the radial head."""
    return SoftmaxHead(embed) if kind == "softmax" else RadialHead(embed, sigma)


def soft_cross_entropy(log_probabilities: Tensor, rows: Tensor) -> Tensor:
    """Return the batch mean of ``-sum_y rows_y log p_y``; both arguments are (N, m)."""
    return -(rows * log_probabilities).sum(1).mean()
