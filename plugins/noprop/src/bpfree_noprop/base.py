"""What NoProp's rules have in common: embeddings of targets, a head on the last state, a stem that blocks may share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from bpfree.errors import UsageError
from bpfree.network.network import Network
from bpfree.options import option
from bpfree.rule import Rule
from bpfree.step import Batch, Step
from bpfree.tasks.task import Examples, TaskSpec
from bpfree.tasks.trees import leaves, move
from bpfree_noprop.blocks import DenoisingBlock, LabelBlock
from bpfree_noprop.embeddings import ClassEmbedding, RealEmbedding, prototypes, state_dim
from bpfree_noprop.heads import SoftmaxHead, make_head
from bpfree_noprop.schedule import standard_normal
from bpfree_noprop.stems import Stem, StemNetwork, shared_stem

__all__ = ["PAPER", "TARGETS", "NoPropConfig", "NoPropRule", "inputs_of", "learned_stem"]

TARGETS = ("classes", "soft", "multilabel", "real")
MEASURED_AT_ONCE = 1000
"""Validation examples that something is measured on at a time."""

PAPER = (
    "Li, Teh, Pascanu: NoProp: Training Neural Networks without Full Back-propagation or Full Forward-propagation. 2025, arXiv 2503.24322"
)
UNMEASURED = (
    "the residuals of the blocks were not measured, without which intervals are too narrow: give task.validation above 0, or "
    "calibration.folds"
)
"""Why a rule cannot draw real targets."""


@dataclass
class NoPropConfig:
    """Options of every rule of NoProp."""

    embedding: Literal["one-hot", "learned", "prototype"] = option(
        "one-hot", "of the classes: fixed, learned, or learned from one training image per class"
    )
    embedding_dim: int = option(20, "dimension of a learned embedding", ge=1, needs={"embedding": ("learned",)})
    head: Literal["softmax", "radial"] = option("softmax", "of the last state: a linear softmax, or by distance from the embeddings")
    sigma: float = option(0.3, "width of the radial head, in units of the embedding", gt=0, needs={"head": ("radial",)})
    draws: int = option(
        5, "draws of a random prediction that the final evaluation averages over", ge=1, unless={"inference": ("deterministic",)}
    )


def learned_stem(network: Network | None) -> Stem | None:
    """Return the stem that all blocks of a network share, if it learns."""
    stem = shared_stem(network)
    return None if stem is None or stem.frozen else stem


def inputs_of(network: Network | None) -> Literal["any", "real"]:
    """Return the trait ``inputs`` on a network: a stem of one's own may take any, the networks that come with the plugin need real ones."""
    return "any" if isinstance(network, StemNetwork) else "real"


