"""Forward signal propagation: labels travel forward through the same layers as the data, and each layer brings the two together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree import Batch, Card, Network, OptimizerConfig, TaskSpec, Traits, UsageError, always, option
from bpfree.network import kept_buffers, recorded_calls
from bpfree_local_losses.labels import inputs_alone, labels_to_write
from bpfree_local_losses.layers import LossOfEachBlock
from bpfree_local_losses.places import batch_norms, before_pooling, flat_rows, has_dropout, place_shapes, rest, stream
from bpfree_local_losses.similarity import Positives, loss_of_rows, positives

__all__ = ["Signal", "Sigprop", "SigpropConfig"]


@dataclass
class SigpropConfig:
    """Options of forward signal propagation."""

    loss: Positives = option(
        "max-all",
        "rows of the signal that data of a class should be similar to: the class's own (label-direct), or those most similar in the layer "
        "below: all of them, one of them, the k most similar",
    )
    k: int = option(6, "rows that are positives", ge=1, needs={"loss": ("top-k",)})
    normalise: bool = option(
        False, "divide an example's loss by the number of its positives (published: not)", unless={"loss": ("label-direct", "max-rand")}
    )
    scale: Literal["none", "root"] = option("root", "similarities as they are, as published, or over the root of the number of features")
    signal: Literal["learned", "fixed"] = option("learned", "whether the generator of the first layer's signal learns")
    rows: Literal["auto", "classes", "examples"] = option(
        "auto",
        "rows of the signal: one for each class, one for each example, as published; auto: of classes where both give the same loss (no "
        "dropout, no statistics of a batch)",
        unless={"loss": ("label-direct",)},
    )
    prediction: Literal["similarity", "readout"] = option(
        "similarity", "what predicts: the similarity of the last hidden block to the signals of the classes, or a linear readout"
    )


class Signal(nn.Module):
    """Make the signal of each class in the shape of the first hidden layer: linear without bias, layer norm, ReLU.

    Args:
        classes: number of classes.
        shape: of the layer, without the batch axis.
    """

    def __init__(self, classes: int, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape
        self.linear = nn.Linear(classes, shape.numel(), bias=False)
        self.norm = nn.LayerNorm(shape.numel())

    def forward(self, labels: Tensor) -> Tensor:
        """Map one-hot labels (R, C) to (R, *shape)."""
        return F.relu(self.norm(self.linear(labels))).view(len(labels), *self.shape)


class Sigprop(LossOfEachBlock):
    """A signal that is made of the label meets the data in every layer, and each layer learns from how similar the two are."""

    Config = SigpropConfig
    card = Card(
        "forward signal propagation: the label travels forward through the same layers as the data",
        paper="Kohan, Rietman, Siegelmann: Signal propagation: the framework for learning and inference in a forward pass. IEEE "
        "Transactions on Neural Networks and Learning Systems 2023, arXiv 2204.01723",
        equation="h_l = f_l(SG h_{l-1}), t_l = f_l(SG t_{l-1}), t_1 = S(y);  S_ij = h_{l,i} . t_{l,j};  "
        "loss_l = mean_i sum_j -P_ij log softmax_j S_ij, P_ij = [K_ij = max_j K_ij], K = t_{l-1} t_{l-1}^T;  "
        "prediction: argmax_c h_L . t_L(c)",
        notes="The first hidden block is the authors' input module, so that their networks have one convolution more. By default "
        "similarities are over the root of the number of features, theirs are not (rule.scale=none). Rows of a class are equal unless "
        "there is dropout or a batch's statistics in the signal's stream, so that a row for each class costs 1 + C/N passes in place of 2, "
        "which are declared as the bound. Data and signal are executed one after the other and share no batch statistics; in a batch norm "
        "the signal has its own, in predictions those of the class rows. Updates of all layers are applied at the end of a step, which is "
        "the same as at once: what is handed on was computed before.",
    )
    optimizer_of = always(OptimizerConfig("adam", lr=5e-4))
    config: SigpropConfig

    @classmethod
    def traits_of(cls, config: SigpropConfig, network: Network | None = None) -> Traits:
        """Two passes with a row for each example; with a row for each class 1 + C/N, for which two are the bound."""
        return Traits(
            dependence="upstream",
            downstream_weights=0,
            reverse_span=1,
            passes=2,
            readout="none" if config.prediction == "similarity" else "required",
            targets=("classes",),
            inputs="real",
            own_loss=False,
        )

    @classmethod
    def specimen(cls, kind: str, depth: int, width: int) -> dict[str, Any] | None:
        """Return a specimen with a row for each example, so that passes do not depend on the size of a batch."""
        return {**(super().specimen(kind, depth, width) or {}), "rule.rows": "examples"}

    def __init__(self, network: Network | nn.Module, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        if not self.network.hidden:
            raise UsageError("sigprop needs a hidden block, in which data and signal meet", fix="use network.depth=1 or more")
        if spec.output_size != (spec.outputs,):
            what = f"a signal for each of {spec.outputs} classes, but outputs are of shape {spec.output_size}"
            raise UsageError(what, where=f"task {spec.name}", fix="choose a task with one class for each example")
        self.places = {name: before_pooling(self.network.blocks[name]) for name in self.network.hidden}
        self.signal = Signal(spec.outputs, place_shapes(self.network, self.places)[self.network.hidden[0]])
        if self.config.signal == "fixed":
            self.signal.requires_grad_(False)
        self.by_class = self.config.loss == "label-direct" or self.config.rows == "classes"
        if self.config.rows == "auto":
            self.by_class |= not any(has_dropout(block) or batch_norms(block) for block in self._hidden_blocks())

    def _hidden_blocks(self) -> list[nn.Module]:
        return [self.network.blocks[name] for name in self.network.hidden]

    def plan(self) -> str:
        """Describe the rows of the signal and where similarities are measured."""
        rows = f"a row for each of {self.spec.outputs} classes" if self.by_class else "a row for each example"
        at = ", ".join(
            f"{name} (before its pooling)" if self.places[name] is not self.network.blocks[name] else name for name in self.places
        )
        return f"signal: {rows}, through {len(self.places)} blocks\nsimilarities at the output of {at}"

    def freeze_features(self) -> None:
        """Fix all hidden blocks and the signal's generator: a readout is all that then learns, or nothing."""
        super().freeze_features()
        self.signal.requires_grad_(False)

    # --- the signal's stream --------------------------------------------------------------------------------------------

    def _first(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first layer's signal where similarities are measured, and at the block's output."""
        name = self.network.hidden[0]
        block = self.network.blocks[name]
        at = out = self.signal(labels)
        for part in rest(block, self.places[name]):
            out = part(out)
        return at, out

    def _next(self, name: str, signal: Tensor) -> tuple[Tensor, Tensor]:
        """Execute a block on the detached signal; return it where similarities are measured, and at the block's output."""
        block, place = self.network.blocks[name], self.places[name]
        with own_statistics(block), recorded_calls(place) as calls:
            out = block(signal.detach())
        return calls[place][-1].output, out

    def _stream(self, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the signal block by block, where it is measured and at the block's output, each from its detached predecessor."""
        _, *others = self.network.hidden
        at, out = self._first(labels)
        yield at, out
        for name in others:
            at, out = self._next(name, out)
            yield at, out

    # --- learning -------------------------------------------------------------------------------------------------------

    def losses(self, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        """Yield each block's loss by name; one graph at a time is alive."""
        classes = F.one_hot(labels_to_write(batch, self), self.spec.outputs).to(batch.inputs.dtype)
        labels = torch.eye(self.spec.outputs, dtype=classes.dtype, device=classes.device) if self.by_class else classes
        counts = torch.ones_like(labels[:, 0])
        if self.by_class and self.config.loss != "label-direct":
            counts = classes.sum(0)
        below = labels  # the signal that the next block has got
        signals = self._stream(labels)
        for trace, data in stream(self.network, batch.inputs, self.places):
            if trace.name == self.network.readout:
                yield trace.name, self.spec.loss(data, batch)
                break
            at, out = next(signals)
            wanted = positives(self.config.loss, likeness(below, below, "none").detach(), counts, self.config.k)
            wanted = classes.to(wanted.dtype) @ wanted if self.by_class else wanted
            loss = loss_of_rows(likeness(data, at, self.config.scale), wanted, counts, normalise=self.config.normalise)
            yield trace.name, loss
            below = out.detach()
            del trace, data, at, out, loss

    # --- prediction -----------------------------------------------------------------------------------------------------

    def class_rows(self) -> dict[str, Tensor]:
        """Return the signal of each class at the place of each hidden block, (C, ...) by block: the rows of its linear classifier."""
        like = next(self.network.parameters())
        with torch.no_grad(), no_dropout(self):
            stream = self._stream(torch.eye(self.spec.outputs, dtype=like.dtype, device=like.device))
            return {name: at for name, (at, _) in zip(self.network.hidden, stream, strict=True)}

    def similarities(self, inputs: Tensor) -> dict[str, Tensor]:
        """Return the similarity of each hidden block to the signals of the classes, (N, C) by block."""
        rows = self.class_rows()
        found = {}
        for trace, data in stream(self.network, inputs, self.places):
            if trace.name in rows:
                found[trace.name] = likeness(data, rows[trace.name], self.config.scale)
        return found

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        """Predict by the last hidden block's similarity to the signals of the classes, or by the readout; never with labels."""
        inputs = inputs_alone(inputs, "sigprop")
        if self.config.prediction == "readout":
            return super().predict(inputs, generator)
        return self.similarities(inputs)[self.network.hidden[-1]]

    def alternatives(self, inputs: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Return what each hidden block predicts by similarity."""
        return self.similarities(inputs)


def likeness(data: Tensor, rows: Tensor, scale: Literal["none", "root"]) -> Tensor:
    """Return dot products (N, R) of data (N, ...) and rows (R, ...); of feature maps (N, K, H, W) their mean over positions."""
    positions = math.prod(data.shape[2:])
    left, right = flat_rows(data, rows)
    factor = 1 / positions * (1 / math.sqrt(data.shape[1]) if scale == "root" else 1)
    return (left @ right.T).to(torch.promote_types(data.dtype, torch.float32)) * factor


@contextmanager
def own_statistics(block: nn.Module) -> Iterator[None]:
    """Let batch norms inside normalise what they are given by its own statistics, and leave the running ones alone."""
    norms = batch_norms(block)
    before = [norm.training for norm in norms]
    with kept_buffers(block):
        for norm in norms:
            norm.training = True
        try:
            yield
        finally:
            for norm, training in zip(norms, before, strict=True):
                norm.training = training


@contextmanager
def no_dropout(rule: Sigprop) -> Iterator[None]:
    """Execute hidden blocks inside in eval mode."""
    parts = [part for block in rule._hidden_blocks() for part in block.modules() if part.training]
    for part in parts:
        part.training = False
    try:
        yield
    finally:
        for part in parts:
            part.training = True
