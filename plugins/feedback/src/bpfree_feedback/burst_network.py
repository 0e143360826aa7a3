"""The convolutional network of BurstCCN, and the nonlinearity of its journal version."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bpfree import Network, TaskSpec, UsageError, option
from bpfree.network.builders import NetworkBuilder
from bpfree.network.initialisation import Initialisation, initialise

__all__ = ["CNN", "BurstCNNConfig", "ReLURMS", "burst_cnn"]


class ReLURMS(nn.Module):
    """``relu(u)`` over its root mean square in the example, so that event rates are of the order of one in every layer."""

    def forward(self, u: Tensor) -> Tensor:
        """Map (N, ...) to the same shape."""
        rate = torch.relu(u)
        return rate * torch.rsqrt(rate.square().mean(tuple(range(1, u.dim())), keepdim=True) + 1e-5)


@dataclass
class BurstCNNConfig:
    """Convolutions without padding, fully connected layers, a linear readout."""

    channels: list[int] = option(factory=lambda: [64, 128, 256], help="output channels of each convolution", ge=1)
    kernels: list[int] = option(factory=lambda: [5, 5, 3], help="size of each kernel; the last one repeats", ge=1)
    strides: list[int] = option(factory=lambda: [2, 2, 1], help="stride of each convolution; the last one repeats", ge=1)
    dense: list[int] = option(factory=lambda: [1500], help="units of the fully connected layers before the readout", ge=1)
    activation: Literal["sigmoid", "relu-rms", "relu"] = option(
        "sigmoid", "nonlinearity; relu-rms, the journal version's, is scaled by its root mean square"
    )
    init: Initialisation = option("xavier-normal", "initial weights, with biases of zero (torch: as its layers make them)")
    init_gain: float | None = option(
        None, "factor on the initial weights (none: 3.6 for sigmoid, else 1)", gt=0, unless={"init": ("torch",)}
    )


def burst_cnn(spec: TaskSpec, config: BurstCNNConfig | None = None) -> Network:
    """Build blocks ``b1``, ``b2``, ... (convolution or dense, nonlinearity) and the linear block ``readout``.

    Raises:
        UsageError: if the inputs are no images, or too small for the convolutions.
    """
    config = config or BurstCNNConfig()
    if len(spec.input_shape) != 3:
        raise UsageError(f"burst-cnn needs images (channels, height, width), not inputs of shape {spec.input_shape}", fix="use network=mlp")
    nonlinearity = {"sigmoid": nn.Sigmoid, "relu-rms": ReLURMS, "relu": nn.ReLU}[config.activation]
    blocks: dict[str, nn.Module] = {}
    channels, height, width = spec.input_shape
    for place, features in enumerate(config.channels):
        kernel, stride = (values[min(place, len(values) - 1)] for values in (config.kernels, config.strides))
        if min(height, width) < kernel:
            what = f"pictures of {height}x{width} are left at convolution {place + 1}, whose kernel is {kernel}x{kernel}"
            raise UsageError(what, where="network.channels", fix="fewer or smaller convolutions (network.channels, kernels, strides)")
        blocks[f"b{place + 1}"] = nn.Sequential(nn.Conv2d(channels, features, kernel, stride=stride), nonlinearity())
        channels, height, width = features, (height - kernel) // stride + 1, (width - kernel) // stride + 1
    size = channels * height * width
    for units in config.dense:
        flatten = [nn.Flatten()] if len(blocks) == len(config.channels) else []
        blocks[f"b{len(blocks) + 1}"] = nn.Sequential(*flatten, nn.Linear(size, units), nonlinearity())
        size = units
    blocks["readout"] = nn.Sequential(*([] if config.dense else [nn.Flatten()]), nn.Linear(size, spec.outputs))
    gain = config.init_gain or (3.6 if config.activation == "sigmoid" else 1.0)
    for block in blocks.values():
        initialise(block, config.init, gain)
    return Network(blocks, input_shape=spec.input_shape, readout="readout")


CNN = NetworkBuilder(burst_cnn, BurstCNNConfig, "convolutions with strides and sigmoid or relu-rms units, of BurstCCN")
