"""Time-conditioned denoising blocks: one block for all times, whose inputs are the time, the input and the state.

Its first joint layer is linear, so what depends on the input alone (``features``) is computed once per image, and what depends on the
time alone (``moments``) once for all images and steps: the layer on the concatenated paths is the sum of one on each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bpfree.network.builders import NetworkBuilder
from bpfree.network.network import Network
from bpfree.options import option
from bpfree.tasks.task import TaskSpec
from bpfree_noprop.blocks import LabelBlock, check_inputs, check_sizes, label_stem
from bpfree_noprop.dropout import KeyedDropout
from bpfree_noprop.embeddings import target_size

__all__ = ["NETWORKS", "TimeEmbedding", "TimedBlock"]

FASTEST = 1000.0
"""Highest angular frequency of the time's embedding; the lowest is 1."""


@dataclass
class TimedConfig:
    """What the networks of continuous time have in common."""

    state_dim: int | None = option(None, "dimension d of the noised label; none: the number of classes, labels or real values", ge=1)
    label: Literal["vector", "input"] = option(
        "vector", "path of the noised label: linear layers, or (input) a stem like the input's, for prototypes"
    )


@dataclass
class TimedMLPConfig(TimedConfig):
    """A narrow block for vectors and tiny images."""

    width: int = option(128, "units of each layer", ge=1)
    depth: int = option(2, "layers between the joined paths and the logits", ge=0)


@dataclass
class TimedCNNConfig(TimedConfig):
    """A small convolutional block for images of at least 16x16 pixels."""

    channels: int = option(16, "channels of the first convolution, doubled by the second", ge=1)
    width: int = option(128, "units of each linear layer", ge=1)


@dataclass
class TimedPaperConfig(TimedConfig):
    """The continuous-time block of the paper's Figure 6."""

    dropout: float = option(0.2, "dropout after each convolution", ge=0, lt=1)


