"""The networks of BioTorch's comparison: two LeNets, and the ResNets for CIFAR-10 with identity shortcuts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree import Network, TaskSpec, UsageError, option
from bpfree.network.builders import NetworkBuilder
from bpfree.network.initialisation import Initialisation, initialise

__all__ = ["CIFAR_RESNET", "LENET", "LeNetConfig", "ResNetConfig", "lenet", "resnet"]


SIZE = 32
"""Least height and width of the images that LeNet's layers are made for."""


@dataclass
class LeNetConfig:
    """BioTorch's LeNets, for images of 32x32; smaller ones are padded to that size by the first convolution."""

    variant: Literal["grey", "colour"] = option(
        "grey", "grey: 5x5 convolutions of 6, 16 and 120 channels, 84 units; colour: 3x3 of 32, 64 and 128, 256 units"
    )
    init: Initialisation = option("xavier-uniform", "initial weights, with biases of zero (torch: as its layers make them)")


@dataclass
class ResNetConfig:
    """Residual networks of 3x3 convolutions for CIFAR-10, with shortcuts that have no weights."""

    depth: int = option(20, "layers: 6 n + 2", ge=8)
    width: int = option(16, "channels of the first stage", ge=2)
    init: Initialisation = option("xavier-uniform", "initial weights, with biases of zero (torch: as its layers make them)")


def lenet(spec: TaskSpec, config: LeNetConfig | None = None) -> Network:
    """Build blocks ``b1`` to ``b3`` (convolution, in the first two max-pooling, ReLU), ``b4`` (dense) and ``readout``.

    Raises:
        UsageError: inputs that are no images.
    """
    config = config or LeNetConfig()
    _check(spec, "lenet")
    padding = [max(0, (SIZE + 1 - size) // 2) for size in spec.input_shape[1:]]
    kernel, channels, units = (5, (6, 16, 120), 84) if config.variant == "grey" else (3, (32, 64, 128), 256)
    blocks: dict[str, nn.Module] = {}
    before = spec.input_shape[0]
    for index, after in enumerate(channels, start=1):
        layers: list[nn.Module] = [nn.Conv2d(before, after, kernel, padding=(padding[0], padding[1]) if index == 1 else 0)]
        if index < len(channels):
            layers.append(nn.MaxPool2d(2))  # before the ReLU, which commutes with it and meets a quarter of the values so
        layers.append(nn.ReLU())
        if index == len(channels) and config.variant == "colour":
            layers.append(nn.AdaptiveAvgPool2d(1))
        blocks[f"b{index}"] = nn.Sequential(*layers)
        before = after
    height, width = (_left(size + 2 * pad) for size, pad in zip(spec.input_shape[1:], padding, strict=True))
    positions = 1 if config.variant == "colour" else height * width
    blocks["b4"] = nn.Sequential(nn.Flatten(), nn.Linear(before * positions, units), nn.ReLU())
    blocks["readout"] = nn.Linear(units, spec.outputs)
    return _network(blocks, spec, config.init)


def _left(size: int) -> int:
    """Return how many positions of an axis are left after the grey network's convolutions and poolings."""
    return ((size - 4) // 2 - 4) // 2 - 4


def resnet(spec: TaskSpec, config: ResNetConfig | None = None) -> Network:
    """Build ``stem``, a block for each residual unit (``s1u1``, ...), and ``readout`` (mean over positions, linear).

    Raises:
        UsageError: a depth that is not 6 n + 2; inputs that are no images.
    """
    config = config or ResNetConfig()
    _check(spec, "cifar-resnet")
    units, rest = divmod(config.depth - 2, 6)
    if rest:
        fix = f"network.depth={6 * units + 2} or {6 * units + 8}"
        raise UsageError(f"a residual network of three stages has 6 n + 2 layers, not {config.depth}", where="network.depth", fix=fix)
    width = config.width
    stem = nn.Sequential(nn.Conv2d(spec.input_shape[0], width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    blocks: dict[str, nn.Module] = {"stem": stem}
    before = width
    for stage in (1, 2, 3):
        after = width * 2 ** (stage - 1)
        for unit in range(1, units + 1):
            blocks[f"s{stage}u{unit}"] = Unit(before, after, stride=2 if stage > 1 and unit == 1 else 1)
            before = after
    blocks["readout"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, spec.outputs))
    return _network(blocks, spec, config.init)


class Unit(nn.Module):
    """Two convolutions with a shortcut around them, which takes every second position and adds empty channels where it must."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.stride, self.added = stride, after - before

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.stride > 1 or self.added:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))
        return F.relu(y + x)


def _check(spec: TaskSpec, name: str) -> None:
    if len(spec.input_shape) != 3:
        raise UsageError(f"{name} needs images (channels, height, width), not inputs of shape {spec.input_shape}", fix="use network=mlp")


def _network(blocks: dict[str, nn.Module], spec: TaskSpec, init: Initialisation) -> Network:
    for block in blocks.values():
        initialise(block, init)
    next(iter(blocks.values())).to(
        memory_format=torch.channels_last
    )  # and so all that follows: a step takes 0.6 to 0.9 of the time on a CPU
    return Network(blocks, input_shape=spec.input_shape, readout="readout")


LENET = NetworkBuilder(lenet, LeNetConfig, "LeNet as in BioTorch's comparison, on images padded to 32x32: variant=grey or colour")
CIFAR_RESNET = NetworkBuilder(resnet, ResNetConfig, "residual network for CIFAR-10 with identity shortcuts: depth=20, 32, 44, 56, 110")
