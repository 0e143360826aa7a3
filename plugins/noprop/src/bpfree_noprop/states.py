"""What a block sees of the label beside its input: draws of a noised label, nothing, or what blocks themselves made of the input.

The choices of ``rule.state``:

- ``noised``: a draw of ``q(z_{t-1}|y)``, the paper's.
- ``noise``: noise that says nothing of the label: blind blocks.
- ``own``: the state to which the blocks before had come when they last saw this training example; 0 before they have.
- ``crossfit``: the same, by members of these blocks that never learn from the example.
- ``analytic``: ``noised``, but the block does not have to learn what the state says, which is known in closed form (:func:`evidence`).

States of one's own are those of an earlier pass over the data, kept for each example (:class:`KeptPaths`). Within a step no block sees what
another one computes, so blocks may learn at the same time; over a run a block's states come from the weights of the blocks before it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from bpfree.tasks.trees import leaves
from bpfree_noprop.embeddings import ClassEmbedding, full_precision
from bpfree_noprop.schedule import NoiseSchedule

__all__ = ["OWN", "KeptPaths", "OwnStates", "State", "evidence"]

State = Literal["noised", "noise", "own", "crossfit", "analytic"]
OWN = ("own", "crossfit")
"""Kinds of states that blocks make themselves."""


def evidence(embed: ClassEmbedding, z: Tensor, share: float) -> Tensor:
    """Return what ``z ~ N(sqrt(abar) u_y, (1 - abar) I)`` says of each class, as logits (N, m) to be added to ``log p(y|x)``.

    ``log p(z|y)`` without what all classes share: ``(sqrt(abar) <z, u_y> - abar |u_y|^2 / 2) / (1 - abar)``. It holds where x and the
    noise are independent given y. Of labels with one-hot embeddings it is the log-odds of each.

    Args:
        embed: of the classes or labels.
        z: (N, d) states.
        share: abar.
    """
    with full_precision(z.device):
        similar: Tensor = z if embed.fixed else z @ embed.weight.T
        lengths = 1.0 if embed.fixed else embed.weight.pow(2).sum(1)
        found: Tensor = (share**0.5 * similar - share / 2 * lengths) / (1 - share)
        return found


class KeptPaths(nn.Module):
    """The states ``z_1 ... z_{T-1}`` of each training example along the mean path, as the blocks left them in their last pass.

    Args:
        T: number of blocks.
        dim: d.

    Attributes:
        states: (examples, T-1, d); no examples before :meth:`open`.
    """

    states: Tensor

    def __init__(self, T: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("states", torch.zeros(0, T - 1, dim))

    def open(self, examples: int) -> None:
        """Make room for this many examples, of which nothing is known: their states are 0."""
        self.states = self.states.new_zeros(examples, *self.states.shape[1:])

    def close(self) -> None:
        """Forget them: a trained rule does not need them."""
        self.open(0)


class OwnStates:
    """The states of a step's examples: read before any block computes; what blocks then make of them is for the next pass.

    Where the positions of the examples are not known, in loops of one's own, each state goes to the next block within the step.

    Args:
        schedule: by which estimates become states.
        kept: of earlier passes.
        indices: (N,) positions of the examples in the training split; ``None``: not known.
        start: (N, d) zeros.
    """

    def __init__(self, schedule: NoiseSchedule, kept: KeptPaths, indices: Tensor | None, start: Tensor) -> None:
        self._schedule, self._kept, self._last = schedule, kept, start
        self._indices = indices if len(kept.states) else None
        self._halves: tuple[Tensor, Tensor] | None = None
        self._known = None if self._indices is None else torch.cat([start.unsqueeze(1), kept.states[self._indices]], 1)

    @property
    def within_step(self) -> bool:
        """Whether a block's state comes from the blocks before it in this very step."""
        return self._known is None

    def before(self, t: int) -> Tensor:
        """Return ``z_{t-1}`` (N, d)."""
        return self._last if self._known is None else self._known[:, t - 1]

    def halves(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """Return the places in the batch of the examples of each half of the data; the device is waited for once a step.

        Halves go by position, or, where that is not known, by the bits of the input.
        """
        if self._halves is None:
            if self._indices is not None:
                second = self._indices % 2 == 1
            else:
                second = leaves(inputs)[0].detach().flatten(1).contiguous().view(torch.uint8).sum(1) % 2 == 1
            self._halves = (~second).nonzero().flatten(), second.nonzero().flatten()
        return self._halves

    def all(self) -> Tensor:
        """Return ``z_0 ... z_{T-1}`` (T, N, d) of an earlier pass."""
        assert self._known is not None
        return self._known.transpose(0, 1)

    @torch.no_grad()
    def after(self, t: int, estimate: Tensor) -> None:
        """Take the estimate (N, d) of block t, which makes ``z_t``."""
        z = self._schedule.advance(self.before(t), estimate, t, None)
        if self._indices is None:
            self._last = z
        elif t <= self._kept.states.shape[1]:
            self._kept.states[self._indices, t - 1] = z.to(self._kept.states.dtype)
