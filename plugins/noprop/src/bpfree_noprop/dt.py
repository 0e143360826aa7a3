"""NoProp in discrete time: T blocks, each of which learns on its own to recover a noised label from the input.

Li, Teh, Pascanu: NoProp (arXiv 2503.24322), Eq. 3, 6, 8 and Algorithm 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bpfree.errors import UsageError
from bpfree.network.network import Network
from bpfree.options import OptimizerConfig, option
from bpfree.rule import Card, Metrics, Rule, Traits
from bpfree.step import Batch, Budget, Phase, Step
from bpfree.tasks.task import Split, TaskSpec
from bpfree_noprop.blocks import DenoisingBlock
from bpfree_noprop.embeddings import ClassEmbedding, prototypes, state_dim
from bpfree_noprop.heads import make_head, soft_cross_entropy
from bpfree_noprop.schedule import NoiseSchedule, prior_divergence, signal_shares, standard_normal

__all__ = ["NoPropDT", "NoPropDTConfig"]


@dataclass
class NoPropDTConfig:
    """Options of NoProp in discrete time."""

    T: int = option(10, "number of blocks, which is the number of denoising steps", ge=1)
    eta: float = option(0.1, "weight of the denoising loss; without effect under Adam unless the embedding is learned", gt=0)
    schedule: Literal["cosine", "cosine-interior", "linear"] = option("cosine", "how the label's share of the state grows with t")
    clip: float = option(1e-4, "the share stays within [clip, 1 - clip]", gt=0, lt=0.5)
    embedding: Literal["one-hot", "learned", "prototype"] = option(
        "one-hot", "of the classes: fixed, learned, or learned from one training image per class"
    )
    embedding_dim: int = option(20, "dimension of a learned embedding", ge=1)
    head: Literal["softmax", "radial"] = option("softmax", "of the last state: a linear softmax, or by distance from the embeddings")
    sigma: float = option(0.3, "width of the radial head, in units of the embedding", gt=0)
    updates: Literal["simultaneous", "sequential"] = option(
        "simultaneous", "every block learns from each batch, or (Algorithm 1) one block per pass over the data, T passes an epoch"
    )
    inference: Literal["deterministic", "sampled"] = option(
        "deterministic", "the chain's mean path from z_0 = 0, or (the paper) with its noise"
    )
    draws: int = option(5, "draws of a sampled chain that the final evaluation averages over", ge=1)


class NoPropDT(Rule):
    """Blocks share nothing but the class embedding and the head; neither activations nor gradients pass between them.

    The loss (Eq. 8, squared norm summed over d, batch mean) is ``E[-log p_out(y|z_T)] + KL(q(z_0|y) || N(0, I)) +
    T/2 eta E_t[(SNR(t) - SNR(t-1)) |uhat_t(z_{t-1}, x) - u_y|^2]`` with t uniform over the blocks that learn in the phase:
    all of them make the exact expectation, one makes Algorithm 1's ``L_t``.
    """

    Config = NoPropDTConfig
    config: NoPropDTConfig
    card = Card(
        "NoProp, discrete time: each block alone learns to denoise a noised label",
        paper="Li, Teh, Pascanu: NoProp: Training Neural Networks without Full Back-propagation or Full Forward-propagation. 2025, "
        "arXiv 2503.24322",
        equation="z_{t-1} ~ N(sqrt(abar_{t-1}) u_y, 1 - abar_{t-1});  "
        "L_t = T/2 eta (SNR(t) - SNR(t-1)) |softmax(f_t(x, z_{t-1})) W - u_y|^2;  "
        "inference: z_t = a_t uhat_t + b_t z_{t-1} + sqrt(c_t) eps from z_0 ~ N(0, I)",
        notes="Inside each block the gradient is ordinary back-propagation (the title of the paper's second version says so). "
        "By default all blocks learn from each batch, which is the exact mean over t; updates=sequential is Algorithm 1. "
        "Algorithm 1 samples z_t but its loss uses z_{t-1}: we sample z_{t-1}. The paper gives no formula for its schedule: ours is the "
        "time-reversed cosine, clipped. A learned embedding is shared: updates depend on no other block, yet all move it. "
        "The paper's chain (inference=sampled, Eq. 3) draws a class from the blocks' beliefs where the mean path, our default, takes the "
        "likeliest: 0.6 to 0.7 points on digits and MNIST. The head starts as a nearest-embedding classifier.",
    )
    optimizer = OptimizerConfig("adamw", lr=1e-3, weight_decay=1e-3)

    def __init__(self, network: Network, spec: TaskSpec, config: NoPropDTConfig | None = None) -> None:
        super().__init__(network, spec, config)
        d = state_dim(spec, self.config.embedding, self.config.embedding_dim)
        check_network(network, self.config.T, d)
        self.schedule = NoiseSchedule(signal_shares(self.config.schedule, self.config.T, self.config.clip))
        self.embed = ClassEmbedding(spec.outputs, d, self.config.embedding)
        self.head = make_head(self.config.head, self.embed, self.config.sigma)

    own_network = True
    traits = Traits("independent", 0, 1, chain=False, readout=False, targets=("classes", "soft"))

    @property
    def draws(self) -> int:  # type: ignore[override]
        return self.config.draws if self.config.inference == "sampled" else 1

    @classmethod
    def network_options(cls, spec: TaskSpec, config: NoPropDTConfig) -> dict[str, Any]:
        d = state_dim(spec, config.embedding, config.embedding_dim)
        path = {"label": "input"} if config.embedding == "prototype" else {}
        return {"name": "noprop-cnn" if spec.is_image else "noprop-mlp", "blocks": config.T, "state_dim": d, **path}

    @classmethod
    def specimen(cls, kind: str, depth: int, width: int) -> dict[str, Any] | None:
        """Narrow blocks on vectors; their convolutional siblings are for images of 16 pixels and more."""
        if kind != "dense":
            return None
        return {"rule.T": depth, "network.name": "noprop-mlp", "network.blocks": depth, "network.width": width, "network.depth": 1}

    def freeze_features(self) -> None:
        """Each block's body stays as initialised; its last linear map, the head and the embedding learn."""
        for _, block in self.denoisers():
            block.freeze_body()

    def prepare(self, data: Split, generator: torch.Generator) -> None:
        """Fill prototypes with the medoid image of each class, and let the head start from them."""
        if self.config.embedding == "prototype":
            with torch.no_grad():
                self.embed.weight.copy_(prototypes(data, self.spec, self.embed.weight.device))
            self.head.align(self.embed)

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

    def denoisers(self) -> Iterator[tuple[int, DenoisingBlock]]:
        """``(t, block)`` for t = 1..T."""
        for t, block in enumerate(self.network.blocks.values(), start=1):
            yield t, cast(DenoisingBlock, block)

    def credit(self, batch: Batch, step: Step) -> Metrics:
        groups = step.phase.groups
        learning = [t for t, name in enumerate(self.network.names, start=1) if groups is None or name in groups]
        rows = self.rows(batch)
        total = self.label_loss(rows, step)
        total.backward()  # type: ignore[no-untyped-call]
        metrics = {"head/loss": total.detach()}
        for t in learning:
            loss = self.block_loss(t, batch.inputs, rows, step, share=1 / len(learning))
            loss.backward()  # type: ignore[no-untyped-call]
            metrics[f"t{t}/loss"] = loss.detach()
        return {"loss": torch.stack(list(metrics.values())).sum(), **metrics}

    def block_loss(self, t: int, inputs: Tensor, rows: Tensor, step: Step, *, share: float) -> Tensor:
        """Block t's term of Eq. 8 with a fresh ``z_{t-1} ~ q(z_{t-1}|y)``, for labels as class weights ``rows`` (N, m).

        ``share`` is the probability of t in the expectation.
        """
        u = self.embed(rows)
        z = self.schedule.noised(u, t - 1, step.generator_for(f"t{t}"))
        error = F.mse_loss(self.estimate(self.network.blocks[f"t{t}"](inputs, z)), u, reduction="sum")
        return error * (share * self.config.T / 2 * self.config.eta * self.schedule.gain(t) / len(rows))

    def label_loss(self, rows: Tensor, step: Step) -> Tensor:
        """The terms of Eq. 8 that no block takes part in: the head's cross-entropy on ``z_T ~ q(z_T|y)``, and the KL divergence."""
        u = self.embed(rows)
        z = self.schedule.noised(u, self.config.T, step.generator_for("head"))
        return soft_cross_entropy(self.head(z, self.embed), rows) + prior_divergence(u, self.schedule.abar[0])

    def rows(self, batch: Batch) -> Tensor:
        """The labels as class weights (N, m): one-hot rows, or soft labels as they are."""
        return self.spec.target_rows(batch, self.embed.weight.dtype)

    def estimate(self, logits: Tensor) -> Tensor:
        """``uhat`` (N, d): the embeddings weighted by the block's class probabilities (N, m)."""
        return self.embed(logits.softmax(1))  # type: ignore[no-any-return]

    def start(self, inputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """``z_0`` (N, d): a draw of N(0, I), or its mean 0 without a generator."""
        zeros = torch.zeros(len(inputs), self.embed.weight.shape[1], device=inputs.device, dtype=self.embed.weight.dtype)
        return zeros if generator is None else standard_normal(zeros, generator)

    def predict(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Log-probabilities (N, m) of the head at the chain's end (Eq. 3), with its noise or along its mean from ``z_0 = 0``."""
        noise = generator if self.config.inference == "sampled" else None
        z = self.start(inputs, noise)
        for t, block in self.denoisers():
            z = self.schedule.advance(z, self.estimate(block(inputs, z)), t, noise)
        return self.head(z, self.embed)  # type: ignore[no-any-return]

    def alternatives(self, inputs: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Log-probabilities of each block alone on pure noise, of their mean, and of the other kind of inference.

        A block alone gets ``z ~ N(0, I)``, which says nothing of the label. Input features are computed once per block.
        """
        other, noise = ("deterministic", None) if self.config.inference == "sampled" else ("sampled", generator)
        z, scores = self.start(inputs, noise), {}
        for t, block in self.denoisers():
            features = block.features(inputs)
            scores[f"t{t}"] = block.judge(features, self.start(inputs, generator)).log_softmax(1)
            z = self.schedule.advance(z, self.estimate(block.judge(features, z)), t, noise)
        mean = torch.stack(list(scores.values())).exp().mean(0).log()
        return {**scores, "mean": mean, other: self.head(z, self.embed)}


def check_network(network: Network, T: int, d: int) -> None:
    """Refuse a network that does not fit the rule's configuration.

    Raises:
        UsageError: other blocks than NoProp's, another number of them, or another dimension of the noised label.
    """
    where = f"blocks: {', '.join(network.names)}"
    if not all(isinstance(block, DenoisingBlock) for block in network.blocks.values()):
        raise UsageError(
            "noprop-dt needs denoising blocks, which see an input and a noised label", where=where, fix="use network=auto or noprop-mlp"
        )
    if network.names != [f"t{t}" for t in range(1, T + 1)]:
        raise UsageError(
            f"the rule has T={T} blocks, the network {len(network.blocks)}", where=where, fix=f"set network.blocks={T}, or rule.T"
        )
    found = cast(DenoisingBlock, network.blocks["t1"]).state_dim
    if found != d:
        raise UsageError(
            f"the rule's class embeddings have {d} dimensions, the network takes noised labels of {found}",
            where="network.state_dim",
            fix=f"set network.state_dim={d}, or change rule.embedding",
        )
