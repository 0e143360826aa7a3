"""What NoProp's rules have in common: class embeddings, a head on the last state, labels as class weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from bpfree.errors import UsageError
from bpfree.network.network import Network
from bpfree.options import option
from bpfree.rule import Rule
from bpfree.step import Batch
from bpfree.tasks.task import Examples, TaskSpec
from bpfree_noprop.blocks import DenoisingBlock, LabelBlock
from bpfree_noprop.embeddings import ClassEmbedding, prototypes, state_dim
from bpfree_noprop.heads import SoftmaxHead, make_head
from bpfree_noprop.schedule import standard_normal

__all__ = ["PAPER", "NoPropConfig", "NoPropRule"]

PAPER = (
    "Li, Teh, Pascanu: NoProp: Training Neural Networks without Full Back-propagation or Full Forward-propagation. 2025, arXiv 2503.24322"
)


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


class NoPropRule(Rule):
    """A rule on noised label embeddings: its network's blocks see an input and a state z (N, d), and return class logits.

    Children: ``embed`` (:class:`ClassEmbedding`) and ``head`` (``log p_out(y|z)``).
    """

    config: Any
    brings_network = True
    network_kind: type[LabelBlock] = DenoisingBlock
    """The class of its blocks."""
    networks: tuple[str, str] = ("noprop-mlp", "noprop-cnn")
    """Default networks of the rule: for vectors and tiny images, and for images."""

    def __init__(self, network: Network, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        d = state_dim(spec, self.config.embedding, self.config.embedding_dim)
        self.check_network(network, d)
        self.embed = ClassEmbedding(spec.outputs, d, self.config.embedding)
        self.head = make_head(self.config.head, self.embed, self.config.sigma)

    def check_network(self, network: Network, d: int) -> None:
        """Refuse a network that does not fit the rule's configuration.

        Raises:
            UsageError: other blocks than the rule's, or another dimension of the noised label.
        """
        where = f"blocks: {', '.join(network.names)}"
        if not all(type(block) is self.network_kind for block in network.blocks.values()):
            raise UsageError(
                f"{type(self).__name__} needs blocks of kind {self.network_kind.__name__}, which see an input and a noised label",
                where=where,
                fix=f"use network=auto or {self.networks[0]}",
            )
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
        """Name the groups that get gradients from every block: a learned embedding."""
        return () if config.embedding == "one-hot" else ("embed",)

    @classmethod
    def draws_of(cls, config: Any, network: Network | None = None) -> int:
        return 1 if config.inference == "deterministic" else int(config.draws)

    def freeze_features(self) -> None:
        """Keep each block's body as initialised; its last linear map, the head and the embedding learn."""
        for block in self.network.blocks.values():
            cast(LabelBlock, block).freeze_body()

    def prepare(self, data: Examples, generator: torch.Generator) -> None:
        """Fill prototypes with the medoid image of each class, and let the head start from them."""
        if self.config.embedding == "prototype":
            with torch.no_grad():
                self.embed.weight.copy_(prototypes(data, self.spec, self.embed.weight.device))
            if isinstance(self.head, SoftmaxHead):
                self.head.align(self.embed)

    def representations(self, inputs: Tensor) -> dict[str, Tensor]:
        """Return the last hidden activities (N, H) of each block for a state z = 0, which says nothing of the label."""
        return {name: cast(LabelBlock, block).blind(inputs) for name, block in self.network.blocks.items()}

    def features(self, inputs: Tensor) -> Tensor:
        """Return the last hidden activities of all blocks side by side, (N, sum of H), for a state z = 0."""
        return torch.cat(list(self.representations(inputs).values()), dim=1)

    def rows(self, batch: Batch) -> Tensor:
        """Return the labels as class weights (N, m): one-hot rows, or soft labels unchanged."""
        return self.spec.target_rows(batch, self.embed.weight.dtype)

    def estimate(self, logits: Tensor) -> Tensor:
        """Return ``uhat`` (N, d): the embeddings weighted by the class probabilities of a block's logits (N, m)."""
        return self.embed(logits.to(self.embed.weight.dtype).softmax(1))  # type: ignore[no-any-return]

    def start(self, inputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return ``z_0`` (N, d): a draw of N(0, I), or its mean 0 without a generator."""
        zeros = torch.zeros(len(inputs), self.embed.weight.shape[1], device=inputs.device, dtype=self.embed.weight.dtype)
        return zeros if generator is None else standard_normal(zeros, generator)