class NoPropRule(Rule):
    """A rule on noised label embeddings: its network's blocks see an input and a state z (N, d), and return outputs (N, m).

    Outputs are logits of classes or labels, or estimates of a real target. Children: ``embed`` (:class:`ClassEmbedding` or
    :class:`RealEmbedding`) and ``head`` (``log p_out(y|z)``). A stem that the blocks share is the network's; if it learns, it is the group
    ``stem``.
    """

    config: Any
    brings_network = True
    network_kind: type[LabelBlock] = DenoisingBlock
    """The class of its blocks."""
    networks: tuple[str, str] = ("noprop-mlp", "noprop-cnn")
    """Default networks of the rule: for vectors and tiny images, and for images."""

    def __init__(self, network: Network, spec: TaskSpec, config: Any = None) -> None:
        if not isinstance(network, Network):
            raise self.misfit(type(network).__name__)
        super().__init__(network, spec, config)
        self.check_options()
        kind = self.config.embedding
        d = state_dim(spec, kind, self.config.embedding_dim)
        self.check_network(network, d)
        real = spec.targets == "real"
        self.embed = RealEmbedding(d) if real else ClassEmbedding(spec.outputs, d, kind, several=spec.targets == "multilabel")
        self.head = make_head(self.config.head, self.embed, self.config.sigma)

    def check_options(self) -> None:
        """Refuse embeddings and heads of classes for other targets.

        Raises:
            UsageError: prototypes of sets of labels, an embedding of real targets, or a radial head of either.
        """
        targets, config = self.spec.targets, self.config
        if targets not in ("multilabel", "real"):
            return
        allowed = ("one-hot",) if targets == "real" else ("one-hot", "learned")
        if config.embedding not in allowed:
            what = f"targets of kind {targets!r} have no embedding {config.embedding!r}"
            raise UsageError(what, where="rule.embedding", fix=f"rule.embedding={' or '.join(allowed)}")
        if config.head != "softmax":
            raise UsageError(f"targets of kind {targets!r} have a head of their own", where="rule.head", fix="leave rule.head out")

    def misfit(self, where: str) -> UsageError:
        """Make the error for a network, or a module, of other blocks than the rule's."""
        kind = self.network_kind
        name, made = (
            ("noprop", "bpfree_noprop.noprop_network(spec, stem=YourModule, blocks=10)")
            if kind is DenoisingBlock
            else ("noprop-timed", "bpfree.build_network('noprop-timed', spec, stem=YourModule)")
        )
        return UsageError(
            f"{type(self).__name__} needs blocks of kind {kind.__name__}, which see an input and a noised label",
            where=where,
            fix=f"network=auto; for any model network={name} network.stem=NAME (torchvision:resnet18, FILE.py:NAME, run:NAME ...); "
            f"in Python {made} makes one of any module",
        )

    def check_network(self, network: Network, d: int) -> None:
        """Refuse a network that does not fit the rule's configuration.

        Raises:
            UsageError: other blocks than the rule's, or another dimension of the noised label.
        """
        where = f"blocks: {', '.join(network.names)}"
        if not all(isinstance(block, self.network_kind) for block in network.blocks.values()):
            raise self.misfit(where)
        found = cast(LabelBlock, next(iter(network.blocks.values()))).state_dim
        if found != d:
            raise UsageError(
                f"the rule's class embeddings have {d} dimensions, the network takes noised labels of {found}",
                where="network.state_dim",
                fix=f"set network.state_dim={d}, or change rule.embedding",
            )

    @classmethod
    def network_options(cls, spec: TaskSpec, config: Any) -> dict[str, Any]:
        d = state_dim(spec, config.embedding, config.embedding_dim)
        path = {"label": "input"} if config.embedding == "prototype" else {}
        return {"name": cls.networks[spec.is_image], "state_dim": d, **path}

    @classmethod
    def specimen(cls, kind: str, depth: int, width: int) -> dict[str, Any] | None:
        """Return settings of narrow blocks on vectors; the convolutional blocks are for images of 16 pixels and more."""
        return None if kind != "dense" else {"network.name": cls.networks[0], "network.width": width, "network.depth": 1}

    @classmethod
    def shared_groups_of(cls, config: Any, network: Network | None = None) -> tuple[str, ...]:
        """Name the groups that get gradients from every block: a learned embedding, and a shared stem that learns."""
        return (() if config.embedding == "one-hot" else ("embed",)) + (("stem",) if learned_stem(network) else ())

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the groups of blocks, head and embedding, and of a shared stem that learns."""
        stem = learned_stem(self.network)
        return super().groups() | ({} if stem is None else {"stem": list(stem.parameters())})

    def compiled(self) -> Iterable[nn.Module]:
        stem = shared_stem(self.network)
        return [*self.network.blocks.values(), *([] if stem is None else [stem])]

    def plan(self) -> str:
        return self.network.plan() if isinstance(self.network, StemNetwork) else ""

    @classmethod
    def draws_of(cls, config: Any, network: Network | None = None) -> int:
        return 1 if config.inference == "deterministic" else int(config.draws)

    def freeze_features(self) -> None:
        """Keep each block's body, and a shared stem, as initialised; the blocks' last linear maps, the head and the embedding learn."""
        if stem := shared_stem(self.network):
            stem.requires_grad_(False)
        for block in self.network.blocks.values():
            cast(LabelBlock, block).freeze_body()

    def prepare(self, data: Examples, generator: torch.Generator) -> None:
        """Fill prototypes with the medoid image of each class, and let the head start from them; whiten real targets.

        Raises:
            UsageError: the file of the stem's weights is missing.
        """
        if missing := getattr(self.network, "missing", ""):
            what = "there is no such file of weights for the stem"
            raise UsageError(what, where=f"network.weights={missing}", fix="give the path of a state dict")
        if isinstance(self.embed, RealEmbedding):
            if data.targets is not None:
                self.embed.fit(data.targets.flatten(1))
            return
        if self.config.embedding == "prototype":
            with torch.no_grad():
                self.embed.weight.copy_(prototypes(data, self.spec, self.embed.weight.device))
            if isinstance(self.head, SoftmaxHead):
                self.head.align(self.embed)

    def representations(self, inputs: Tensor) -> dict[str, Tensor]:
        """Return the last hidden activities (N, H) of each block for a state z = 0, which says nothing of the label."""
        seen = self.view(inputs)
        return {name: cast(LabelBlock, block).blind(seen) for name, block in self.network.blocks.items()}

    def view(self, inputs: Any) -> Any:
        """Return what the blocks see of the inputs: the features (N, F) of a shared stem, or the inputs themselves."""
        stem = shared_stem(self.network)
        return inputs if stem is None else stem(inputs)

    @contextmanager
    def seen(self, batch: Batch, step: Step) -> Iterator[Any]:
        """Give what the blocks see of a batch in training; a shared stem that learns is executed once, and gets their gradients last."""
        stem = shared_stem(self.network)
        if stem is None or step.phase.on_features:
            yield batch.inputs
        elif not any(p.requires_grad for p in stem.parameters()):
            with torch.no_grad():
                features = stem(batch.inputs)
            yield features
        else:
            with stem.masks(step.generator_for):
                features = stem(batch.inputs)
            leaf = features.detach().requires_grad_()
            yield leaf
            if leaf.grad is not None:
                features.backward(leaf.grad)

    def features(self, inputs: Tensor) -> Tensor:
        """Return the last hidden activities of all blocks side by side, (N, sum of H), for a state z = 0."""
        return torch.cat(list(self.representations(inputs).values()), dim=1)

    def rows(self, batch: Batch) -> Tensor:
        """Return the labels as class weights (N, m): one-hot rows, soft or several labels unchanged; real targets as they are."""
        return self.spec.target_rows(batch, self.embed.weight.dtype).flatten(1)

    def estimate(self, outputs: Tensor) -> Tensor:
        """Return ``uhat`` (N, d) of a block's outputs (N, m): embeddings weighted by probabilities, or of a real target the outputs."""
        return self.embed.estimate(outputs)

    def head_loss(self, z: Tensor, rows: Tensor) -> Tensor:
        """Return the batch mean of what the head loses on states (N, d), for targets as ``rows`` (N, m)."""
        return cast(Any, self.head).loss(z, self.embed, rows)  # type: ignore[no-any-return]

    def shaped(self, scores: Tensor) -> Tensor:
        """Return scores (N, m) as they are, and real values (N, d) in the shape of the task's outputs."""
        return scores.view(-1, *self.spec.output_size) if isinstance(self.embed, RealEmbedding) else scores

    def batches(self, data: Examples, device: torch.device) -> Iterator[Batch]:
        """Iterate over all examples of a split with targets, as the network sees them."""
        for places in torch.arange(len(data)).split(MEASURED_AT_ONCE):
            raw, targets = data.batch(places)
            assert targets is not None
            yield Batch(self.spec.normalise(move(raw, device), self.network.dtype), targets.to(device))

    def start(self, inputs: Any, generator: torch.Generator | None) -> Tensor:
        """Return ``z_0`` (N, d): a draw of N(0, I), or its mean 0 without a generator."""
        weight, first = self.embed.weight, leaves(inputs)[0]
        zeros = torch.zeros(first.shape[0], weight.shape[1], device=first.device, dtype=weight.dtype)
        return zeros if generator is None else standard_normal(zeros, generator)
