"""NoProp in continuous time: one block learns to denoise at all times, along a noise schedule that is learned with it.

Li, Teh, Pascanu: NoProp (arXiv 2503.24322), Eq. 9 and Appendix B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bpfree.network.network import Network
from bpfree.options import option
from bpfree.rule import Card, Metrics
from bpfree.step import Batch, Step
from bpfree.tasks.task import TaskSpec
from bpfree_noprop.base import PAPER
from bpfree_noprop.heads import soft_cross_entropy
from bpfree_noprop.noise import LearnedSchedule, denoise, noised
from bpfree_noprop.schedule import prior_divergence
from bpfree_noprop.timed_rules import Field, MatchingRule, TimedConfig

__all__ = ["NoPropCT", "NoPropCTConfig"]


@dataclass
class NoPropCTConfig(TimedConfig):
    """Options of NoProp in continuous time."""

    eta: float = option(1.0, "weight of the denoising loss", gt=0)
    gamma_0: float = option(-3.0, "log of the noise-to-signal ratio at t = 1 before it is learned")
    gamma_1: float = option(5.0, "the same at t = 0; above gamma_0")
    inference: Literal["deterministic", "flow", "sampled"] = option(
        "deterministic", "from z_0 = 0 or (flow) noise along the probability-flow equation, or (the paper) the diffusion with its noise"
    )
    stepper: Literal["exact", "euler", "heun"] = option(
        "exact", "exact for an estimate that is constant in a step (Eq. 3), Euler's step, or Heun's with two estimates"
    )


class NoPropCT(MatchingRule):
    """The limit of many blocks that share their weights.

    The loss (Eq. 9, squared norm summed over d, batch mean, one time per example) is ``E[-log p_out(y|z_1)] + KL(q(z_0|y) || N(0, I)) +
    eta/2 E_{t ~ U[0,1]}[SNR'(t) |uhat(z_t, x, t) - u_y|^2]``. The schedule's parameters learn from all three terms.
    """

    Config = NoPropCTConfig
    config: NoPropCTConfig
    kinds = ("deterministic", "flow", "sampled")
    card = Card(
        "NoProp, continuous time: one block learns to denoise at all noise levels, whose schedule is learned",
        paper=PAPER,
        equation="z_t ~ N(sqrt(abar(t)) u_y, 1 - abar(t)), abar = sigmoid(-gamma(t));  "
        "L = CE(head(z_1), y) + KL + eta/2 SNR'(t) |softmax(f(x, z_t, t)) W - u_y|^2, t ~ U[0, 1];  "
        "inference: 1000 steps from z_0 ~ N(0, I)",
        notes="There is one block, in which the gradient is ordinary back-propagation: locality is in time, not in depth. SNR' is the "
        "schedule's derivative in closed form, and is learned too. The paper states neither the start of gamma (ours: 5 to -3) nor "
        "the frequencies of the time's embedding. Its inference is the diffusion with its noise (inference=sampled). Predictions after "
        "epochs, and the forward pass that budgets are counted in, take validation_steps; the final predictions the paper's 1000.",
    )

    def __init__(self, network: Network, spec: TaskSpec, config: NoPropCTConfig | None = None) -> None:
        super().__init__(network, spec, config)
        self.noise = LearnedSchedule(self.config.gamma_0, self.config.gamma_1)

    def losses(self, batch: Batch, step: Step) -> Metrics:
        """Return the terms of Eq. 9 with one draw of time and noise per example."""
        rows = self.rows(batch)
        u = self.embed(rows)
        t = self.times(u, step)
        gamma, slope = self.noise(t)
        z = noised(u, gamma[:, None], step.generator_for("block"))
        error = (self.estimate(self.logits(batch.inputs, z, t, step)) - u).pow(2).sum(1)
        first, last = self.noise.at_ends()
        end = noised(u, last, step.generator_for("head"))
        return {
            "block/loss": self.config.eta / 2 * (-slope * torch.exp(-gamma) * error).mean(),
            "head/loss": soft_cross_entropy(self.head(end, self.embed), rows),
            "noise/loss": prior_divergence(u, torch.sigmoid(-first)),
        }

    def reach(self, start: Tensor, judge: Field, generator: torch.Generator, inference: str) -> Tensor:
        """Return log-probabilities of the head at t = 1."""
        z = denoise(
            start,
            self.noise,
            lambda z, index: self.estimate(judge(z, index)),
            steps=self.steps,
            stepper=self.config.stepper,
            generator=generator if inference == "sampled" else None,
        )
        return self.head(z, self.embed)  # type: ignore[no-any-return]

    def leap(self, start: Tensor, logits: Tensor) -> Tensor:
        """Return log-probabilities of the block alone."""
        return logits.log_softmax(1)
