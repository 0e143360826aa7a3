"""Networks whose hidden blocks are a linear map without bias and an activation that compares its units.

``hebbian-mlp`` is dense. ``hebbian-cnn`` is that of SoftHebb (Journe et al., ICLR 2023, arXiv 2209.11883): batch norm without weights,
reflection padding, convolution, activation, pooling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bpfree import Network, TaskSpec, UsageError, option
from bpfree.network.builders import NetworkBuilder

__all__ = ["CNN", "MLP", "Activation", "CNNConfig", "MLPConfig", "Pixels", "UnitLength", "cnn", "mlp"]

Kind = Literal["triangle", "relu", "softmax", "identity"]
LINEAR = {"activation": ("identity",)}
"""Activations that do not read an exponent."""


class Activation(nn.Module):
    """Element by element, or against the other units (axis 1) of the same example and position.

    ``triangle``: ``relu(u - mean of u over the units) ** power``; ``relu``: ``relu(u) ** power``; ``softmax``: over the units, with
    ``power`` as inverse temperature; ``identity``.

    Args:
        kind: which.
        power: its exponent or inverse temperature.
    """

    def __init__(self, kind: Kind, power: float = 1.0) -> None:
        super().__init__()
        self.kind, self.power = kind, power

    def extra_repr(self) -> str:
        return f"{self.kind}, power={self.power:g}"

    def forward(self, u: Tensor) -> Tensor:
        """Map (N, K, ...) to the same shape."""
        if self.kind == "identity":
            return u
        if self.kind == "softmax":
            return (self.power * u).softmax(1)
        if self.kind == "triangle":
            u = u - u.mean(1, keepdim=True)
        positive = u.relu()
        if self.power == 1:
            return positive
        # a power below 1 has an infinite derivative at zero, which times zero would be no number in back-propagation
        return torch.where(u > 0, positive.clamp_min(torch.finfo(u.dtype).tiny).pow(self.power), positive)


class Pixels(nn.Module):
    """Undoes the task's normalisation: images in [0, 1], as the papers' rules see them.

    Args:
        spec: whose ``mean`` and ``std``, per channel, are undone.
    """

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__()
        shape = (1, -1) + (1,) * (len(spec.input_shape) - 1)
        self.register_buffer("mean", torch.tensor(spec.mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(shape), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, ...) to the same shape."""
        return x * self.get_buffer("std") + self.get_buffer("mean")


class UnitLength(nn.Module):
    """Each example divided by its euclidean norm (times a constant), perhaps without its mean.

    Args:
        length: of the result.
        centred: subtract the example's mean first.
    """

    def __init__(self, length: float = 1.0, *, centred: bool = False) -> None:
        super().__init__()
        self.length, self.centred = length, centred

    def extra_repr(self) -> str:
        return f"length={self.length:g}, centred={self.centred}"

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, ...) to the same shape."""
        if self.centred:
            x = x - x.flatten(1).mean(1).view(-1, *[1] * (x.dim() - 1))
        norms = torch.linalg.vector_norm(x.flatten(1), dim=1).clamp_min(1e-12)
        scaled: Tensor = x * (self.length / norms).view(-1, *[1] * (x.dim() - 1))
        return scaled


@dataclass
class MLPConfig:
    """Dense blocks with a linear readout; images are flattened."""

    widths: list[int] = option(factory=lambda: [16], help="units of each hidden layer", ge=1)
    activation: Kind = option("triangle", "after each hidden layer: triangle is relu(u - mean over units) ** power")
    power: float = option(1.0, "exponent of triangle and relu, inverse temperature of softmax", gt=0, unless=LINEAR)
    inputs: Literal["normalised", "pixels", "unit", "contrast"] = option(
        "normalised",
        "what the first layer sees: the task's normalised inputs; pixels in [0, 1]; these with length 1; without their mean, then length 1",
    )
    norm: Literal["none", "batch"] = option("none", "batch norm without weights before each hidden layer")
    standardise: bool = option(True, "batch norm without weights before the readout, so that one rate suits features of any scale")
    dropout: float = option(0.0, "dropout before the readout", ge=0, lt=1)


@dataclass(frozen=True)
class Layers:
    """Convolutional layers of a published network."""

    channels: list[int]
    kernels: list[int]
    powers: list[float]
    pools: list[str]


PRESETS = {
    "cifar": Layers([96, 384, 1536], [5, 3, 3], [0.7, 1.4, 1.0], ["max-4-2-1", "max-4-2-1", "avg-2-2-0"]),
    "stl10": Layers([96, 384, 1536, 6144], [5, 3, 3, 3], [0.7, 0.7, 1.4, 1.0], ["avg-4-2-1", "max-4-2-1", "avg-4-2-1", "avg-2-2-0"]),
}


@dataclass
class CNNConfig:
    """SoftHebb's convolutional networks."""

    preset: Literal["cifar", "stl10"] = option(
        "cifar",
        "published layers (cifar: 96-384-1536), where the lists below are empty",
        needs={"channels": ([],), "kernels": ([],), "powers": ([],), "pools": ([],)},
    )
    scale: float = option(1.0, "factor on the numbers of channels", gt=0)
    channels: list[int] = option(factory=list, help="output channels of each convolution", ge=1)
    kernels: list[int] = option(factory=list, help="widths of the kernels, odd (fewer than channels: the last one repeats)", ge=1)
    powers: list[float] = option(factory=list, help="exponents of the activations (fewer: the last one repeats)", gt=0, unless=LINEAR)
    pools: list[str] = option(factory=list, help="KIND-WIDTH-STRIDE-PADDING (max-4-2-1, avg-2-2-0) or none, after each")
    activation: Kind = option("triangle", "after each convolution: triangle is relu(u - mean over channels) ** power")
    dropout: float = option(0.5, "dropout before the readout", ge=0, lt=1)


