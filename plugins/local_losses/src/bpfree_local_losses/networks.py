"""The convolutional networks of the local-losses literature, in any width."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from bpfree import Network, TaskSpec, UsageError, option
from bpfree.network.builders import NetworkBuilder

__all__ = ["LOCAL_VGG", "LocalVGGConfig", "local_vgg"]

LAYERS: dict[str, tuple[list[int], list[int]]] = {
    "vgg6b": ([128, 256, 512, 512], [1, 2, 3, 4]),
    "vgg8b": ([128, 256, 256, 512, 512, 512], [2, 4, 5, 6]),
    "vgg11b": ([128, 128, 128, 256, 256, 512, 512, 512, 512], [4, 6, 8, 9]),
}
"""Channels of each convolution, and the convolutions, counted from 1, behind which there is a 2x2 max-pooling."""
NORMS: dict[str, tuple[Callable[[int], nn.Module] | None, Callable[[int], nn.Module] | None]] = {
    "none": (None, None),
    "batch": (nn.BatchNorm2d, nn.BatchNorm1d),
    "layer": (lambda channels: nn.GroupNorm(1, channels), nn.LayerNorm),
    "instance": (lambda channels: nn.InstanceNorm2d(channels, affine=True), nn.LayerNorm),
}
"""By name, of convolutions and of dense layers."""


@dataclass
class LocalVGGConfig:
    """3x3 convolutions and dense layers as in Nokland and Eidnes 2019: layer, norm, LeakyReLU, dropout, perhaps a pooling."""

    layers: Literal["vgg6b", "vgg8b", "vgg11b"] = option("vgg8b", "published layers; vgg8b: 128-256-M-256-512-M-512-M-512-M")
    width: float = option(1.0, "factor on the channels of all convolutions", gt=0)
    multiple: int = option(1, "channels and dense units are rounded up to a multiple of it, such as the number of classes", ge=1)
    stem: int = option(0, "channels of one more convolution in front (signal propagation: 128), times the width; 0: none", ge=0)
    dense: list[int] = option(factory=lambda: [1024], help="units of the dense layers before the readout, whatever the width", ge=1)
    norm: Literal["none", "batch", "layer", "instance"] = option(
        "batch", "normalisation before the nonlinearity; instance: dense layers have a layer norm"
    )
    slope: float = option(0.01, "slope of the LeakyReLU for negative values; 0 is a ReLU", ge=0)
    block_dropout: float = option(0.0, "dropout in each hidden block: of whole channels after convolutions", ge=0, lt=1)


def local_vgg(spec: TaskSpec, config: LocalVGGConfig | None = None) -> Network:
    """Build hidden blocks ``b1``, ``b2``, ... (convolution or dense) and the linear block ``readout``.

    Dropout comes before the pooling, as in the authors' code; of whole channels the two commute.

    Raises:
        UsageError: inputs that are no images, or too small for the poolings.
    """
    config = config or LocalVGGConfig()
    if len(spec.input_shape) != 3:
        raise UsageError(f"local-vgg needs images (channels, height, width), not inputs of shape {spec.input_shape}", fix="use network=mlp")
    published, pool_after = LAYERS[config.layers]
    before, height, width = spec.input_shape
    if min(height, width) >> len(pool_after) < 1:
        raise UsageError(
            f"images of {height}x{width} are too small for {len(pool_after)} poolings",
            where="network.layers",
            fix="use images of 16x16 or more, or network=vgg with fewer poolings",
        )
    stem = [config.stem] if config.stem else []
    norms = NORMS[config.norm]
    blocks: dict[str, nn.Module] = {}
    for index, units in enumerate([*stem, *published], start=1):
        after = _units(units * config.width, config.multiple)
        layers: list[nn.Module] = [nn.Conv2d(before, after, 3, padding=1), *_rest(after, norms[0], config.slope)]
        layers += [nn.Dropout2d(config.block_dropout)] * (config.block_dropout > 0)
        if index - len(stem) in pool_after:
            layers.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
        blocks[f"b{index}"] = nn.Sequential(*layers)
        before = after
    blocks["b1"].to(memory_format=torch.channels_last)  # and so all that follows
    before *= height * width
    for place, units in enumerate(config.dense):
        after = _units(units, config.multiple)
        layers = [nn.Flatten()] if place == 0 else []
        layers += [nn.Linear(before, after), *_rest(after, norms[1], config.slope)]
        layers += [nn.Dropout(config.block_dropout)] * (config.block_dropout > 0)
        blocks[f"b{len(blocks) + 1}"] = nn.Sequential(*layers)
        before = after
    blocks["readout"] = nn.Linear(before, spec.outputs) if config.dense else nn.Sequential(nn.Flatten(), nn.Linear(before, spec.outputs))
    return Network(blocks, input_shape=spec.input_shape, readout="readout")


def _units(units: float, multiple: int) -> int:
    return multiple * math.ceil(max(1, int(units)) / multiple)


def _rest(units: int, norm: Callable[[int], nn.Module] | None, slope: float) -> list[nn.Module]:
    return [*([] if norm is None else [norm(units)]), nn.LeakyReLU(slope) if slope else nn.ReLU()]


LOCAL_VGG = NetworkBuilder(
    local_vgg, LocalVGGConfig, "VGG of Nokland and Eidnes in any width: layers=vgg8b, vgg6b or vgg11b, then dense layers", family="layers"
)
