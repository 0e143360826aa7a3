"""NoProp by flow matching: one block learns the velocity of straight paths from noise to the label's embedding.

Li, Teh, Pascanu: NoProp (arXiv 2503.24322), Eq. 10 to 13.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bpfree.errors import UsageError
from bpfree.network.network import Network
from bpfree.options import OptimizerConfig, option
from bpfree.rule import Card, Metrics, Traits
from bpfree.step import Batch, Step
from bpfree.tasks.task import TaskSpec
from bpfree_noprop.base import PAPER
from bpfree_noprop.heads import soft_cross_entropy
from bpfree_noprop.schedule import standard_normal
from bpfree_noprop.timed_rules import TimedConfig, TimedRule, follow

__all__ = ["NoPropFM", "NoPropFMConfig"]


@dataclass
class NoPropFMConfig(TimedConfig):
    """Options of NoProp by flow matching."""

    spread: float = option(0.0, "deviation of z_t from the straight path (Eq. 10; the paper does not give its sigma)", ge=0)
    inference: Literal["deterministic", "flow"] = option("deterministic", "along the flow from z_0 = 0, or (the paper) from noise")
    stepper: Literal["euler", "heun"] = option("euler", "Euler's step, or Heun's with two velocities")


class NoPropFM(TimedRule):
    """The loss (Eq. 12) is ``|v(z_t, x, t) - (u_y - z_0)|^2``, summed over d, batch mean, with ``z_t = t u_y + (1 - t) z_0 + sigma eps``.

    A learned embedding would shrink to nothing under it: the anchor ``-log p_out(y | z_t + (1 - t) v)`` (Eq. 13) is added, and is all
    that the head is for. Predicted is the class whose embedding is nearest to z_1.
    """

    Config = NoPropFMConfig
    config: NoPropFMConfig
    card = Card(
        "NoProp by flow matching: one block learns the velocity from noise to the label's embedding",
        paper=PAPER,
        equation="z_t = t u_y + (1 - t) z_0, z_0 ~ N(0, I), t ~ U[0, 1];  "
        "L = |f(x, z_t, t) W - (u_y - z_0)|^2 [+ CE(head(z_t + (1 - t) v), y)];  inference: dz/dt = v in 1000 steps, nearest embedding",
        notes="There is one block, in which the gradient is ordinary back-propagation. The velocity is a combination of the class "
        "embeddings with unrestricted weights (no softmax). The head serves the anchor loss of learned embeddings only. Scores are minus "
        "half the squared distance to each class's embedding: compare accuracies, not losses. The paper starts from noise: inference=flow.",
    )
    optimizer = OptimizerConfig("adam", lr=1e-3, weight_decay=1e-3)
    traits = Traits("independent", 0, 1, chain=False, readout=False, targets=("classes", "soft"))

    def __init__(self, network: Network, spec: TaskSpec, config: NoPropFMConfig | None = None) -> None:
        super().__init__(network, spec, config)
        if self.embed.fixed:
            if self.config.head != "softmax":
                raise UsageError("with one-hot embeddings flow matching has no head", where="rule.head", fix="rule.head=softmax")
            self.head = None

    def credit(self, batch: Batch, step: Step) -> Metrics:
        loss, parts = self.losses(batch, step)
        loss.backward()  # type: ignore[no-untyped-call]
        return {name: value.detach() for name, value in {"loss": loss, **parts}.items()}

    def objective(self, batch: Batch, step: Step) -> Tensor:
        return self.losses(batch, step)[0]

    def losses(self, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 12 and 13 with one draw of time and noise per example, and the terms."""
        rows = self.spec.target_rows(batch, self.embed.weight.dtype)
        u = self.embed(rows)
        t = torch.rand(len(u), generator=step.generator_for("time"), device=u.device, dtype=u.dtype)
        noise = step.generator_for("block")
        start = standard_normal(u, noise)
        z = torch.lerp(start, u, t[:, None])
        if self.config.spread:
            z = z + self.config.spread * standard_normal(u, noise)
        velocity = self.embed(self.logits(batch.inputs, z, t, step))
        parts = {"block/loss": (velocity - (u - start)).pow(2).sum(1).mean()}
        if self.head is not None:
            end = z + (1 - t[:, None]) * velocity
            parts["head/loss"] = soft_cross_entropy(self.head(end, self.embed), rows)
        return torch.stack(list(parts.values())).sum(), parts

    def predict(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """``-|z_1 - u_y|^2 / 2`` for each class (N, m)."""
        return self.reach(inputs, generator, self.config.inference)

    def reach(self, inputs: Tensor, generator: torch.Generator, inference: str) -> Tensor:
        """The same for one of the kinds of inference."""
        judge = self.judged(inputs)
        start = self.start(inputs, None if inference == "deterministic" else generator)
        return self.nearness(follow(start, lambda z, t: self.embed(judge(z, t)), steps=self.steps, stepper=self.config.stepper))

    def nearness(self, z: Tensor) -> Tensor:
        """Minus half the squared distances (N, m) of states (N, d) from the embeddings."""
        return -torch.cdist(z, self.embed.weight).pow(2) / 2

    def alternatives(self, inputs: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """One step over the whole way from pure noise, and the other kind of inference with the steps of a validation."""
        other = "flow" if self.config.inference == "deterministic" else "deterministic"
        with self.in_passing():
            start = self.start(inputs, generator)
            velocity = self.embed(self.judged(inputs)(start, inputs.new_zeros(())))
            return {"one_step": self.nearness(start + velocity), other: self.reach(inputs, generator, other)}
