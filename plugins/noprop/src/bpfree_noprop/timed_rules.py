"""What the rules of continuous time have in common: one block for all times, and predictions in many small steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from bpfree.network.network import Network
from bpfree.options import OptimizerConfig, option
from bpfree.rule import Metrics, Traits, always
from bpfree.step import Batch, Step
from bpfree_noprop.base import TARGETS, NoPropConfig, NoPropRule, inputs_of
from bpfree_noprop.timed import TimedBlock

__all__ = ["MatchingRule", "TimedConfig", "TimedRule", "follow"]

Field = Callable[[Tensor, int], Tensor]
"""(N, d) or (N, m) of a state (N, d) at a point of a grid of times."""


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
        """Only block of the network."""
        return cast(TimedBlock, self.network.blocks["block"])

    @property
    def steps(self) -> int:
        """Number of steps of a prediction made now."""
        return int(self.config.steps if self.final_prediction else self.config.validation_steps)


class MatchingRule(TimedRule):
    """A rule that learns from one draw of time and noise per example, so without taking a step of its predictions.

    Its configuration has ``inference``, one of ``kinds``; of these ``deterministic`` starts from 0, the others from noise.
    """

    optimizer_of = always(OptimizerConfig("adam", lr=1e-3, weight_decay=1e-3))
    kinds: ClassVar[tuple[str, ...]]
    """The last of them draws from ``p(y|x)``."""

    @classmethod
    def traits_of(cls, config: Any, network: Network | None = None) -> Traits:
        """Declare the traits of one block; a stem of one's own may take any inputs."""
        return Traits("independent", 0, 1, chain=False, readout="none", targets=TARGETS, inputs=inputs_of(network), own_loss=False)

    @abstractmethod
    def losses(self, batch: Batch, step: Step) -> Metrics:
        """Return the terms of the loss, by name."""

    @abstractmethod
    def reach(self, start: Tensor, judge: Field, generator: torch.Generator, inference: str) -> Tensor:
        """Return scores (N, m) of a kind of inference from z_0 (N, d), for logits (N, m) at each point of the grid."""

    @abstractmethod
    def leap(self, start: Tensor, logits: Tensor) -> Tensor:
        """Return scores (N, m) of a single step from z_0 (N, d), given the block's logits (N, m) there."""

    def credit(self, batch: Batch, step: Step) -> Metrics:
        return self.descend(self.losses(batch, step))

    def descend(self, losses: Metrics) -> Metrics:
        """Add the gradient of the sum of these losses; return all of them."""
        total = torch.stack(list(losses.values())).sum()
        total.backward()  # type: ignore[no-untyped-call]
        return {name: value.detach() for name, value in {"loss": total, **losses}.items()}

    def objective(self, batch: Batch, step: Step) -> Tensor:
        return torch.stack(list(self.losses(batch, step).values())).sum()

    def times(self, u: Tensor, step: Step) -> Tensor:
        """Draw t ~ U[0, 1] (N,) for the examples' embeddings ``u`` (N, d)."""
        return torch.rand(len(u), generator=step.generator_for("time"), device=u.device, dtype=u.dtype)

    def logits(self, inputs: Any, z: Tensor, t: Tensor, step: Step) -> Tensor:
        """Return the block's logits (N, m) in training, at a time (N,) for each example."""
        with self.block.masks(step.generator_for, "block"):
            return self.block(inputs, z, t)  # type: ignore[no-any-return]

    def judged(self, inputs: Any) -> Field:
        """Return the block's logits (N, m) as a function of state and grid point; terms of inputs or times alone are computed now."""
        features = self.block.features(inputs)
        times = torch.linspace(0, 1, self.steps + 1, device=features.device, dtype=self.embed.weight.dtype)
        moments = self.block.moments(times).unbind()
        return lambda z, index: self.block.judge(features, z, moments[index]).to(z.dtype)

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        """Return scores (N, m), or real values of the target's shape, at t = 1."""
        return self.arrive(inputs, self.judged(inputs), generator, self.config.inference)

    @torch.no_grad()
    def sample(self, inputs: Any, draws: int, generator: torch.Generator) -> Tensor:
        """Draw from ``p(y|x)``, whatever ``inference`` is: (draws, N, ...), of normalised inputs (``spec.normalise``).

        What the block computes of inputs or times alone is computed once. Call it in eval mode.
        """
        judge = self.judged(inputs)
        return torch.stack([self.arrive(inputs, judge, generator, self.kinds[-1]) for _ in range(draws)])

    def arrive(self, inputs: Any, judge: Field, generator: torch.Generator, inference: str) -> Tensor:
        """Return scores (N, m) at t = 1 by one of the kinds of inference."""
        return self.reach(self.start(inputs, None if inference == "deterministic" else generator), judge, generator, inference)

    def alternatives(self, inputs: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Return scores of a single step from pure noise, and of the other kinds of inference with the steps of a validation."""
        with self.quick_predictions():
            judge, start = self.judged(inputs), self.start(inputs, generator)
            others = [kind for kind in self.kinds if kind != self.config.inference]
            return {"one_step": self.leap(start, judge(start, 0))} | {kind: self.arrive(inputs, judge, generator, kind) for kind in others}


def follow(z: Tensor, field: Field, *, steps: int, stepper: Literal["euler", "heun"]) -> Tensor:
    """Return the state at t = 1 of ``dz/dt = field(z, t)`` from ``z`` (N, d) at 0, in equal steps: Euler's, or Heun's second-order ones.

    ``field`` is asked at the points 0 to ``steps`` of the grid of times.
    """
    h = 1 / steps
    for now in range(steps):
        first = field(z, now)
        z = torch.add(z, first, alpha=h) if stepper == "euler" else z + h / 2 * (first + field(z + h * first, now + 1))
    return z
