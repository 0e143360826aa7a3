"""Builders of networks by name: a function ``(spec, config) -> Network`` with its configuration's dataclass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from bpfree.errors import UsageError
from bpfree.network.network import Network
from bpfree.options import option
from bpfree.tasks.task import TaskSpec

__all__ = ["MLPConfig", "NetworkBuilder", "VGGConfig", "mlp", "vgg"]

Activation = Literal["relu", "leaky-relu", "gelu", "tanh", "hardtanh", "identity"]
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky-relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "hardtanh": nn.Hardtanh,
    "identity": nn.Identity,
}
Norm = Literal["none", "batch", "layer"]
NORMS_1D: dict[str, list[Callable[[int], nn.Module]]] = {"none": [], "batch": [nn.BatchNorm1d], "layer": [nn.LayerNorm]}
NORMS_2D: dict[str, list[Callable[[int], nn.Module]]] = {
    "none": [],
    "batch": [nn.BatchNorm2d],
    "layer": [lambda channels: nn.GroupNorm(1, channels)],
}


@dataclass(frozen=True)
class NetworkBuilder:
    """A registered network: what makes it, and the dataclass of its options."""

    build: Callable[[TaskSpec, Any], Network]
    Config: type
    summary: str = ""


@dataclass
class MLPConfig:
    """A multilayer perceptron; images are flattened."""

    depth: int = option(4, "number of hidden layers", ge=0, le=10_000, needs={"widths": ([],)})
    width: int = option(128, "units in each hidden layer", ge=1, needs={"widths": ([],)}, unless={"depth": (0,)})
    widths: list[int] = option(factory=list, help="units of each hidden layer, in place of depth and width", ge=1)
    activation: Activation = option("relu", "nonlinearity after each hidden layer", unless={"depth": (0,)})
    norm: Norm = option("none", "normalisation before the nonlinearity", unless={"depth": (0,)})
    dropout: float = option(0.0, "dropout after the nonlinearity", ge=0, lt=1, unless={"depth": (0,)})


@dataclass
class VGGConfig:
    """3x3 convolutions with a max-pooling after the listed ones, then a linear readout."""

    channels: list[int] = option(factory=lambda: [64, 128, 256, 256], help="output channels of each convolution", ge=1)
    pool_after: list[int] = option(factory=lambda: [1, 2, 3, 4], help="convolutions (counted from 1) followed by 2x2 max-pooling", ge=1)
    activation: Activation = option("relu", "nonlinearity after each convolution")
    norm: Norm = option("batch", "normalisation before the nonlinearity")
    dropout: float = option(0.0, "dropout before the readout", ge=0, lt=1)


def mlp(spec: TaskSpec, config: MLPConfig | None = None) -> Network:
    """Hidden blocks ``b1``, ``b2``, ... (linear, norm, activation) and the linear block ``readout``."""
    config = config or MLPConfig()
    width = spec.input_size
    blocks: dict[str, nn.Module] = {}
    for index, units in enumerate(config.widths or [config.width] * config.depth, start=1):
        layers: list[nn.Module] = [nn.Flatten()] if index == 1 and len(spec.input_shape) > 1 else []
        layers.append(nn.Linear(width, units))
        layers += [norm(units) for norm in NORMS_1D[config.norm]]
        layers.append(ACTIVATIONS[config.activation]())
        if config.dropout:
            layers.append(nn.Dropout(config.dropout))
        blocks[f"b{index}"] = nn.Sequential(*layers)
        width = units
    readout: nn.Module = nn.Linear(width, spec.outputs)
    blocks["readout"] = readout if blocks or len(spec.input_shape) == 1 else nn.Sequential(nn.Flatten(), readout)
    return Network(blocks, input_shape=spec.input_shape, readout="readout")


def vgg(spec: TaskSpec, config: VGGConfig | None = None) -> Network:
    """Hidden blocks ``b1``, ``b2``, ... (convolution, norm, activation, perhaps pooling) and the block ``readout``.

    Raises:
        UsageError: if the task's inputs are no images, or too small for the poolings; a pooling after a convolution that does not exist.
    """
    config = config or VGGConfig()
    if len(spec.input_shape) != 3:
        raise UsageError(f"vgg needs images (channels, height, width), not inputs of shape {spec.input_shape}", fix="use network=mlp")
    absent = [index for index in config.pool_after if index > len(config.channels)]
    if absent and config.pool_after != VGGConfig().pool_after:
        raise UsageError(
            f"no convolution {', '.join(map(str, absent))} to pool after: network.channels has {len(config.channels)}",
            where="network.pool_after",
            fix="name existing convolutions, counted from 1",
        )
    channels, height, width = spec.input_shape
    poolings = sum(1 for index in config.pool_after if index <= len(config.channels))
    if min(height, width) >> poolings < 1:
        raise UsageError(
            f"images of {height}x{width} are too small for {poolings} poolings",
            where="network.pool_after",
            fix=f"name at most {min(height, width).bit_length() - 1} convolutions in network.pool_after",
        )
    blocks: dict[str, nn.Module] = {}
    for index, features in enumerate(config.channels, start=1):
        layers: list[nn.Module] = [nn.Conv2d(channels, features, 3, padding=1)]
        layers += [norm(features) for norm in NORMS_2D[config.norm]]
        layers.append(ACTIVATIONS[config.activation]())
        if index in config.pool_after:
            layers.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
        blocks[f"b{index}"] = nn.Sequential(*layers)
        channels = features
    head: list[nn.Module] = [nn.Flatten(), nn.Linear(channels * height * width, spec.outputs)]
    blocks["readout"] = nn.Sequential(*([nn.Dropout(config.dropout)] if config.dropout else []), *head)
    return Network(blocks, input_shape=spec.input_shape, readout="readout")
