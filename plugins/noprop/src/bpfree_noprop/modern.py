"""A modern denoising block, beyond the paper: a small residual convnet with batch norm reads the image.

The blocks are as independent as the paper's, and fit the same rules. Sources: residual units from He, Zhang, Ren, Sun
(arXiv 1512.03385); convolution, max-pooling, batch norm, with few stages and one unit in each, from D. Page's "How to train your
ResNet" (2018), whose network reaches 94 % on CIFAR-10 in 24 epochs; global average pooling from Lin, Chen, Yan (arXiv 1312.4400).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from bpfree.errors import UsageError
from bpfree.options import option
from bpfree.tasks.task import TaskSpec
from bpfree_noprop.blocks import DenoisingBlock, Residual, TaperedConfig, builder, dense, joint, label_stem
from bpfree_noprop.embeddings import target_size

__all__ = ["NETWORKS", "ResidualConfig"]


@dataclass
class ResidualConfig(TaperedConfig):
    """Residual convolutional blocks for images of at least 16x16 pixels (2^(stages+1))."""

    channels: int = option(16, "channels of the first convolution, doubled by each stage", ge=1)
    stages: int = option(3, "stages, each of which halves height and width", ge=1)
    depth: int = option(1, "residual units of two convolutions in each stage", ge=0)
    width: int = option(64, "units of the label's path and of the joined layer", ge=1)


def residual_block(spec: TaskSpec, config: ResidualConfig, d: int) -> DenoisingBlock:
    """Build a block whose image path, of F = channels 2^stages features, is joined with the noised label's path behind it.

    Raises:
        UsageError: if the images are too small for the stages.
    """
    check_images(spec, config.stages)
    features = config.channels * 2**config.stages
    vector = config.label == "vector"
    label: nn.Module = nn.Sequential(*dense(d, config.width)) if vector else label_stem(spec, stem(spec, config))
    made = config.width if vector else features
    fuse = joint(config, features, made, *dense(features + made, config.width))
    return DenoisingBlock(stem(spec, config), label, fuse, nn.Linear(config.width, target_size(spec)), d)


def stem(spec: TaskSpec, config: ResidualConfig) -> nn.Sequential:
    """Map (N, C, H, W) to (N, F): means over the places that are left after the last stage."""
    layers = nn.Sequential(*convolution(spec.input_shape[0], config.channels), *stages(config), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return layers.to(memory_format=torch.channels_last)


def stages(config: ResidualConfig) -> Iterator[nn.Module]:
    """Yield the layers of the stages, each from (N, c, h, w) to (N, 2c, ceil(h/2), ceil(w/2))."""
    for stage in range(config.stages):
        channels = config.channels * 2 ** (stage + 1)
        yield from convolution(channels // 2, channels, pool=True)
        for _ in range(config.depth):
            yield Residual(nn.Sequential(*convolution(channels, channels), *convolution(channels, channels)))


def convolution(inputs: int, outputs: int, *, pool: bool = False) -> list[nn.Module]:
    """Build a 3x3 convolution, batch norm and ReLU; pooling comes before the norm, where it leaves a quarter of the work."""
    halve: list[nn.Module] = [nn.MaxPool2d(2, ceil_mode=True)] if pool else []
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), *halve, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def check_images(spec: TaskSpec, stages: int) -> None:
    """Refuse images that the stages would halve to less than 2x2.

    Raises:
        UsageError: if an image's side is below 2^(stages+1).
    """
    least, sides = 2 ** (stages + 1), spec.input_shape[1:]
    if min(sides) < least:
        raise UsageError(
            f"a residual block of {stages} stages needs images of at least {least}x{least} pixels, not {'x'.join(map(str, sides))}",
            where="network.stages",
            fix="choose fewer stages, or use network=noprop-mlp",
        )


NETWORKS = {
    "noprop-residual": builder(
        residual_block, ResidualConfig, "small residual convolutional denoising blocks, beyond the paper (NoProp)", images=True
    ),
}
