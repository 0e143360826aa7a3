"""NoProp in discrete time: T blocks, each of which learns on its own to recover a noised label from the input.

Li, Teh, Pascanu: NoProp (arXiv 2503.24322), Eq. 3, 6, 8 and Algorithm 1.
"""

from __future__ import annotations

import itertools
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
from bpfree.tasks.task import TaskSpec
from bpfree_noprop.base import PAPER
from bpfree_noprop.blocks import DenoisingBlock
from bpfree_noprop.chain import ChainConfig, ChainRule
from bpfree_noprop.heads import soft_cross_entropy
from bpfree_noprop.schedule import NoiseSchedule, prior_divergence, signal_shares, standard_normal
from bpfree_noprop.stacked import Execution, Stack

__all__ = ["NoPropDT", "NoPropDTConfig"]


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
        "likeliest: 0.6 to 0.7 points on digits and MNIST. The head starts as a nearest-embedding classifier.",
    )

    @classmethod
    def traits_of(cls, config: Any, network: Network | None = None) -> Traits:
        """Declare independent blocks; those that share a learned embedding change it for each other, and so read each other's weights."""
        alone = Traits("independent", 0, 1, chain=False, readout="none", targets=("classes", "soft"), inputs="real", own_loss=False)
        return alone if config.embedding == "one-hot" else replace(alone, dependence="all", downstream_weights="all")

    def __init__(self, network: Network, spec: TaskSpec, config: NoPropDTConfig | None = None) -> None:
        super().__init__(network, spec, config)
        self.schedule = NoiseSchedule(signal_shares(self.config.schedule, self.config.T, self.config.clip))
        self.execution = Execution(self.config.execution, [block for _, block in self.denoisers()])

    @classmethod
    def specimen(cls, kind: str, depth: int, width: int) -> dict[str, Any] | None:
        small = super().specimen(kind, depth, width)
        # Certificates observe each block's own modules and parameters, which a stack of copies passes by.
        return small and {"rule.execution": "loop", **small}

    def plan(self) -> str:
        return "" if self.config.updates == "sequential" else f"a step computes {self.execution}"

    def phases(self, budget: Budget) -> Iterable[Phase]:
        if self.config.updates == "simultaneous":
            return super().phases(budget)
        return self._block_by_block(budget.epochs)

    def _block_by_block(self, epochs: int | None) -> Iterator[Phase]:
        shared = [name for name in ("head", "embed") if list(self.get_submodule(name).parameters())]
        names = self.network.names
        for _ in itertools.count() if epochs is None else range(epochs):
            for name in names:
                yield Phase(name, epochs=1, groups=(name, *shared), evaluate=name == names[-1])

    def credit(self, batch: Batch, step: Step) -> Metrics:
        groups = step.phase.groups
        learning = [t for t, name in enumerate(self.network.names, start=1) if groups is None or name in groups]
        rows = self.rows(batch)
        metrics: Metrics = {}
        if step.fills("head"):  # the other processes of a parallel run fill other groups
            total = self.label_loss(rows, step)
            total.backward()  # type: ignore[no-untyped-call]
            metrics["head/loss"] = total.detach()
        filled = [t for t in learning if step.fills(f"t{t}")]
        stack = self.execution.stack(len(filled))
        if stack is not None:
            metrics |= self.credit_stacked(stack, batch.inputs, rows, step)
        else:
            for t in filled:
                loss = self.block_loss(t, batch.inputs, rows, step, share=1 / len(learning))
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

    def block_loss(self, t: int, inputs: Tensor, rows: Tensor, step: Step, *, share: float) -> Tensor:
        """Return block t's term of Eq. 8 with a fresh ``z_{t-1} ~ q(z_{t-1}|y)``, for labels as class weights ``rows`` (N, m).

        ``share`` is the probability of t in the expectation.
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
        return soft_cross_entropy(self.head(z, self.embed), rows) + prior_divergence(u, self.schedule.abar[0])

    def predict(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Return log-probabilities (N, m) of the head at the chain's end (Eq. 3), with noise or along the mean from ``z_0 = 0``."""
        noise = generator if self.config.inference == "sampled" else None
        z = self.start(inputs, noise)
        for t, block in self.denoisers():
            seen = z if self.config.state == "noised" else self.start(inputs, generator)
            z = self.schedule.advance(z, self.estimate(block(inputs, seen)), t, noise)
        return self.head(z, self.embed)  # type: ignore[no-any-return]

    def alternatives(self, inputs: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return log-probabilities of each block alone on pure noise, of their mean, and of the other kind of inference.

        A block alone gets ``z ~ N(0, I)``, which says nothing of the label. Input features are computed once per block.
        """
        other, noise = ("deterministic", None) if self.config.inference == "sampled" else ("sampled", generator)
        z, scores = self.start(inputs, noise), {}
        for t, block in self.denoisers():
            features = block.features(inputs)
            blind = self.start(inputs, generator)
            scores[f"t{t}"] = block.judge(features, blind).log_softmax(1)
            seen = z if self.config.state == "noised" else blind
            z = self.schedule.advance(z, self.estimate(block.judge(features, seen)), t, noise)
        mean = torch.stack(list(scores.values())).exp().mean(0).log()
        return {**scores, "mean": mean, other: self.head(z, self.embed)}
