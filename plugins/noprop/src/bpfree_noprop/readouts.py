"""What a prediction is made of: the chain's last state, or what its blocks said, alone or along the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bpfree_noprop.embeddings import ClassEmbedding, RealEmbedding

__all__ = ["Judgements", "Readout", "another_of_its_class"]

Readout = Literal["chain", "path", "mean", "product"]


@dataclass(frozen=True)
class Judgements:
    """What all blocks say of the same inputs.

    Attributes:
        alone: outputs (N, m) of each block without a state.
        path: outputs (N, m) of each block on the state to which the blocks before it have come.
        states: ``z_0 ... z_T``, each (N, d).
    """

    alone: Sequence[Tensor]
    path: Sequence[Tensor]
    states: Sequence[Tensor]

    def read(self, readout: Readout, embed: ClassEmbedding | RealEmbedding) -> Tensor:
        """Return the scores (N, m) of a readout but the chain's, which has a head.

        ``path`` and ``mean`` are means of probabilities, of blocks on the path or alone; ``product`` is that of the blocks alone, as
        experts: the geometric mean of their probabilities, normalised.
        """
        scores = torch.stack([embed.scores(outputs) for outputs in (self.path if readout == "path" else self.alone)])
        return embed.scores(scores.mean(0)) if readout == "product" else embed.mean(scores)


def another_of_its_class(scores: Tensor) -> Tensor:
    """Return for each example (N,) the position of the next one with the same predicted class, in a circle; its own if there is no other.

    Args:
        scores: (N, m).
    """
    classes = scores.argmax(1)
    order = classes.argsort(stable=True)
    ordered = classes[order]
    first, end = torch.searchsorted(ordered, ordered), torch.searchsorted(ordered, ordered, right=True)
    following = torch.arange(1, len(order) + 1, device=order.device)
    found = torch.empty_like(order)
    found[order] = order[torch.where(following < end, following, first)]
    return found
