"""The networks of the predictive-coding literature: the benchmark's VGGs, and muPC's residual MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import nn

from bpfree import Network, TaskSpec, UsageError, option
from bpfree.network.builders import ACTIVATIONS, Activation, NetworkBuilder
from bpfree_predictive_coding.layers import Residual

__all__ = ["RESIDUAL_MLP", "VGG", "ResidualMLPConfig", "VGGConfig", "residual_mlp", "vgg"]


class Convolution(NamedTuple):
    """A layer of 3x3 convolutions."""

    channels: int
    padding: int
    pooled: bool


LAYERS = {
    "vgg5": [Convolution(channels, 1, True) for channels in (128, 256, 512, 512)],
    "vgg7": [
        Convolution(128, 1, True),
        Convolution(128, 1, False),
        Convolution(256, 1, True),
        Convolution(256, 0, False),
        Convolution(512, 1, True),
        Convolution(512, 0, False),
    ],
}


@dataclass
class VGGConfig:
    """The convolutional networks of the PCX benchmark."""

    preset: Literal["vgg5", "vgg7"] = option(
        "vgg5", "vgg5: 128-256-512-512, each pooled; vgg7: 128-128-256-256-512-512, half of them pooled"
    )
    scale: float = option(1.0, "factor on the numbers of channels", gt=0)
    activation: Activation = option("gelu", "after each convolution")


@dataclass
class ResidualMLPConfig:
    """A residual multilayer perceptron with nonlinearities in front of its linear maps."""

    depth: int = option(10, "linear maps, the first and the last one counted", ge=2)
    width: int = option(128, "units in each hidden layer", ge=1)
    activation: Activation = option("relu", "in front of each linear map but the first")
    skip: bool = option(True, "identity shortcuts around all maps but the first and the last")


def vgg(spec: TaskSpec, config: VGGConfig | None = None) -> Network:
    """Build hidden blocks ``b1``, ``b2``, ... (convolution, activation, perhaps 2x2 max-pooling) and the linear block ``readout``.

    The layers are those of the published benchmark's code, for images of 32x32.

    Raises:
        UsageError: inputs that are no images, or too small.
    """
    config = config or VGGConfig()
    if len(spec.input_shape) != 3:
        raise UsageError(f"pc-vgg needs images (channels, height, width), not inputs of shape {spec.input_shape}", fix="use network=mlp")
    before, height, width = spec.input_shape
    blocks: dict[str, nn.Module] = {}
    for index, layer in enumerate(LAYERS[config.preset], start=1):
        channels = max(1, round(config.scale * layer.channels))
        parts: list[nn.Module] = [nn.Conv2d(before, channels, 3, padding=layer.padding), ACTIVATIONS[config.activation]()]
        height, width = height + 2 * layer.padding - 2, width + 2 * layer.padding - 2
        if layer.pooled:
            parts.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
        if min(height, width) < 1:
            raise UsageError(
                f"images of {spec.input_shape[1]}x{spec.input_shape[2]} are too small for {config.preset}",
                where=f"block b{index}",
                fix="use network=vgg with fewer poolings, or network=mlp",
            )
        blocks[f"b{index}"] = nn.Sequential(*parts)
        before = channels
    blocks["readout"] = nn.Sequential(nn.Flatten(), nn.Linear(before * height * width, spec.outputs))
    return Network(blocks, input_shape=spec.input_shape, readout="readout")


def residual_mlp(spec: TaskSpec, config: ResidualMLPConfig | None = None) -> Network:
    """Build blocks ``b1`` (linear), ``b2``, ... (``x + linear(activation(x))``) and ``readout`` (activation, linear), as in muPC."""
    config = config or ResidualMLPConfig()
    activation = ACTIVATIONS[config.activation]
    first: list[nn.Module] = [nn.Flatten()] if len(spec.input_shape) > 1 else []
    blocks: dict[str, nn.Module] = {"b1": nn.Sequential(*first, nn.Linear(spec.input_size, config.width))}
    for index in range(2, config.depth):
        inner = nn.Sequential(activation(), nn.Linear(config.width, config.width))
        blocks[f"b{index}"] = Residual(inner) if config.skip else inner
    blocks["readout"] = nn.Sequential(activation(), nn.Linear(config.width, spec.outputs))
    return Network(blocks, input_shape=spec.input_shape, readout="readout")


VGG = NetworkBuilder(vgg, VGGConfig, "the predictive-coding benchmark's VGGs: preset=vgg5 or vgg7, no normalisation")
RESIDUAL_MLP = NetworkBuilder(residual_mlp, ResidualMLPConfig, "residual MLP with identity shortcuts, the network of muPC")
