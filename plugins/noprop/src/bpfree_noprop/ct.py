"""NoProp in continuous time: one block learns to denoise at all times, along a noise schedule that is learned with it.

Li, Teh, Pascanu: NoProp (arXiv 2503.24322), Eq. 9 and Appendix B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bpfree.errors import UsageError
from bpfree.network.network import Network
from bpfree.options import option
from bpfree.rule import Card, Metrics
from bpfree.step import Batch, Step
from bpfree.tasks.task import Examples, TaskSpec
from bpfree_noprop.base import PAPER, UNMEASURED
from bpfree_noprop.heads import RealHead
from bpfree_noprop.noise import LearnedSchedule, denoise, noised
from bpfree_noprop.residuals import TimedResiduals
from bpfree_noprop.schedule import correlated, prior_divergence
from bpfree_noprop.timed_rules import Field, MatchingRule, TimedConfig
from bpfree_noprop.times import InformationTimes

__all__ = ["NoPropCT", "NoPropCTConfig"]


@dataclass
class NoPropCTConfig(TimedConfig):
    """Options of NoProp in continuous time."""

    eta: float = option(1.0, "weight of the denoising loss", gt=0)
    gamma_0: float = option(-4.0, "log of the noise-to-signal ratio at t = 1 before it is learned; that of real targets stays")
    gamma_1: float = option(5.0, "the same at t = 0; above gamma_0")
    times: Literal["information", "importance", "uniform"] = option(
        "information",
        "at which the block is trained: evenly over what there is to learn of the label, all with equal weight; the same times with the "
        "weights that make the loss that of Eq. 9; or (the paper) uniform in t, with Eq. 9's weights",
    )
    loss: Literal["squared", "cross-entropy"] = option(
        "squared",
        "of the block: squared distance of its estimate from the embedding (the paper), or cross-entropy; the schedule's is Eq. 9's",
        needs={"times": ("information",)},
    )
    inference: Literal["deterministic", "flow", "sampled"] = option(
        "deterministic", "from z_0 = 0 or (flow) noise along the probability-flow equation, or (the paper) the diffusion with its noise"
    )
    stepper: Literal["exact", "euler", "heun"] = option(
        "exact", "exact for an estimate that is constant in a step (Eq. 3), Euler's step, or Heun's with two estimates"
    )
    step_noise: Literal["residual", "paper"] = option(
        "residual",
        "of real targets: exact steps, and a last one to the target itself, take in what the block does not know, measured on validation; "
        "or the diffusion alone, read at t = 1",
    )


class NoPropCT(MatchingRule):
    """The limit of many blocks that share their weights.

    The loss (Eq. 9, squared norm summed over d, batch mean, one time per example) is ``E[-log p_out(y|z_1)] + KL(q(z_0|y) || N(0, I)) +
    eta/2 E_{t ~ U[0,1]}[SNR'(t) |uhat(z_t, x, t) - u_y|^2]``. The schedule's parameters learn from all three terms.

    With ``times=importance`` t is drawn with the density ``p(t)`` in proportion to ``SNR'(t) e(t)``, and the weight is ``SNR'(t) / p(t)``:
    the same loss, with less noise. With ``times=information`` that is the loss of the schedule alone; block and embedding learn from
    ``eta/2 E_p |uhat - u|^2``. The best estimate at a time does not depend on the weight of the time, and none is large where next to
    nothing is left to learn.

    Nothing in the loss of real targets holds the ends of the schedule, so they stay.
    """

    Config = NoPropCTConfig
    config: NoPropCTConfig
    kinds = ("deterministic", "flow", "sampled")
    card = Card(
        "NoProp, continuous time: one block learns to denoise at all noise levels, whose schedule is learned",
        paper=PAPER,
        equation="z_t ~ N(sqrt(abar(t)) u_y, 1 - abar(t)), abar = sigmoid(-gamma(t));  "
        "L = CE(head(z_1), y) + KL + eta/2 E_t[SNR'(t) |softmax(f(x, z_t, t)) W - u_y|^2];  "
        "inference: 1000 steps from z_0 ~ N(0, I)",
        notes="There is one block, in which the gradient is ordinary back-propagation: locality is in time, not in depth. SNR' is the "
        "schedule's derivative in closed form, and is learned too. The paper draws t uniformly (times=uniform), which leaves the block "
        "unsteady: we draw t in proportion to what there is to learn, SNR'(t) times the error measured so far, with equal weights. "
        "The paper states neither the start of gamma (ours: 5 to -4, where ten classes are told apart without error) nor "
        "the frequencies of the time's embedding. Its inference is the diffusion with its noise (inference=sampled). Predictions after "
        "epochs, and the forward pass that budgets are counted in, take validation_steps; the final predictions the paper's 1000. "
        "Beyond the paper: several labels, as sums of embeddings; real targets, whitened, as their own embedding.",
    )

    def __init__(self, network: Network, spec: TaskSpec, config: NoPropCTConfig | None = None) -> None:
        super().__init__(network, spec, config)
        config, real = self.config, isinstance(self.head, RealHead)
        self.noise = LearnedSchedule(config.gamma_0, config.gamma_1, fixed=real)
        self.chosen = None if config.times == "uniform" else InformationTimes()
        self.residuals: TimedResiduals | None = None
        if real and config.step_noise == "residual":
            self.residuals = TimedResiduals(lambda t: torch.sigmoid(-self.noise(t)[0]), self.embed.weight.shape[0])
        elif real:
            self.head.signal = float(torch.sigmoid(-self.noise.at_ends()[1]).sqrt())

    def check_options(self) -> None:
        """Refuse a cross-entropy of real targets.

        Raises:
            UsageError: names the option.
        """
        super().check_options()
        if self.spec.targets == "real" and self.config.loss != "squared":
            raise UsageError("real targets have no cross-entropy", where="rule.loss", fix="rule.loss=squared")

    def losses(self, batch: Batch, step: Step) -> Metrics:
        """Return the terms of Eq. 9 with one draw of time and noise per example."""
        return self.terms(batch, step)[0]

    def credit(self, batch: Batch, step: Step) -> Metrics:
        losses, t, error = self.terms(batch, step)
        if self.chosen is not None:
            self.chosen.note(t, error.detach())
        return self.descend(losses)

    def terms(self, batch: Batch, step: Step) -> tuple[Metrics, Tensor, Tensor]:
        """Return the terms of the loss, the times (N,) and the squared errors (N,) there."""
        rows = self.rows(batch)
        u = self.embed(rows)
        t, density = self.drawn(u, step)
        gamma, slope = self.noise(t)
        weight, even = -slope * torch.exp(-gamma) / density, self.config.times == "information"
        seen = scaled(gamma, weight.detach()) if even else gamma
        z = noised(u, seen[:, None], step.generator_for("block"))
        outputs = self.logits(batch.inputs, z, t, step)
        error = (self.estimate(outputs) - u).pow(2).sum(1)
        weighted = weight * error
        if even:
            missed = error if self.config.loss == "squared" else self.entropies(outputs, rows)
            weighted = missed + zero(weight) * error.detach()
        losses = {"block/loss": self.config.eta / 2 * weighted.mean()}
        if not isinstance(self.head, RealHead):
            first, last = self.noise.at_ends()
            end = noised(u, last, step.generator_for("head"))
            losses["head/loss"] = self.head_loss(end, rows)
            losses["noise/loss"] = prior_divergence(u, torch.sigmoid(-first))
        return losses, t, error

    def entropies(self, outputs: Tensor, rows: Tensor) -> Tensor:
        """Return the cross-entropies (N,) of what the block believes of classes, or of each label, for targets as ``rows`` (N, m)."""
        logits = outputs.to(rows.dtype)
        if self.spec.targets == "multilabel":
            return F.binary_cross_entropy_with_logits(logits, rows, reduction="none").sum(1)
        return F.cross_entropy(logits, rows, reduction="none")

    def drawn(self, u: Tensor, step: Step) -> tuple[Tensor, Tensor | float]:
        """Draw times (N,) for the examples' embeddings ``u`` (N, d), and return them with their densities."""
        if self.chosen is None:
            return self.times(u, step), 1.0
        return self.chosen.draw(len(u), self.noise, step.generator_for("time"))

    def reach(self, start: Tensor, judge: Field, generator: torch.Generator, inference: str) -> Tensor:
        """Return what the head says of the state at t = 1, or of the target that a last step makes of it."""
        noise, whole = generator if inference == "sampled" else None, self.residuals

        def estimate(z: Tensor, index: int) -> Tensor:
            return self.estimate(judge(z, index))

        if whole is not None:  # the state at t = 0 has some of the target in it
            start = start + torch.sigmoid(-self.noise.at_ends()[0]).sqrt() * estimate(torch.zeros_like(start), 0)
        spread, stepper = None if whole is None else whole.at, self.config.stepper
        z = denoise(start, self.noise, estimate, steps=self.steps, stepper=stepper, generator=noise, spread=spread)
        if whole is not None:
            z = estimate(z, self.steps)
            z = z if noise is None else z + correlated(z, torch.finfo(z.dtype).eps, whole.at(1.0), noise)
        return self.shaped(self.head(z, self.embed))

    def leap(self, start: Tensor, logits: Tensor) -> Tensor:
        """Return what the block says of its state."""
        return self.shaped(self.embed.scores(logits))

    def cannot_sample(self) -> str:
        unmeasured = self.residuals is not None and not bool(self.residuals.covariances.any())
        return super().cannot_sample() or (UNMEASURED if unmeasured else "")

    @property
    def calibrates(self) -> bool:
        """Whether residuals are measured on the validation split: of real targets."""
        return self.residuals is not None

    def calibrate(self, data: Examples, generator: torch.Generator) -> dict[str, float]:
        """Measure the block's residual covariance over t, out of sample, which the noise of sampled steps takes in.

        Returns:
            Its mean variance at t = 0, where the block sees next to nothing of the target, and at t = 1.
        """
        if self.residuals is None or data.targets is None:
            return {}
        found = torch.zeros_like(self.residuals.covariances)
        for batch in self.batches(data, generator.device):
            u, features = self.embed(self.rows(batch)), self.block.features(batch.inputs)

            def estimate(t: float, u: Tensor = u, features: Tensor = features) -> Tensor:
                time = torch.full_like(u[:1, 0], t)
                z = noised(u, self.noise(time)[0], generator)
                return self.estimate(self.block.judge(features, z, self.block.moments(time)))

            found += self.residuals.sums(u, estimate)
        self.residuals.covariances.copy_(found / len(data))
        ends = self.residuals.covariances.diagonal(dim1=1, dim2=2).mean(1)[[0, -1]].tolist()
        return dict(zip(("start/residual_variance", "end/residual_variance"), ends, strict=True))


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """Return x, whose gradient is multiplied by the factor."""
    return x.detach() + factor * zero(x)


def zero(x: Tensor) -> Tensor:
    """Return 0 with the gradient of x."""
    return x - x.detach()