def mlp(spec: TaskSpec, config: MLPConfig | None = None) -> Network:
    """Build hidden blocks ``b1``, ``b2``, ... (linear without bias, activation) and the linear block ``readout``."""
    config = config or MLPConfig()
    layers: list[nn.Module] = []
    if config.inputs != "normalised":
        layers.append(Pixels(spec))
    if len(spec.input_shape) > 1:
        layers.append(nn.Flatten())
    if config.inputs in ("unit", "contrast"):
        layers.append(UnitLength(centred=config.inputs == "contrast"))
    blocks: dict[str, nn.Module] = {}
    width = spec.input_size
    for index, units in enumerate(config.widths, start=1):
        layers += [nn.BatchNorm1d(width, affine=False)] if config.norm == "batch" else []
        layers += [nn.Linear(width, units, bias=False), Activation(config.activation, config.power)]
        blocks[f"b{index}"] = nn.Sequential(*layers)
        layers, width = [], units
    last: list[nn.Module] = [nn.BatchNorm1d(width, affine=False)] if config.standardise else []
    last += [nn.Dropout(config.dropout)] if config.dropout else []
    blocks["readout"] = nn.Sequential(*layers, *last, nn.Linear(width, spec.outputs))
    return Network(blocks, input_shape=spec.input_shape, readout="readout")


def cnn(spec: TaskSpec, config: CNNConfig | None = None) -> Network:
    """Build hidden blocks ``b1``, ``b2``, ... (batch norm, padding, convolution, activation, pooling) and ``readout``.

    Raises:
        UsageError: inputs that are no images, or too small; an even kernel; a pooling that is written otherwise.
    """
    config = config or CNNConfig()
    if len(spec.input_shape) != 3:
        raise UsageError(f"hebbian-cnn needs images (channels, height, width), not {spec.input_shape}", fix="use hebbian-mlp")
    preset = PRESETS[config.preset]
    channels = [max(1, round(config.scale * count)) for count in config.channels or preset.channels]
    kernels = each(config.kernels, preset.kernels, len(channels), "network.kernels")
    powers = each(config.powers, preset.powers, len(channels), "network.powers")
    pools = each(config.pools, preset.pools, len(channels), "network.pools")
    blocks: dict[str, nn.Module] = {}
    before, shape = spec.input_shape[0], torch.Size(spec.input_shape)
    for index, (count, kernel, power, pool) in enumerate(zip(channels, kernels, powers, pools, strict=True), start=1):
        if kernel % 2 == 0:
            raise UsageError("a kernel has an odd width, so that its output is as large as its input", where=f"network.kernels: {kernel}")
        if kernel // 2 >= min(shape[1:]):
            raise UsageError(
                f"maps of {shape[1]}x{shape[2]} are too small for a reflection padding of {kernel // 2}",
                where=f"block b{index}",
                fix="use a smaller network.kernels, fewer network.channels or poolings, or hebbian-mlp",
            )
        layers: list[nn.Module] = [nn.BatchNorm2d(before, affine=False)]
        layers += [nn.ReflectionPad2d(kernel // 2)] if kernel > 1 else []
        layers += [nn.Conv2d(before, count, kernel, bias=False), Activation(config.activation, power), *_pooling(pool)]
        name = f"b{index}"
        blocks[name] = nn.Sequential(*layers)
        before, shape = count, Network({name: blocks[name]}, input_shape=shape).shapes[name]
    last = [nn.Dropout(config.dropout)] if config.dropout else []
    size = shape.numel()
    blocks["readout"] = nn.Sequential(nn.Flatten(), *last, nn.Linear(size, spec.outputs))
    return Network(blocks, input_shape=spec.input_shape, readout="readout")


def _pooling(text: str) -> list[nn.Module]:
    if text == "none":
        return []
    kind, *sizes = text.split("-")
    if kind not in ("max", "avg") or len(sizes) != 3 or not all(size.isdigit() for size in sizes):
        raise UsageError(f"no such pooling: {text!r}", where="network.pools", fix="KIND-WIDTH-STRIDE-PADDING (max-4-2-1), or none")
    width, stride, padding = map(int, sizes)
    return [nn.MaxPool2d(width, stride, padding) if kind == "max" else nn.AvgPool2d(width, stride, padding)]


def each(chosen: list[Any], default: list[Any], count: int, where: str) -> list[Any]:
    """Return one value per layer, of the chosen values or else of the default; the last value is repeated.

    Raises:
        UsageError: more were chosen than there are layers.
    """
    if len(chosen) > count:
        raise UsageError(f"{len(chosen)} values for {count} layers", where=where, fix="one for each, or fewer: the last one repeats")
    values = chosen or default
    return (values + values[-1:] * count)[:count]


MLP = NetworkBuilder(mlp, MLPConfig, "dense layers without bias, triangle activation, linear readout")
CNN = NetworkBuilder(cnn, CNNConfig, "SoftHebb's convolutional networks: preset=cifar (96-384-1536) or stl10")
