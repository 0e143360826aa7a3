"""Convolutions whose channels are divided among the classes, and blocks that keep the divisions apart."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from bpfree import Network, TaskSpec, UsageError, option
from bpfree.network.builders import NetworkBuilder

__all__ = ["CHANNEL_GROUPS", "ChannelGroupsConfig", "channel_groups"]


@dataclass
class ChannelGroupsConfig:
    """Blocks of convolution, ReLU, perhaps pooling, and batch norm, in this order."""

    per_group: list[int] = option(factory=lambda: [2, 8, 24, 48], help="channels of each block for each of its groups of channels", ge=1)
    groups: list[int] = option(factory=list, help="groups of channels of each block (empty: one for each class, in all blocks)", ge=1)
    separate: bool = option(
        True, "whether every second convolution keeps the groups apart (CFSE: a convolution extracts, the next one separates)"
    )
    pool_after: list[int] = option(factory=lambda: [2, 4], help="blocks (counted from 1) with 2x2 max-pooling", ge=1)
    kernel: int = option(3, "height and width of kernels, odd: images keep their size", ge=1)
    norm: bool = option(True, "batch norm at the end of each block, as published")


def channel_groups(spec: TaskSpec, config: ChannelGroupsConfig | None = None) -> Network:
    """Build blocks ``b1``, ``b2``, ... and the linear block ``readout``.

    Raises:
        UsageError: inputs that are no images, or too small for the poolings; groups that cannot be kept apart; an even kernel.
    """
    config = config or ChannelGroupsConfig()
    if len(spec.input_shape) != 3:
        raise UsageError(
            f"channel-groups needs images (channels, height, width), not inputs of shape {spec.input_shape}", fix="use network=mlp"
        )
    if config.kernel % 2 == 0:
        raise UsageError(f"kernels of {config.kernel} would change the size of images", where="network.kernel", fix="use 3 or 5")
    groups = config.groups or [spec.outputs] * len(config.per_group)
    if len(groups) != len(config.per_group):
        what = f"{len(groups)} numbers of groups for {len(config.per_group)} blocks"
        raise UsageError(what, where="network.groups", fix="give one for each entry of network.per_group")
    channels, height, width = spec.input_shape
    poolings = len([index for index in config.pool_after if index <= len(groups)])
    if min(height, width) >> poolings < 1:
        what = f"images of {height}x{width} are too small for {poolings} poolings"
        raise UsageError(what, where="network.pool_after", fix=f"name at most {min(height, width).bit_length() - 1} blocks")
    blocks: dict[str, nn.Module] = {}
    for index, (each, count) in enumerate(zip(config.per_group, groups, strict=True), start=1):
        apart = count if config.separate and index % 2 == 0 else 1
        if channels % apart:
            raise UsageError(
                f"{channels} channels of block b{index - 1} cannot be divided among the {apart} groups of b{index}",
                where="network.groups",
                fix="let a block that separates have as many groups as the one below, or network.separate=false",
            )
        layers: list[nn.Module] = [nn.Conv2d(channels, each * count, config.kernel, padding=config.kernel // 2, groups=apart), nn.ReLU()]
        if index in config.pool_after:
            layers.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
        if config.norm:
            layers.append(nn.BatchNorm2d(each * count, eps=1e-4))
        blocks[f"b{index}"] = nn.Sequential(*layers)
        channels = each * count
    blocks["readout"] = nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, spec.outputs))
    return Network(blocks, input_shape=spec.input_shape, readout="readout")


CHANNEL_GROUPS = NetworkBuilder(
    channel_groups, ChannelGroupsConfig, "convolutions with channels for each class, every second one within these (channel-competition)"
)
