"""NoProp in discrete time: T blocks, each of which learns on its own to recover a noised label from the input.

Li, Teh, Pascanu: NoProp (arXiv 2503.24322), Eq. 3, 6, 8 and Algorithm 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bpfree.network.network import Network
from bpfree.options import option
from bpfree.rule import Card, Metrics, Traits
from bpfree.step import Batch, Budget, Phase, Step
from bpfree.tasks.task import Examples, TaskSpec
from bpfree.tasks.trees import move
from bpfree_noprop.base import PAPER
from bpfree_noprop.blocks import DenoisingBlock
from bpfree_noprop.chain import ChainConfig, ChainRule
from bpfree_noprop.embeddings import RealEmbedding, full_precision
from bpfree_noprop.heads import RealHead, SoftmaxHead
from bpfree_noprop.schedule import NoiseSchedule, prior_divergence, signal_shares, standard_normal
from bpfree_noprop.spread import match_spread
from bpfree_noprop.stacked import Execution, Stack
from bpfree_noprop.stems import StemNetwork, shared_stem

__all__ = ["NoPropDT", "NoPropDTConfig"]

TARGETS = ("classes", "soft", "multilabel", "real")
CALIBRATED_AT_ONCE = 1000
"""Validation examples whose residuals are measured at a time."""


@dataclass
class NoPropDTConfig(ChainConfig):
    """Options of NoProp in discrete time."""

    eta: float = option(0.1, "weight of the denoising loss; without effect under Adam unless the embedding is learned", gt=0)
    schedule: Literal["cosine", "cosine-interior", "linear"] = option("cosine", "how the label's share of the state grows with t")
    clip: float = option(1e-4, "the share stays within [clip, 1 - clip]", gt=0, lt=0.5)
    updates: Literal["simultaneous", "sequential"] = option(
        "simultaneous", "every block learns from each batch, or (Algorithm 1) one block per pass over the data, T passes an epoch"
    )
    execution: Literal["auto", "loop", "stacked"] = option(
        "auto",
        "of simultaneous updates: blocks one after the other, or dense blocks as one by batched products, which holds all their "
        "activations; auto: as one on a CPU, where that is faster",
    )
    step_noise: Literal["residual", "paper"] = option(
        "residual",
        "of a sampled step, for real targets: c_t + a_t^2 v_t with the block's residual variance v_t, measured on validation; or c_t alone",
    )
    state: Literal["noised", "noise"] = option(
        "noised", "what a block sees beside the input: the noised label, or (a control) noise that says nothing of it, also in inference"
    )


class NoPropDT(ChainRule):
    """Blocks share nothing but the class embedding and the head; neither activations nor gradients pass between them.

    The loss (Eq. 8, squared norm summed over d, batch mean) is ``E[-log p_out(y|z_T)] + KL(q(z_0|y) || N(0, I)) +
    T/2 eta E_t[(SNR(t) - SNR(t-1)) |uhat_t(z_{t-1}, x) - u_y|^2]`` with t uniform over the blocks that learn in the phase:
    all of them make the exact expectation, one makes Algorithm 1's ``L_t``.
    """

    Config = NoPropDTConfig
    config: NoPropDTConfig
    card = Card(
        "NoProp, discrete time: each block alone learns to denoise a noised label",
        paper=PAPER,
        equation="z_{t-1} ~ N(sqrt(abar_{t-1}) u_y, 1 - abar_{t-1});  "
        "L_t = T/2 eta (SNR(t) - SNR(t-1)) |softmax(f_t(x, z_{t-1})) W - u_y|^2;  "
        "inference: z_t = a_t uhat_t + b_t z_{t-1} + sqrt(c_t) eps from z_0 ~ N(0, I)",
        notes="Inside each block the gradient is ordinary back-propagation (the title of the paper's second version says so). "
        "By default all blocks learn from each batch, which is the exact mean over t; updates=sequential is Algorithm 1. "
        "Algorithm 1 samples z_t but its loss uses z_{t-1}: we sample z_{t-1}. The paper gives no formula for its schedule: ours is the "
        "time-reversed cosine, clipped. A learned embedding is shared: its gradient goes through every block, so that through it the "
        "blocks learn from each other's weights. "
        "The paper's chain (inference=sampled, Eq. 3) draws a class from the blocks' beliefs where the mean path, our default, takes the "
        "likeliest: 0.6 to 0.7 points on digits and MNIST. The head starts as a nearest-embedding classifier. "
        "Beyond the paper: any model in blocks (network=noprop network.stem=NAME); several labels, as sums of embeddings; real targets, "
        "whitened, as their own embedding, whose sampled steps take in what a block does not know (step_noise).",
    )

    @classmethod
    def traits_of(cls, config: Any, network: Network | None = None) -> Traits:
        """Declare independent blocks, unless they share a learned embedding or stem, through which they read each other's weights.

        Without a network: one whose blocks share no stem, as all are but ``noprop`` with ``network.shared=true``.
        """
        inputs: Literal["any", "real"] = "any" if isinstance(network, StemNetwork) else "real"
        alone = Traits("independent", 0, 1, chain=False, readout="none", targets=TARGETS, inputs=inputs, own_loss=False)
        return replace(alone, dependence="all", downstream_weights="all") if cls.shared_groups_of(config, network) else alone

    def __init__(self, network: Network, spec: TaskSpec, config: NoPropDTConfig | None = None) -> None:
        super().__init__(network, spec, config)
        self.schedule = NoiseSchedule(signal_shares(self.config.schedule, self.config.T, self.config.clip))
        self.execution = Execution(self.config.execution, [block for _, block in self.denoisers()])
        if isinstance(self.head, RealHead):
            d = self.embed.weight.shape[0]
            self.head.signal = math.sqrt(float(self.schedule.abar[-1]))
            self.residuals: Tensor
            self.register_buffer("residuals", torch.zeros(self.config.T + 1, d, d))
            self.spread: Tensor
            self.register_buffer("spread", torch.ones(()))
            self.error: Tensor
            self.register_buffer("error", torch.zeros(()))

    @classmethod
    def specimen(cls, kind: str, depth: int, width: int) -> dict[str, Any] | None:
        small = super().specimen(kind, depth, width)
        # Certificates observe each block's own modules and parameters, which a stack of copies passes by.
        return small and {"rule.execution": "loop", **small}

    def plan(self) -> str:
        how = "" if self.config.updates == "sequential" else f"a step computes {self.execution}"
        return "\n".join(filter(None, [super().plan(), how]))

    @property
    def keeps_features(self) -> bool:
        """Whether training is on kept features of a frozen stem."""
        stem = shared_stem(self.network)
        return stem is not None and stem.frozen and cast(StemNetwork, self.network).keep

    @property
    def fixed_features(self) -> bool:
        return self.keeps_features

    def phases(self, budget: Budget) -> Iterable[Phase]:
        if self.config.updates == "simultaneous":
            return [replace(phase, on_features=self.keeps_features) for phase in super().phases(budget)]
        return self._block_by_block(budget.epochs)

    def features(self, inputs: Any) -> Tensor:
        """Return the features of a stem that are kept, or else the last hidden activities of all blocks side by side, for a state z = 0."""
        return cast(Tensor, self.view(inputs)) if self.keeps_features else super().features(inputs)

    def _block_by_block(self, epochs: int | None) -> Iterator[Phase]:
        shared = [name for name in ("head", "embed", "stem") if name in self.groups()]
        names = self.network.names
        for _ in itertools.count() if epochs is None else range(epochs):
            for name in names:
                yield Phase(name, epochs=1, groups=(name, *shared), evaluate=name == names[-1], on_features=self.keeps_features)

    def credit(self, batch: Batch, step: Step) -> Metrics:
        groups = step.phase.groups
        learning = [t for t, name in enumerate(self.network.names, start=1) if groups is None or name in groups]
        rows = self.rows(batch)
        metrics: Metrics = {}
        if step.fills("head"):  # the other processes of a parallel run fill other groups
            total = self.label_loss(rows, step)
            if total.requires_grad:  # that of real targets is a constant
                total.backward()  # type: ignore[no-untyped-call]
            metrics["head/loss"] = total.detach()
        filled = [t for t in learning if step.fills(f"t{t}")]
        stack = self.execution.stack(len(filled))
        with self.seen(batch, step) as inputs:
            if stack is not None:
                metrics |= self.credit_stacked(stack, inputs, rows, step)
            else:
                for t in filled:
                    loss = self.block_loss(t, inputs, rows, step, share=1 / len(learning))
                    loss.backward()  # type: ignore[no-untyped-call]
                    metrics[f"t{t}/loss"] = loss.detach()
        return {"loss": torch.stack([rows.new_zeros(()), *metrics.values()]).sum(), **metrics}

    def credit_stacked(self, stack: Stack, inputs: Tensor, rows: Tensor, step: Step) -> Metrics:
        """Take :meth:`block_loss` of all blocks and one backward pass of their sum, with the same noise."""
        T, u = self.config.T, self.embed(rows)
        states = torch.stack([self.state(t, u, step) for t in range(1, T + 1)])
        estimates = self.estimate(stack.forward(inputs, states).flatten(0, 1)).unflatten(0, (T, len(u)))
        weights = [self.weight(t, len(rows), share=1 / T) for t in range(1, T + 1)]
        losses = (estimates - u).pow(2).sum((1, 2)) * torch.tensor(weights, device=u.device, dtype=u.dtype)
        stack.backward(losses.sum())
        return {f"t{t}/loss": loss for t, loss in enumerate(losses.detach().unbind(), start=1)}

    def block_loss(self, t: int, inputs: Any, rows: Tensor, step: Step, *, share: float) -> Tensor:
        """Return block t's term of Eq. 8 with a fresh ``z_{t-1} ~ q(z_{t-1}|y)``, for targets as ``rows`` (N, m).

        ``inputs`` is what the block sees of them, and ``share`` the probability of t in the expectation.
        """
        u, block = self.embed(rows), cast(DenoisingBlock, self.network.blocks[f"t{t}"])
        z = self.state(t, u, step)
        with block.masks(step.generator_for, f"t{t}"):
            logits = block(inputs, z)
        return F.mse_loss(self.estimate(logits), u, reduction="sum") * self.weight(t, len(rows), share=share)

    def state(self, t: int, u: Tensor, step: Step) -> Tensor:
        """Return block t's state: a fresh draw of ``z_{t-1}`` for the embeddings ``u`` (N, d), or pure noise."""
        generator = step.generator_for(f"t{t}")
        return self.schedule.noised(u, t - 1, generator) if self.config.state == "noised" else standard_normal(u, generator)

    def weight(self, t: int, examples: int, *, share: float) -> float:
        """Return the weight of block t's summed squared error in the loss."""
        return share * self.config.T / 2 * self.config.eta * self.schedule.gain(t) / examples

    def label_loss(self, rows: Tensor, step: Step) -> Tensor:
        """Return the terms of Eq. 8 without blocks: the head's cross-entropy on ``z_T ~ q(z_T|y)``, and the KL divergence."""
        u = self.embed(rows)
        z = self.schedule.noised(u, self.config.T, step.generator_for("head"))
        divergence = prior_divergence(u, self.schedule.abar[0])
        return divergence if isinstance(self.embed, RealEmbedding) else cast(SoftmaxHead, self.head).loss(z, self.embed, rows) + divergence

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        """Return what the head says of the chain's end (Eq. 3), with noise or along the mean from ``z_0 = 0``.

        Log-probabilities (N, m) of classes, logits of labels, or values of the target's shape.
        """
        return self.read(self.view(inputs), generator)

    def read(self, features: Any, generator: torch.Generator) -> Tensor:
        """Predict from what the blocks see of the inputs."""
        noise = generator if self.config.inference == "sampled" else None
        z = self.start(features, noise)
        for t, block in self.denoisers():
            seen = z if self.config.state == "noised" else self.start(features, generator)
            z = self.advance(z, block(features, seen), t, noise)
        return self.shaped(self.head(z, self.embed))

    @torch.no_grad()
    def sample(self, inputs: Any, draws: int, generator: torch.Generator) -> Tensor:
        """Draw from ``p(y|x)`` by sampled chains, whatever ``inference`` is: (draws, N, ...), of normalised inputs (``spec.normalise``).

        What the blocks compute of the inputs alone is computed once. Call it in eval mode.
        """
        seen = self.view(inputs)
        views = [(t, block, block.features(seen)) for t, block in self.denoisers()]
        chains = []
        for _ in range(draws):
            z = self.start(seen, generator)
            for t, block, features in views:
                blind = z if self.config.state == "noised" else self.start(seen, generator)
                z = self.advance(z, block.judge(features, blind), t, generator)
            chains.append(self.shaped(self.head(z, self.embed)))
        return torch.stack(chains)

    def cannot_sample(self) -> str:
        unmeasured = self.config.step_noise == "residual" and self.calibrates and not bool(self.residuals.any())
        what = "the residuals of the blocks were not measured, without which intervals are too narrow: give task.validation above 0"
        return super().cannot_sample() or (f"{what}, or calibration.folds" if unmeasured else "")

    def advance(self, z: Tensor, outputs: Tensor, t: int, noise: torch.Generator | None) -> Tensor:
        """Return ``z_t`` from ``z_{t-1}`` (N, d) and the outputs of block t (Eq. 3); its mean without a generator."""
        spread = self.spread * self.residuals[t] if isinstance(self.head, RealHead) and self.config.step_noise == "residual" else None
        with full_precision(z.device):
            return self.schedule.advance(z, self.estimate(outputs), t, noise, spread)

    def shaped(self, scores: Tensor) -> Tensor:
        """Return scores (N, m) in the shape of the task's outputs."""
        return scores.view(-1, *self.spec.output_size) if isinstance(self.head, RealHead) else scores

    @property
    def calibrates(self) -> bool:
        """Whether the residuals of the blocks are measured on the validation split: of real targets."""
        return isinstance(self.head, RealHead)

    def calibrate(self, data: Examples, generator: torch.Generator) -> dict[str, float]:
        """Measure each block's residual covariance ``V_t`` (d, d), out of sample, which the noise of a sampled step takes in.

        Exact blocks have ``V_t = Cov(u | x, z_{t-1})``, so that ``N(a_t uhat + b_t z, c_t I + a_t^2 V_t)`` has the mean and covariance of
        ``z_t`` given x and ``z_{t-1}``; without the second term each step leaves out what the block does not know. What blocks that are
        not exact still leave out is made up for by one factor of all ``V_t`` (:mod:`bpfree_noprop.spread`).

        Returns:
            The mean variance of each block, of 1 for a target of which nothing is known; the squared error of the mean of draws, and the
            factor, ``spread``.
        """
        if not self.calibrates or data.targets is None:
            return {}
        sums = torch.zeros_like(self.residuals)
        for places in torch.arange(len(data)).split(CALIBRATED_AT_ONCE):
            raw, targets = data.batch(places)
            assert targets is not None
            seen = self.view(self.spec.normalise(move(raw, generator.device), self.network.dtype))
            u = self.embed(self.rows(Batch(seen, targets.to(generator.device))))
            for t, block in self.denoisers():
                z = self.schedule.noised(u, t - 1, generator) if self.config.state == "noised" else standard_normal(u, generator)
                error = self.estimate(block(seen, z)) - u
                with full_precision(u.device):
                    sums[t] += error.T @ error
        self.residuals.copy_(sums / len(data))
        measured = {f"t{t}/residual_variance": float(self.residuals[t].diagonal().mean()) for t, _ in self.denoisers()}
        if self.config.step_noise == "paper":
            return measured
        spread, error = match_spread(self, data, generator)
        self.error.fill_(error)
        return {**measured, "error": error, "spread": spread}

    def settle(self, data: Examples, generator: torch.Generator) -> dict[str, float]:
        """Match the spread of the tested blocks to the error that others have had on examples that were held out."""
        return {"spread": match_spread(self, data, generator, float(self.error))[0]} if self.config.step_noise == "residual" else {}

    def alternatives(self, inputs: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the scores of each block alone on pure noise, of their mean, and of the other kind of inference.

        A block alone gets ``z ~ N(0, I)``, which says nothing of the label. Input features are computed once per block.
        """
        other, noise = ("deterministic", None) if self.config.inference == "sampled" else ("sampled", generator)
        inputs = self.view(inputs)
        z, scores = self.start(inputs, noise), dict[str, Tensor]()
        for t, block in self.denoisers():
            features = block.features(inputs)
            blind = self.start(inputs, generator)
            scores[f"t{t}"] = self.embed.scores(block.judge(features, blind))
            seen = z if self.config.state == "noised" else blind
            z = self.advance(z, block.judge(features, seen), t, noise)
        mean = self.embed.mean(torch.stack(list(scores.values())))
        return {name: self.shaped(each) for name, each in {**scores, "mean": mean, other: self.head(z, self.embed)}.items()}