class TimeEmbedding(nn.Module):
    """Sines and cosines of a time in [0, 1] at frequencies from 1 to 1000, evenly spaced in their logarithm: (K,) to (K, dim).

    The paper gives the dimension (64), not the frequencies.
    """

    frequencies: Tensor

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(0, math.log10(FASTEST), dim // 2), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class TimedBlock(LabelBlock):
    """``logits = out(fuse(join(stem(x), label(z), time(t))))``.

    Args:
        stem: (N, *input_shape) to (N, F).
        label: (N, d) to (N, F).
        time: (K,) to (K, F).
        width: F.
        joined: J; the three paths meet in a linear layer of 3F inputs and J outputs.
        fuse: what follows it: (N, J) to (N, L), beginning with the activation.
        out: (N, L) to (N, m).
        state_dim: d.
    """

    time: nn.Module
    join: nn.ModuleDict

    def __init__(
        self, stem: nn.Module, label: nn.Module, time: nn.Module, width: int, joined: int, fuse: nn.Module, out: nn.Linear, state_dim: int
    ) -> None:
        whole = nn.Linear(3 * width, joined)
        join = {name: nn.Linear(width, joined, bias=name == "stem") for name in ("stem", "label", "time")}
        with torch.no_grad():  # as the whole layer would begin
            for part, weight in zip(join.values(), whole.weight.split(width, dim=1), strict=True):
                part.weight.copy_(weight)
            join["stem"].bias.copy_(whole.bias)
        super().__init__(state_dim, stem=stem, label=label, time=time, join=nn.ModuleDict(join), fuse=fuse, out=out)

    def features(self, x: Any) -> Tensor:
        """Return (N, J): what the block computes from the input alone."""
        return self.join["stem"](self.stem(x))  # type: ignore[no-any-return]

    def moments(self, t: Tensor) -> Tensor:
        """Return (K, J): what the block computes from times (K,) alone."""
        return self.join["time"](self.time(t))  # type: ignore[no-any-return]

    def judge(self, features: Tensor, z: Tensor, moments: Tensor) -> Tensor:
        """Return logits (N, m) of input features (N, J) and a state (N, d) at moments (N, J), or at one for all, (J,) or (1, J)."""
        return self.out(self.hidden(features, z, moments))  # type: ignore[no-any-return]

    def hidden(self, features: Tensor, z: Tensor, moments: Tensor) -> Tensor:
        """Return activities (N, L) before the last linear map; arguments as for :meth:`judge`."""
        return self.fuse(features + self.join["label"](self.label(z)) + moments)  # type: ignore[no-any-return]

    def blind(self, x: Any) -> Tensor:
        """Return activities before the last linear map at t = 0, where the state is noise."""
        return self.hidden(self.features(x), self.no_label(x), self.moments(self.out.weight.new_zeros(1)))

    def forward(self, x: Any, z: Tensor, t: Tensor) -> Tensor:
        return self.judge(self.features(x), z, self.moments(t))


def plain(inputs: int, outputs: int) -> list[nn.Module]:
    """Build a linear layer and ReLU, without batch norm, whose statistics would mix all noise levels."""
    return [nn.Linear(inputs, outputs), nn.ReLU()]


def assemble(stem: nn.Module, label: nn.Module, sizes: list[int], width: int, outputs: int, d: int) -> TimedBlock:
    """Assemble a block from its paths, each of ``width`` outputs, and fusing layers of these sizes."""
    layers: list[nn.Module] = [nn.ReLU()]
    for before, after in itertools.pairwise(sizes):
        layers += plain(before, after)
    time = nn.Sequential(TimeEmbedding(), *plain(64, width))
    return TimedBlock(stem, label, time, width, sizes[0], nn.Sequential(*layers), nn.Linear(sizes[-1], outputs), d)


def mlp_block(spec: TaskSpec, config: TimedMLPConfig, d: int) -> TimedBlock:
    width = config.width

    def stem() -> nn.Sequential:
        return nn.Sequential(nn.Flatten(), *plain(spec.input_size, width), *plain(width, width))

    label = stem() if config.label == "input" else nn.Sequential(*plain(d, width))
    return assemble(stem(), label, [width] * (config.depth + 1), width, target_size(spec), d)


def cnn_block(spec: TaskSpec, config: TimedCNNConfig, d: int) -> TimedBlock:
    channels, height, width = spec.input_shape
    first, second = config.channels, 2 * config.channels

    def stem(norm: Callable[[int], nn.Module]) -> nn.Sequential:
        layers = nn.Sequential(
            *(nn.Conv2d(channels, first, 5, stride=2, padding=2), norm(first), nn.ReLU()),
            *(nn.Conv2d(first, second, 3, padding=1), nn.MaxPool2d(2), norm(second), nn.ReLU()),
            *(nn.Flatten(), *plain(second * ((height + 1) // 4) * ((width + 1) // 4), config.width)),
        )
        return layers.to(memory_format=torch.channels_last)  # a quarter faster on a CPU

    label = label_stem(spec, stem(lambda width: nn.Identity())) if config.label == "input" else nn.Sequential(*plain(d, config.width))
    return assemble(stem(nn.BatchNorm2d), label, [config.width] * 2, config.width, target_size(spec), d)


def paper_block(spec: TaskSpec, config: TimedPaperConfig, d: int) -> TimedBlock:
    channels, height, width = spec.input_shape

    def stem() -> nn.Sequential:
        layers = nn.Sequential(
            *(nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), KeyedDropout(config.dropout)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), KeyedDropout(config.dropout)),
            *(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), KeyedDropout(config.dropout)),
            *(nn.Flatten(), *plain(128 * (height // 4) * (width // 4), 256)),
        )
        return layers.to(memory_format=torch.channels_last)  # a block's step takes 0.86 of the time on a CPU

    label = label_stem(spec, stem()) if config.label == "input" else nn.Sequential(*plain(d, 256))
    return assemble(stem(), label, [256, 128], 256, target_size(spec), d)


def builder(make: Callable[[TaskSpec, Any, int], TimedBlock], options: type[TimedConfig], summary: str, *, images: bool) -> NetworkBuilder:
    """Return a builder of networks with one block named ``block``, from its maker."""

    def build(spec: TaskSpec, config: TimedConfig | None = None) -> Network:
        config = options() if config is None else config
        d = config.state_dim if config.state_dim is not None else target_size(spec)
        check_inputs(spec, instead="noprop-timed")
        check_sizes(spec, config.label, d, images, instead="noprop-timed-mlp")
        return Network({"block": make(spec, config, d)}, input_shape=spec.input_shape, readout=None, chain=False)

    return NetworkBuilder(build, options, summary)


NETWORKS = {
    "noprop-timed-mlp": builder(mlp_block, TimedMLPConfig, "a narrow block that gets the time, for vectors (NoProp)", images=False),
    "noprop-timed-cnn": builder(cnn_block, TimedCNNConfig, "a small convolutional block that gets the time (NoProp)", images=True),
    "noprop-timed-paper": builder(paper_block, TimedPaperConfig, "the block of the NoProp paper's Figure 6, continuous time", images=True),
}
