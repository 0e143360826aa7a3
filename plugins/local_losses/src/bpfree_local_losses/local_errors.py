"""Local errors: each layer predicts the label through a linear decoder, and makes examples as similar as their labels are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree import Batch, Card, Network, OptimizerConfig, TaskSpec, Traits, always, option
from bpfree.errors import UsageError
from bpfree.network import replaced_backward
from bpfree_local_losses.layers import LossOfEachBlock
from bpfree_local_losses.places import activation, place_shapes, stream

__all__ = ["LocalErrors", "LocalErrorsConfig", "LocalHead", "decoder_pooling", "similarity_matrix"]

PLAIN_CHANNELS = 3
"""Feature maps of no more channels are compared position by position, as published, not by their deviations."""


@dataclass
class LocalErrorsConfig:
    """Options of local errors."""

    loss: Literal["pred", "sim", "predsim"] = option("predsim", "prediction of the label, matching of similarities, or both")
    beta: float = option(0.99, "share of the similarity loss in predsim", ge=0, le=1, needs={"loss": ("predsim",)})
    bio: bool = option(
        False, "the authors' variant without weight transport inside a layer: fixed feedback of decoders, targets projected at random"
    )
    target_size: int = option(128, "entries of the projected targets", ge=1, needs={"bio": (True,)})
    decoder_inputs: int = option(
        2048, "feature maps are pooled until a decoder has no more inputs than this (published: 1024 to 4096)", ge=1
    )
    zero: bool = option(True, "whether decoders and the network's readout begin at zero, as published")
    place: Literal["activation", "output"] = option(
        "activation", "what of a block the losses see: its last nonlinearity, before dropout and pooling, as published, or its output"
    )


class LocalHead(nn.Module):
    """Hold what a layer's losses learn with it: a decoder of the label, and a map in front of the similarities.

    Args:
        shape: of the features, without the batch axis.
        outputs: entries of the target.
        config: the rule's options.
    """

    feedback: Tensor | None
    projection: Tensor | None

    def __init__(self, shape: torch.Size, outputs: int, config: LocalErrorsConfig) -> None:
        super().__init__()
        self.bio = config.bio
        kernel, padding = decoder_pooling(shape, config.decoder_inputs)
        self.pool: nn.Module = nn.Identity() if max(kernel) == 1 else nn.AvgPool2d(kernel, padding=padding)
        pooled = self.pool(torch.empty(1, *shape, device="meta")).numel()
        self.decoder = self.match = None
        targets = config.target_size if config.bio else outputs
        if config.loss != "sim":
            self.decoder = nn.Linear(pooled, targets)
            if config.zero:
                nn.init.zeros_(self.decoder.weight)
            if config.bio:
                nn.init.zeros_(self.decoder.bias)
        if config.loss != "pred" and not config.bio:
            dense = nn.Linear(shape.numel(), shape.numel(), bias=False)
            self.match = nn.Conv2d(shape[0], shape[0], 3, padding=1, bias=False) if len(shape) == 3 else dense
        bounds = {"feedback": (targets, pooled), "projection": (targets, outputs)}
        for name, size in bounds.items():
            drawn = torch.empty(size).uniform_(-1, 1) / math.sqrt(size[1])
            self.register_buffer(name, drawn if config.bio and (name == "projection" or self.decoder is not None) else None)

    def scores(self, features: Tensor) -> Tensor:
        """Decode features (N, ...): scores (N, C), of projected targets where these are decoded."""
        assert self.decoder is not None
        rows = self.pool(features).flatten(1)
        if self.feedback is None:
            return self.decoder(rows)  # type: ignore[no-any-return]
        with replaced_backward(self.decoder, {"weight": self.feedback}):
            return self.decoder(rows)  # type: ignore[no-any-return]

    def compared(self, features: Tensor) -> Tensor:
        """Return what the similarities of examples are measured on, (N, ...)."""
        if self.match is None:
            return self.pool(features)  # type: ignore[no-any-return]
        return self.match(features if isinstance(self.match, nn.Conv2d) else features.flatten(1))  # type: ignore[no-any-return]

    def targets(self, labels: Tensor) -> Tensor:
        """Return the targets (N, T): one-hot labels as they are, or projected."""
        return labels if self.projection is None else labels @ self.projection.T


class LocalErrors(LossOfEachBlock):
    """Each layer learns from its own errors: a decoder's cross-entropy, and the distance between similarities of features and labels."""

    Config = LocalErrorsConfig
    card = Card(
        "local errors: each layer predicts the label, and makes examples as similar as their labels",
        paper="Nokland, Eidnes: Training neural networks with local error signals. ICML 2019, arXiv 1901.06656",
        equation="loss_l = (1 - b) CE(D_l pool(h_l), y) + b |R(M_l h_l) - R(y)|^2 / N^2, b = 0.99;  R_ij: cosine of rows i and j, each "
        "less its own mean, of feature maps: of their deviations over positions;  M_l: linear, or a 3x3 convolution",
        notes="Losses see a layer before its dropout and pooling, as published. The readout's loss is the task's; theirs is times 1 - b "
        "too, which Adam cancels. Decoders and readout begin at zero. rule.bio=true: decoders send fixed random feedback and predict the "
        "signs of randomly projected labels, similarities are those of the features themselves; the authors then take beta=0.01. "
        "Their unsupervised losses (alpha, off by default) are not here.",
    )
    optimizer_of = always(OptimizerConfig("adam", lr=5e-4))
    traits_of = always(
        Traits(
            dependence="upstream",
            downstream_weights=0,
            reverse_span=1,
            targets=("classes", "soft", "multilabel"),
            inputs="real",
            own_loss=False,
        )
    )
    config: LocalErrorsConfig

    def __init__(self, network: Network | nn.Module, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        if spec.output_size != (spec.outputs,):
            what = f"decoders give (N, {spec.outputs}), but the task has outputs of shape {spec.output_size}"
            raise UsageError(what, where=f"task {spec.name}", fix="choose a task with one target for each example")
        find = activation if self.config.place == "activation" else (lambda block: block)
        self.places = {name: find(self.network.blocks[name]) for name in self.network.hidden}
        shapes = place_shapes(self.network, self.places)
        self.heads = nn.ModuleDict({name: LocalHead(shapes[name], spec.outputs, self.config) for name in self.network.hidden})
        if self.config.zero:
            self._zero_readout()

    def _zero_readout(self) -> None:
        readout = self.network.blocks[self.network.readout or ""]
        last = [layer for layer in readout.modules() if isinstance(layer, nn.Linear)][-1:]
        for layer in last:
            nn.init.zeros_(layer.weight)

    def plan(self) -> str:
        """Describe each layer's losses: which features they see, and the inputs of its decoder."""
        lines = []
        for name, head in self.heads.items():
            assert isinstance(head, LocalHead)
            where = "its last nonlinearity" if self.places[name] is not self.network.blocks[name] else "its output"
            decoder = "" if head.decoder is None else f"; decoder of {head.decoder.in_features} inputs"
            lines.append(f"{name}: {self.config.loss} of {where}{decoder}")
        return "\n".join(lines)

    def losses(self, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        """Yield each block's loss by name; one graph at a time is alive."""
        for trace, features in stream(self.network, batch.inputs, self.places):
            yield trace.name, self._loss(trace.name, features, batch) if trace.name in self.heads else self.spec.loss(features, batch)
            del trace, features

    def _loss(self, name: str, features: Tensor, batch: Batch) -> Tensor:
        """Return the loss of a layer's features (N, ...)."""
        config, head = self.config, self.heads[name]
        assert isinstance(head, LocalHead)
        labels = head.targets(self.spec.target_rows(batch, features.dtype))
        losses: dict[str, Tensor] = {}
        if config.loss != "sim":
            scores = head.scores(features)
            decoded = (
                F.binary_cross_entropy_with_logits(scores, (labels > 0).to(scores.dtype)) if config.bio else self.spec.loss(scores, batch)
            )
            losses["pred"] = decoded
        if config.loss != "pred":
            losses["sim"] = F.mse_loss(similarity_matrix(head.compared(features)), similarity_matrix(labels))
        if config.loss == "predsim":
            return (1 - config.beta) * losses["pred"] + config.beta * losses["sim"]
        return losses[config.loss]

    def alternatives(self, inputs: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Return what each layer's decoder predicts; nothing where decoders have no classes."""
        if self.config.loss == "sim" or self.config.bio:
            return {}
        found = {}
        for trace, features in stream(self.network, inputs, self.places):
            if trace.name in self.heads:
                head = self.heads[trace.name]
                assert isinstance(head, LocalHead)
                found[trace.name] = head.scores(features)
        return found


def similarity_matrix(x: Tensor) -> Tensor:
    """Return the cosines (N, N) of rows (N, ...), each less its own mean over features; feature maps stand for their deviations.

    Maps of more than three channels and more than one row of positions are represented by each channel's deviation over positions.
    """
    if x.dim() == 4 and x.shape[1] > PLAIN_CHANNELS and x.shape[2] > 1:
        x = x.flatten(2).std(2)
    rows = x.flatten(1)
    rows = rows - rows.mean(1, keepdim=True)
    rows = rows / (rows.norm(dim=1, keepdim=True) + 1e-8)
    cosines: Tensor = rows @ rows.T
    return cosines.clamp(-1, 1)


def decoder_pooling(shape: torch.Size, limit: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return kernel and padding of the average pooling in front of a decoder: doubled, rows first, until it has few enough inputs.

    Args:
        shape: of the features; of others than maps (K, H, W) nothing is pooled.
        limit: inputs of the decoder.
    """
    if len(shape) != 3:
        return (1, 1), (0, 0)
    channels, height, width = shape
    rows = columns = 1

    def inputs() -> int:
        return channels * math.ceil(height / rows) * math.ceil(width / columns)

    while inputs() > limit and rows < height:
        rows *= 2
        if inputs() > limit and columns < width:
            columns *= 2
    padding = [kernel * (math.ceil(size / kernel) - size // kernel) // 2 for size, kernel in ((height, rows), (width, columns))]
    return (rows, columns), (padding[0], padding[1])
