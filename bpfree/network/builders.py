"""Builders of networks by name: a function ``(spec, config) -> Network`` with its configuration's dataclass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from bpfree.errors import UsageError
from bpfree.network.initialisation import Initialisation, initialise
from bpfree.network.network import Network
from bpfree.options import option
from bpfree.tasks.task import TaskSpec

__all__ = ["MLPConfig", "NetworkBuilder", "VGGConfig", "mlp", "vgg"]

Activation = Literal["relu", "leaky-relu", "gelu", "softplus", "sigmoid", "hard-sigmoid", "tanh", "hardtanh", "identity"]
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky-relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
    "sigmoid": nn.Sigmoid,
    "hard-sigmoid": nn.Hardsigmoid,
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
    """A registered network: its builder, and the dataclass of its options.

    Attributes:
        build: called with the task's spec and the options.
        Config: dataclass of the options.
        summary: one line.
        family: the option that a name after a colon gives, where there is one: with ``family="model"``, ``network=NAME:resnet18`` is
            ``network=NAME network.model=resnet18``.
    """

    build: Callable[[TaskSpec, Any], Network]
    Config: type
    summary: str = ""
    family: str = ""


@dataclass(frozen=True)
class VGGPreset:
    """Layers of a published network.

    Attributes:
        channels: output channels of each convolution.
        pool_after: convolutions, counted from 1, that a pooling follows.
        dense: units of the fully connected layers before the readout.
    """

    channels: list[int]
    pool_after: list[int]
    dense: list[int]


VGG_PRESETS = {"vgg8b": VGGPreset([128, 256, 256, 512, 512, 512], [2, 4, 5, 6], [1024])}
"""``vgg8b``: Nokland and Eidnes, Training neural networks with local error signals, ICML 2019."""


@dataclass
class MLPConfig:
    """A multilayer perceptron; images are flattened."""

    depth: int = option(4, "number of hidden layers", ge=0, le=10_000, needs={"widths": ([],)})
    width: int = option(128, "units in each hidden layer", ge=1, needs={"widths": ([],)}, unless={"depth": (0,)})
    widths: list[int] = option(factory=list, help="units of each hidden layer, in place of depth and width", ge=1)
    activation: Activation = option("relu", "nonlinearity after each hidden layer", unless={"depth": (0,)})
    norm: Norm = option("none", "normalisation before the nonlinearity", unless={"depth": (0,)})
    dropout: float = option(0.0, "dropout after the nonlinearity", ge=0, lt=1, unless={"depth": (0,)})
    init: Initialisation = option("torch", "initial weights, with biases of zero (torch: as its layers make them)")
    init_gain: float = option(1.0, "factor on the initial weights", gt=0, unless={"init": ("torch",)})


@dataclass
class VGGConfig:
    """3x3 convolutions with a max-pooling after the listed ones, perhaps fully connected layers, then a linear readout."""

    preset: Literal["none", "vgg8b"] = option("none", "published layers; vgg8b: 128-256-M-256-512-M-512-M-512-M, then 1024 dense units")
    channels: list[int] = option(
        factory=lambda: [64, 128, 256, 256], help="output channels of each convolution", ge=1, unless={"preset": ("vgg8b",)}
    )
    pool_after: list[int] = option(
        factory=lambda: [1, 2, 3, 4],
        help="convolutions (counted from 1) followed by 2x2 max-pooling",
        ge=1,
        unless={"preset": ("vgg8b",)},
    )
    dense: list[int] = option(factory=list, help="units of fully connected layers before the readout", ge=1, unless={"preset": ("vgg8b",)})
    activation: Activation = option("relu", "nonlinearity after each convolution and dense layer")
    norm: Norm = option("batch", "normalisation before the nonlinearity")
    block_dropout: float = option(0.0, "dropout at the end of each hidden block: of whole channels after convolutions", ge=0, lt=1)
    dropout: float = option(0.0, "dropout before the readout", ge=0, lt=1)
    init: Initialisation = option("torch", "initial weights, with biases of zero (torch: as its layers make them)")
    init_gain: float = option(1.0, "factor on the initial weights", gt=0, unless={"init": ("torch",)})


def mlp(spec: TaskSpec, config: MLPConfig | None = None) -> Network:
    """Build hidden blocks ``b1``, ``b2``, ... (linear, norm, activation) and the linear block ``readout``."""
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
    for block in blocks.values():
        initialise(block, config.init, config.init_gain)
    return Network(blocks, input_shape=spec.input_shape, readout="readout")


def vgg(spec: TaskSpec, config: VGGConfig | None = None) -> Network:
    """Build hidden blocks ``b1``, ``b2``, ... (convolution, norm, activation, perhaps pooling; or dense) and the block ``readout``.

    Raises:
        UsageError: if the task's inputs are no images, or too small for the poolings; a pooling after a convolution that does not exist.
    """
    config = config or VGGConfig()
    if len(spec.input_shape) != 3:
        raise UsageError(f"vgg needs images (channels, height, width), not inputs of shape {spec.input_shape}", fix="use network=mlp")
    preset = VGG_PRESETS.get(config.preset) or VGGPreset(config.channels, config.pool_after, config.dense)
    absent = [index for index in config.pool_after if index > len(config.channels)]
    if absent and config.pool_after != VGGConfig().pool_after:
        raise UsageError(
            f"no convolution {', '.join(map(str, absent))} to pool after: network.channels has {len(config.channels)}",
            where="network.pool_after",
            fix="name existing convolutions, counted from 1",
        )
    channels, height, width = spec.input_shape
    poolings = sum(1 for index in preset.pool_after if index <= len(preset.channels))
    if min(height, width) >> poolings < 1:
        raise UsageError(
            f"images of {height}x{width} are too small for {poolings} poolings",
            where="network.pool_after" if config.preset == "none" else "network.preset",
            fix=f"name at most {min(height, width).bit_length() - 1} convolutions in network.pool_after",
        )
    blocks: dict[str, nn.Module] = {}
    for index, features in enumerate(preset.channels, start=1):
        layers: list[nn.Module] = [nn.Conv2d(channels, features, 3, padding=1)]
        layers += [norm(features) for norm in NORMS_2D[config.norm]]
        layers.append(ACTIVATIONS[config.activation]())
        if index in preset.pool_after:
            layers.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
        if config.block_dropout:
            layers.append(nn.Dropout2d(config.block_dropout))
        blocks[f"b{index}"] = nn.Sequential(*layers)
        channels = features
    features = channels * height * width
    for index, units in enumerate(preset.dense, start=len(blocks) + 1):
        layers = [nn.Flatten()] if index == len(preset.channels) + 1 else []
        layers += [nn.Linear(features, units), *(norm(units) for norm in NORMS_1D[config.norm]), ACTIVATIONS[config.activation]()]
        if config.block_dropout:
            layers.append(nn.Dropout(config.block_dropout))
        blocks[f"b{index}"] = nn.Sequential(*layers)
        features = units
    head: list[nn.Module] = [*([] if preset.dense else [nn.Flatten()]), nn.Linear(features, spec.outputs)]
    blocks["readout"] = nn.Sequential(*([nn.Dropout(config.dropout)] if config.dropout else []), *head)
    for block in blocks.values():
        initialise(block, config.init, config.init_gain)
    return Network(blocks, input_shape=spec.input_shape, readout="readout")
