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
from bpfree.options import option
from bpfree.rule import Card, Metrics
from bpfree.step import Batch, Step
from bpfree.tasks.task import TaskSpec
from bpfree_noprop.base import PAPER
from bpfree_noprop.embeddings import RealEmbedding
from bpfree_noprop.schedule import standard_normal
from bpfree_noprop.timed_rules import Field, MatchingRule, TimedConfig, follow

__all__ = ["NoPropFM", "NoPropFMConfig"]


@dataclass
class NoPropFMConfig(TimedConfig):
    """Options of NoProp by flow matching."""

    spread: float = option(0.0, "deviation of z_t from the straight path (Eq. 10; the paper does not give its sigma)", ge=0)
    inference: Literal["deterministic", "flow"] = option("deterministic", "along the flow from z_0 = 0, or (the paper) from noise")
    stepper: Literal["euler", "heun"] = option("euler", "Euler's step, or Heun's with two velocities")


class NoPropFM(MatchingRule):
    """The loss (Eq. 12) is ``|v(z_t, x, t) - (u_y - z_0)|^2``, summed over d, batch mean, with ``z_t = t u_y + (1 - t) z_0 + sigma eps``.

    A learned embedding would shrink to nothing under it: the anchor ``-log p_out(y | z_t + (1 - t) v)`` (Eq. 13) is added, and is all
    that the head is for, but for reading several labels. Predicted is the class whose embedding is nearest to z_1.
    """

    Config = NoPropFMConfig
    config: NoPropFMConfig
    kinds = ("deterministic", "flow")
    card = Card(
        "NoProp by flow matching: one block learns the velocity from noise to the label's embedding",
        paper=PAPER,
        equation="z_t = t u_y + (1 - t) z_0, z_0 ~ N(0, I), t ~ U[0, 1];  "
        "L = |f(x, z_t, t) W - (u_y - z_0)|^2 [+ CE(head(z_t + (1 - t) v), y)];  inference: dz/dt = v in 1000 steps, nearest embedding",
        notes="There is one block, in which the gradient is ordinary back-propagation. The velocity is a combination of the class "
        "embeddings with unrestricted weights (no softmax). The head serves the anchor loss of learned embeddings only. Scores are minus "
        "half the squared distance to each class's embedding: compare accuracies, not losses. The paper starts from noise: inference=flow. "
        "Beyond the paper: several labels, as sums of embeddings; real targets, whitened, to which the velocity leads directly, so that "
        "inference=flow draws from p(y|x).",
    )

    def __init__(self, network: Network, spec: TaskSpec, config: NoPropFMConfig | None = None) -> None:
        super().__init__(network, spec, config)
        if self.embed.fixed:
            if self.config.head != "softmax":
                raise UsageError("with one-hot embeddings flow matching has no head", where="rule.head", fix="rule.head=softmax")
            self.head = None  # type: ignore[assignment]

    def velocity(self, outputs: Tensor) -> Tensor:
        """Return the velocity (N, d) that the block's outputs (N, m) stand for: a combination of embeddings; of real targets themselves."""
        return self.estimate(outputs) if isinstance(self.embed, RealEmbedding) else self.embed(outputs)  # type: ignore[no-any-return]

    def losses(self, batch: Batch, step: Step) -> Metrics:
        """Return the terms of Eq. 12 and 13 with one draw of time and noise per example."""
        rows = self.rows(batch)
        u = self.embed(rows)
        t, noise = self.times(u, step), step.generator_for("block")
        start = standard_normal(u, noise)
        z = torch.lerp(start, u, t[:, None])
        if self.config.spread:
            z = z + self.config.spread * standard_normal(u, noise)
        velocity = self.velocity(self.logits(batch.inputs, z, t, step))
        losses = {"block/loss": (velocity - (u - start)).pow(2).sum(1).mean()}
        if self.head is not None:
            end = z + (1 - t[:, None]) * velocity
            losses["head/loss"] = self.head_loss(end, rows)
        return losses

    def reach(self, start: Tensor, judge: Field, generator: torch.Generator, inference: str) -> Tensor:
        """Return what is read of z_1."""
        return self.nearness(follow(start, lambda z, index: self.velocity(judge(z, index)), steps=self.steps, stepper=self.config.stepper))

    def leap(self, start: Tensor, logits: Tensor) -> Tensor:
        """Return what is read of z_1 after a single step from z_0."""
        return self.nearness(start + self.velocity(logits))

    def nearness(self, z: Tensor) -> Tensor:
        """Read states (N, d) at t = 1: minus half the squared distances (N, m) of classes' embeddings, logits of labels, or real values.

        The logit of a label is how much nearer the state is to a set with it than without; with learned embeddings the head's.
        """
        if isinstance(self.embed, RealEmbedding):
            return self.shaped(self.embed.undo(z))
        if not self.embed.several:
            return -torch.cdist(z, self.embed.weight).pow(2) / 2
        return z - 0.5 if self.head is None else self.head(z, self.embed)  # type: ignore[no-any-return]
