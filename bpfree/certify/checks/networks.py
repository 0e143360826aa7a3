"""A catalogue of networks and targets that users bring, which a rule takes or refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bpfree.certify.subject import Specimen, batches, with_views
from bpfree.network.builders import MLPConfig, VGGConfig, mlp, vgg
from bpfree.network.network import Network
from bpfree.step import Batch
from bpfree.tasks.spec import TargetKind, TaskSpec

__all__ = ["CATALOGUE", "Offer"]

CLASSES = Specimen().spec
IMAGES = replace(CLASSES, input_shape=(3, 8, 8))


class Gated(nn.Module):
    """Features times gates of the same inputs: two maps that meet."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.value, self.gate = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        gated: Tensor = self.value(x) * torch.sigmoid(self.gate(x))
        return gated


class Attention(nn.Module):
    """Self-attention over the rows of the image; it has parameters of its own beside those of its linear maps."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.maps = nn.Linear(size, 3 * size)
        self.position = nn.Parameter(torch.zeros(size, size))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.maps(x.flatten(1, 2) + self.position).chunk(3, dim=-1)
        attended: Tensor = torch.softmax(query @ key.transpose(1, 2) / key.shape[-1] ** 0.5, dim=-1) @ value
        return attended.flatten(1)


@dataclass(frozen=True)
class Offer:
    """A network and a task for it.

    Attributes:
        name: in words.
        spec: of the task.
        build: from torch's global generator.
    """

    name: str
    spec: TaskSpec
    build: Callable[[TaskSpec], Network]

    def batches(self, count: int, views: int = 1) -> list[Batch]:
        """Make batches with random inputs and targets of the task's kind."""
        made = batches(replace(CLASSES, input_shape=self.spec.input_shape, outputs=self.spec.outputs), 16, count, dtype=torch.float32)
        return [with_views(Batch(batch.inputs, _targets(batch, self.spec)), views) for batch in made]


def _targets(batch: Batch, spec: TaskSpec) -> Tensor | None:
    if spec.targets == "classes":
        return batch.targets
    if spec.targets == "multilabel":
        return nn.functional.one_hot(batch.targets, spec.outputs).float() if batch.targets is not None else None
    rows = nn.functional.one_hot(batch.targets, spec.outputs).float() if batch.targets is not None else torch.empty(0)
    return 0.9 * rows + 0.1 / spec.outputs if spec.targets == "soft" else rows - rows.mean()


def _readout(inputs: int, spec: TaskSpec) -> nn.Module:
    return nn.Linear(inputs, spec.outputs)


def _plain(spec: TaskSpec) -> Network:
    return mlp(spec, MLPConfig(depth=2, width=12))


def _normed(spec: TaskSpec) -> Network:
    return mlp(spec, MLPConfig(depth=2, width=12, norm="batch", dropout=0.2))


def _pooled(spec: TaskSpec) -> Network:
    return vgg(spec, VGGConfig(channels=[4, 6], pool_after=[1, 2], norm="batch"))


def _gated(spec: TaskSpec) -> Network:
    first = nn.Sequential(nn.Flatten(), Gated(spec.input_size, 12))
    return Network({"b1": first, "b2": Gated(12, 12), "readout": _readout(12, spec)}, input_shape=spec.input_shape, readout="readout")


def _attending(spec: TaskSpec) -> Network:
    side = spec.input_shape[-1]
    blocks = {"b1": Attention(side), "b2": nn.Sequential(nn.Linear(side * side, 12), nn.ReLU()), "readout": _readout(12, spec)}
    return Network(blocks, input_shape=spec.input_shape, readout="readout")


def _without_readout(spec: TaskSpec) -> Network:
    blocks = dict(_plain(spec).blocks.items())
    return Network(blocks, input_shape=spec.input_shape, readout=None)


def _no_chain(spec: TaskSpec) -> Network:
    blocks = {name: nn.Sequential(nn.Flatten(), nn.Linear(spec.input_size, 12)) for name in ("left", "right")}
    return Network({**blocks, "readout": _readout(24, spec)}, input_shape=spec.input_shape, readout="readout", chain=False)


@dataclass(frozen=True)
class SmoothedSpec(TaskSpec):
    """A task that brings its own loss: cross-entropy with smoothed labels."""

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        assert batch.targets is not None
        return nn.functional.cross_entropy(outputs, batch.targets, label_smoothing=0.6)


def _with(targets: TargetKind) -> TaskSpec:
    return replace(CLASSES, targets=targets)


CATALOGUE = [
    Offer("a multilayer perceptron", CLASSES, _plain),
    Offer("one with batch norm and dropout", CLASSES, _normed),
    Offer("convolutions with batch norm and pooling", IMAGES, _pooled),
    Offer("gated blocks", CLASSES, _gated),
    Offer("an attention block", CLASSES, _attending),
    Offer("a network without readout", CLASSES, _without_readout),
    Offer("a network that is no chain", CLASSES, _no_chain),
    Offer("soft labels", _with("soft"), _plain),
    Offer("real-valued targets", _with("real"), _plain),
    Offer("several labels", _with("multilabel"), _plain),
    Offer("a loss of the task's own", SmoothedSpec(CLASSES.name, CLASSES.input_shape, CLASSES.outputs), _plain),
]
