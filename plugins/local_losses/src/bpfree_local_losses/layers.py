"""Rules in which each block has a loss of its own, whose graphs do not meet."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from bpfree import Batch, Rule, Step

__all__ = ["LossOfEachBlock"]


class LossOfEachBlock(Rule):
    """Learn from one loss after the other, so that one block's graph at a time is alive."""

    @abstractmethod
    def losses(self, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        """Yield the loss of each block, by its name, and of the readout; a block's graph must not be kept when the next loss is made."""

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        metrics: dict[str, Tensor] = {}
        for name, loss in self.losses(batch):
            metrics["loss" if name == self.network.readout else f"{name}/loss"] = loss.detach()
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
        return metrics

    def objective(self, batch: Batch, step: Step) -> Tensor:
        """Return the sum of all blocks' losses and the readout's."""
        return torch.stack([loss for _, loss in self.losses(batch)]).sum()
