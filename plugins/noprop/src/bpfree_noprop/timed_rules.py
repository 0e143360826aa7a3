"""What the rules of continuous time have in common: one block for all times, and predictions in many small steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from bpfree.options import option
from bpfree.step import Step
from bpfree_noprop.base import NoPropConfig, NoPropRule
from bpfree_noprop.timed import TimedBlock

__all__ = ["TimedConfig", "TimedRule", "follow"]

Field = Callable[[Tensor, Tensor], Tensor]
"""(N, d) of a state (N, d) and a time ()."""


@dataclass
class TimedConfig(NoPropConfig):
    """Options of the rules of continuous time."""

    steps: int = option(1000, "of the final predictions, from t = 0 to 1 (T of the paper)", ge=1)
    validation_steps: int = option(20, "of the predictions after epochs", ge=1)


class TimedRule(NoPropRule):
    """A rule whose network is one :class:`TimedBlock`."""

    network_kind = TimedBlock
    networks = ("noprop-timed-mlp", "noprop-timed-cnn")

    @property
    def block(self) -> TimedBlock:
        """The one of the network."""
        return cast(TimedBlock, self.network.blocks["block"])

    @property
    def steps(self) -> int:
        """Of a prediction made now."""
        return int(self.config.steps if self.final else self.config.validation_steps)

    def logits(self, inputs: Tensor, z: Tensor, t: Tensor, step: Step) -> Tensor:
        """The block's logits (N, m) in training, at a time (N,) for each example."""
        with self.block.masks(step.generator_for("block/dropout")):
            return self.block(inputs, z, t)  # type: ignore[no-any-return]

    def judged(self, inputs: Tensor) -> Field:
        """The block's logits (N, m) as a function of state and time; the inputs' features are computed now, once."""
        features = self.block.features(inputs)
        return lambda z, t: self.block.judge(features, z, t)


def follow(z: Tensor, field: Field, *, steps: int, stepper: Literal["euler", "heun"]) -> Tensor:
    """The state at t = 1 of ``dz/dt = field(z, t)`` from ``z`` (N, d) at 0, in equal steps: Euler's, or Heun's of second order."""
    h = 1 / steps
    times = torch.linspace(0, 1, steps + 1, device=z.device, dtype=z.dtype).unbind()
    for now, then in itertools.pairwise(times):
        first = field(z, now)
        z = z + h * first if stepper == "euler" else z + h / 2 * (first + field(z + h * first, then))
    return z
