"""NoProp in continuous time: one block learns to denoise at all times, along a noise schedule that is learned with it.

Li, Teh, Pascanu: NoProp (arXiv 2503.24322), Eq. 9 and Appendix B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bpfree.network.network import Network
from bpfree.options import OptimizerConfig, option
from bpfree.rule import Card, Metrics, Traits
from bpfree.step import Batch, Step
from bpfree.tasks.task import TaskSpec
from bpfree_noprop.base import PAPER
from bpfree_noprop.heads import soft_cross_entropy
from bpfree_noprop.noise import LearnedSchedule, denoise
from bpfree_noprop.schedule import prior_divergence, standard_normal
from bpfree_noprop.timed_rules import TimedConfig, TimedRule

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


class NoPropCT(TimedRule):
    """The limit of many blocks that share their weights.

    The loss (Eq. 9, squared norm summed over d, batch mean, one time per example) is ``E[-log p_out(y|z_1)] + KL(q(z_0|y) || N(0, I)) +
    eta/2 E_{t ~ U[0,1]}[SNR'(t) |uhat(z_t, x, t) - u_y|^2]``. The schedule's parameters learn from all three terms.
    """

    Config = NoPropCTConfig
    config: NoPropCTConfig
    card = Card(
        "NoProp, continuous time: one block learns to denoise at all noise levels, whose schedule is learned",
        paper=PAPER,
        equation="z_t ~ N(sqrt(abar(t)) u_y, 1 - abar(t)), abar = sigmoid(-gamma(t));  "
        "L = CE(head(z_1), y) + KL + eta/2 SNR'(t) |softmax(f(x, z_t, t)) W - u_y|^2, t ~ U[0, 1];  "
        "inference: 1000 steps from z_0 ~ N(0, I)",
        notes="There is one block, in which the gradient is ordinary back-propagation: locality is in time, not in depth. SNR' comes from "
        "autograd through the schedule, and the derivative is learned too. The paper states neither the start of gamma (ours: 5 to -3) nor "
        "the frequencies of the time's embedding. Its inference is the diffusion with its noise (inference=sampled). Predictions after "
        "epochs, and the forward pass that budgets are counted in, take validation_steps; the final predictions the paper's 1000.",
    )
    optimizer = OptimizerConfig("adam", lr=1e-3, weight_decay=1e-3)
    traits = Traits("independent", 0, 1, chain=False, readout=False, targets=("classes", "soft"))

    def __init__(self, network: Network, spec: TaskSpec, config: NoPropCTConfig | None = None) -> None:
        super().__init__(network, spec, config)
        self.noise = LearnedSchedule(self.config.gamma_0, self.config.gamma_1)

    def credit(self, batch: Batch, step: Step) -> Metrics:
        loss, parts = self.losses(batch, step)
        loss.backward()  # type: ignore[no-untyped-call]
        return {name: value.detach() for name, value in {"loss": loss, **parts}.items()}

    def objective(self, batch: Batch, step: Step) -> Tensor:
        return self.losses(batch, step)[0]

    def losses(self, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 9 with one draw of time and noise per example, and its terms."""
        rows = self.spec.target_rows(batch, self.embed.weight.dtype)
        u = self.embed(rows)
        t = torch.rand(len(u), generator=step.generator_for("time"), device=u.device, dtype=u.dtype)
        gamma, slope = self.noise.with_slope(t)
        abar = torch.sigmoid(-gamma)[:, None]
        z = abar.sqrt() * u + (1 - abar).sqrt() * standard_normal(u, step.generator_for("block"))
        error = (self.estimate(self.logits(batch.inputs, z, t, step)) - u).pow(2).sum(1)
        ends = torch.sigmoid(-self.noise(t.new_tensor([0.0, 1.0])))
        last = ends[1].sqrt() * u + (1 - ends[1]).sqrt() * standard_normal(u, step.generator_for("head"))
        parts = {
            "block/loss": self.config.eta / 2 * (-slope * torch.exp(-gamma) * error).mean(),
            "head/loss": soft_cross_entropy(self.head(last, self.embed), rows),
            "noise/loss": prior_divergence(u, ends[0]),
        }
        return torch.stack(list(parts.values())).sum(), parts

    def predict(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Log-probabilities (N, m) of the head at t = 1."""
        return self.reach(inputs, generator, self.config.inference)

    def reach(self, inputs: Tensor, generator: torch.Generator, inference: str) -> Tensor:
        """The same for one of the kinds of inference."""
        judge = self.judged(inputs)
        z = denoise(
            self.start(inputs, None if inference == "deterministic" else generator),
            self.noise,
            lambda z, t: self.estimate(judge(z, t)),
            steps=self.steps,
            stepper=self.config.stepper,
            generator=generator if inference == "sampled" else None,
        )
        return self.head(z, self.embed)  # type: ignore[no-any-return]

    def alternatives(self, inputs: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The block alone on pure noise at t = 0, and the other kinds of inference with the steps of a validation."""
        kinds = [kind for kind in ("deterministic", "flow", "sampled") if kind != self.config.inference]
        with self.in_passing():
            alone = self.judged(inputs)(self.start(inputs, generator), inputs.new_zeros(()))
            return {"one_step": alone.log_softmax(1)} | {kind: self.reach(inputs, generator, kind) for kind in kinds}
