"""LocalMixer: an MLP-mixer whose every loss can be local to a block, a patch and a group of channels.

Ren, Kornblith, Liao, Hinton, "Scaling Forward Gradient With Local Losses" (arXiv 2210.03310); released code:
google-research/local_forward_gradient. Blocks hand on tokens (N, P, C), P patches with C channels in G groups. The layers that
torch does not have bring their gradients in closed form, so that a rule can train them without a reverse-mode call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.errors import UsageError
from bpfree.network.builders import NetworkBuilder
from bpfree.network.network import Network
from bpfree.options import option
from bpfree.tasks.task import TaskSpec

__all__ = [
    "LOCAL_MIXER",
    "GroupLinear",
    "LocalMixerConfig",
    "LocalNorm",
    "MeanTokens",
    "MixerBlock",
    "Patches",
    "TokenLinear",
    "local_mixer",
]

Init = Literal["kaiming", "constant"]
NOTHING = "none: the preset's"


class Sizes(NamedTuple):
    """Number of mixer blocks, patches per side, channels C, groups G."""

    blocks: int
    patches: int
    channels: int
    groups: int


PRESETS = {
    "custom": Sizes(blocks=2, patches=2, channels=128, groups=4),
    "S/1/1": Sizes(blocks=1, patches=1, channels=256, groups=1),
    "M/1/16": Sizes(blocks=1, patches=1, channels=512, groups=16),
    "M/8/16": Sizes(blocks=4, patches=8, channels=512, groups=16),
    "L/8/64": Sizes(blocks=4, patches=8, channels=2048, groups=64),
}


@dataclass
class LocalMixerConfig:
    """The network of Ren et al. 2022: the first block mixes channels, later ones also tokens."""

    preset: Literal["custom", "S/1/1", "M/1/16", "M/8/16", "L/8/64"] = option(
        "custom",
        "sizes of the paper (size/patches per side/groups), or custom: 2 blocks, 2 patches, 128 channels, 4 groups",
        needs=dict.fromkeys(Sizes._fields, (None,)),
    )
    blocks: int | None = option(None, f"number of mixer blocks; {NOTHING}", ge=1)
    patches: int | None = option(None, f"patches per side, which must divide the image; {NOTHING}", ge=1)
    channels: int | None = option(None, f"channels of each patch; {NOTHING}", ge=2)
    groups: int | None = option(None, f"groups of channels, which must divide them; {NOTHING}", ge=1)
    norm: Literal["both", "after"] = option(
        "both", "normalise before and after each linear map (the paper's text), or only after (the released CIFAR script's default)"
    )
    init: Init = option("kaiming", "deviation of the weights: min(2/sqrt(fan-in), 0.1), or constant: 0.1")

    def sizes(self) -> Sizes:
        """Return the preset's sizes, with those that are set beside the preset."""
        own = {name: getattr(self, name) for name in Sizes._fields}
        return PRESETS[self.preset]._replace(**{name: size for name, size in own.items() if size is not None})


class Patches(nn.Module):
    """Cuts images (N, channels, H, W) into non-overlapping patches: (N, P, H W channels / P).

    Patches are in the order of rows, then columns; a patch is flattened as height, width, channel. Vectors (N, F) are one patch.

    Args:
        patches: per side, the square root of P.
    """

    def __init__(self, patches: int) -> None:
        super().__init__()
        self.patches = patches

    def extra_repr(self) -> str:
        return f"{self.patches}"

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return x.unsqueeze(1)
        p, (count, channels, height, width) = self.patches, x.shape
        cut = x.reshape(count, channels, p, height // p, p, width // p)
        return cut.permute(0, 2, 4, 3, 5, 1).reshape(count, p * p, height * width * channels // p**2)


class LocalNorm(nn.Module):
    """Normalises the last axis in ``groups`` groups, each by its own mean and variance; it has no parameters.

    Args:
        groups: into which the last axis is cut.
        eps: added to the variance.
    """

    normalises = True

    def __init__(self, groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps

    def extra_repr(self) -> str:
        return f"groups={self.groups}"

    def forward(self, x: Tensor) -> Tensor:
        parts = self._by_group(x)
        return F.layer_norm(parts, parts.shape[-1:], eps=self.eps).reshape(x.shape)

    @torch.no_grad()
    def input_gradient(self, x: Tensor, signal: Tensor) -> Tensor:
        """Return dLoss/dInput = (d - mean d - xhat mean(d xhat)) / s, with the means over a group.

        Args:
            x: (..., C) the input.
            signal: (..., C) dLoss/dOutput, d.
        """
        parts = self._by_group(x)
        hat, _, inverse = torch.native_layer_norm(parts, parts.shape[-1:], None, None, self.eps)
        d = self._by_group(signal).to(hat.dtype)
        along = torch.linalg.vecdot(d, hat).unsqueeze(-1) / parts.shape[-1]
        removed = hat.mul_(along).add_(d.mean(-1, keepdim=True))
        return removed.sub_(d).mul_(inverse.neg()).reshape(x.shape)

    def _by_group(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], self.groups, x.shape[-1] // self.groups)


class GroupLinear(nn.Module):
    """A linear map of each group's channels to themselves: y_gj = sum_i x_gi W_gij + b_gj, on (..., inputs).

    Args:
        groups: G, which divides both sizes.
        inputs: channels of the input.
        outputs: channels of the output.

    Attributes:
        weight: (G, inputs/G, outputs/G).
        bias: (outputs,).
        rows: G; each entry of the weight's first axis makes a run of the output's channels.

    Raises:
        UsageError: if the groups do not divide the channels.
    """

    def __init__(self, groups: int, inputs: int, outputs: int) -> None:
        super().__init__()
        if inputs % groups or outputs % groups:
            raise UsageError(f"{groups} groups do not divide {inputs} and {outputs} channels", where="GroupLinear")
        self.groups, self.inputs, self.outputs, self.rows = groups, inputs, outputs, groups
        self.weight = nn.Parameter(torch.empty(groups, inputs // groups, outputs // groups))
        self.bias = nn.Parameter(torch.empty(outputs))
        initialise(self)

    def extra_repr(self) -> str:
        return f"groups={self.groups}, inputs={self.inputs}, outputs={self.outputs}"

    def forward(self, x: Tensor) -> Tensor:
        y = torch.baddbmm(self.bias.view(self.groups, 1, -1), self._by_group(x), self.weight)
        return y.transpose(0, 1).reshape(*x.shape[:-1], self.outputs)

    @torch.no_grad()
    def parameter_gradients(self, x: Tensor, signal: Tensor) -> dict[str, Tensor]:
        """Multiply input (..., inputs) and signal (..., outputs) in each group, summed over all axes but the channels."""
        x, signal = x.to(self.weight.dtype), signal.to(self.weight.dtype)
        weight = torch.bmm(self._by_group(x).transpose(1, 2), self._by_group(signal))
        return {"weight": weight, "bias": signal.reshape(-1, self.outputs).sum(0)}

    @torch.no_grad()
    def input_gradient(self, x: Tensor, signal: Tensor) -> Tensor:
        """Return dLoss/dInput (..., inputs) from dLoss/dOutput (..., outputs)."""
        products = torch.bmm(self._by_group(signal), self.weight.to(signal.dtype).transpose(1, 2))
        return products.transpose(0, 1).reshape(x.shape)

    def _by_group(self, x: Tensor) -> Tensor:
        """View (..., C) as (G, M, C/G)."""
        return x.reshape(math.prod(x.shape[:-1]), self.groups, x.shape[-1] // self.groups).transpose(0, 1)


class TokenLinear(nn.Module):
    """A linear map over the tokens that all channels share: y_qc = sum_p W_qp x_pc + b_q, on (N, P, C).

    Args:
        tokens: P.

    Attributes:
        weight: (P, P), outputs first.
        bias: (P,).
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.weight = nn.Parameter(torch.empty(tokens, tokens))
        self.bias = nn.Parameter(torch.empty(tokens))
        initialise(self)

    def extra_repr(self) -> str:
        return f"{self.tokens}"

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias.unsqueeze(1), self.weight.expand(len(x), -1, -1), x)

    @torch.no_grad()
    def parameter_gradients(self, x: Tensor, signal: Tensor) -> dict[str, Tensor]:
        """Multiply signal and input (N, P, C), summed over examples and channels."""
        x, signal = x.to(self.weight.dtype), signal.to(self.weight.dtype)
        return {"weight": torch.bmm(signal, x.transpose(1, 2)).sum(0), "bias": signal.sum((0, 2))}

    @torch.no_grad()
    def input_gradient(self, x: Tensor, signal: Tensor) -> Tensor:
        """Return dLoss/dInput from dLoss/dOutput, both (N, P, C)."""
        return torch.bmm(self.weight.to(signal.dtype).t().expand(len(x), -1, -1), signal)


class MeanTokens(nn.Module):
    """The mean over the tokens: (N, P, C) to (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class MixerBlock(nn.Module):
    """``relu(layers(x))``, or ``relu(x + layers(x))``.

    Args:
        layers: in order, by name.
        groups: G, into which the channels of the output are cut; local losses follow it.
        residual: whether the input is added.
    """

    def __init__(self, layers: Mapping[str, nn.Module], groups: int, residual: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        for name, layer in layers.items():
            self.layers.add_module(name, layer)
        self.relu = nn.ReLU()
        self.groups, self.residual = groups, residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return self.relu(x + y if self.residual else y)  # type: ignore[no-any-return]


@torch.no_grad()
def initialise(layer: nn.Linear | GroupLinear | TokenLinear, init: Init = "kaiming") -> nn.Module:
    """Draw the weights from N(0, s^2), with s = min(2 / sqrt(fan-in), 0.1) or s = 0.1; biases are zero."""
    fan_in = layer.weight.shape[1]  # of all three kinds
    nn.init.normal_(layer.weight, std=min(2 / math.sqrt(fan_in), 0.1) if init == "kaiming" else 0.1)
    nn.init.zeros_(layer.bias)
    return layer


def stage(name: str, layer: nn.Linear | GroupLinear | TokenLinear, config: LocalMixerConfig, groups: int = 1) -> dict[str, nn.Module]:
    """Build a linear map with the normalisations around it."""
    before: dict[str, nn.Module] = {f"{name}_before": LocalNorm(groups)} if config.norm == "both" else {}
    return {**before, name: initialise(layer, config.init), f"{name}_after": LocalNorm(groups)}


def first_block(inputs: int, sizes: Sizes, config: LocalMixerConfig) -> MixerBlock:
    """Build the first block: patches, a linear map of each patch, and the group-linear map."""
    channels, groups = sizes.channels, sizes.groups
    layers: dict[str, nn.Module] = {"patches": Patches(sizes.patches)}
    layers |= stage("channel", nn.Linear(inputs, channels), config) | {"channel_relu": nn.ReLU()}
    layers |= stage("group", GroupLinear(groups, channels, channels), config, groups)
    return MixerBlock(layers, groups, residual=False)


def later_block(sizes: Sizes, config: LocalMixerConfig) -> MixerBlock:
    """Build a later block: token mixing, channel mixing and the group-linear map, around which the input is added."""
    channels, groups = sizes.channels, sizes.groups
    layers = stage("token", TokenLinear(sizes.patches**2), config) | {"token_relu": nn.ReLU()}
    layers |= stage("channel", nn.Linear(channels, channels), config) | {"channel_relu": nn.ReLU()}
    layers |= stage("group", GroupLinear(groups, channels, channels), config, groups)
    return MixerBlock(layers, groups, residual=True)


def local_mixer(spec: TaskSpec, config: LocalMixerConfig | None = None) -> Network:
    """Build blocks ``b1``, ``b2``, ... on tokens (N, P, C) and the block ``readout``: their mean and a linear map, zero at first.

    Raises:
        UsageError: if the inputs are no images (vectors are taken as one patch), or patches or groups do not divide them.
    """
    config = config or LocalMixerConfig()
    sizes = config.sizes()
    check_sizes(spec, sizes, config)
    blocks: dict[str, nn.Module] = {"b1": first_block(spec.input_size // sizes.patches**2, sizes, config)}
    for index in range(2, sizes.blocks + 1):
        blocks[f"b{index}"] = later_block(sizes, config)
    linear = nn.Linear(sizes.channels, spec.outputs)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    blocks["readout"] = nn.Sequential(MeanTokens(), linear)
    return Network(blocks, input_shape=spec.input_shape, readout="readout")


def check_sizes(spec: TaskSpec, sizes: Sizes, config: LocalMixerConfig) -> None:
    shape = tuple(spec.input_shape)
    if len(shape) != 3 and not (len(shape) == 1 and sizes.patches == 1):
        fix = "set network.patches=1, which takes a vector as one patch" if len(shape) == 1 else "use network=mlp"
        raise UsageError(f"local-mixer needs images (channels, height, width), not inputs of shape {shape}", fix=fix)
    # A value that is normalised alone is always zero.
    alone = config.norm == "both" and math.prod(shape) == sizes.patches**2
    if alone or (len(shape) == 3 and (shape[1] % sizes.patches or shape[2] % sizes.patches)):
        side = math.gcd(*shape[1:]) if len(shape) == 3 else 1
        valid = [p for p in divisors(side) if config.norm == "after" or math.prod(shape) > p * p]
        what = "patches of one value cannot be normalised" if alone else f"{sizes.patches} patches per side do not divide the image"
        raise UsageError(f"{what}: inputs of shape {shape}", where="network.patches", fix=choices("network.patches", valid))
    if sizes.channels % sizes.groups or sizes.channels == sizes.groups:
        raise UsageError(
            f"{sizes.groups} groups do not divide {sizes.channels} channels into groups of two or more",
            where="network.groups",
            fix=choices("network.groups", [g for g in divisors(sizes.channels) if g < sizes.channels]),
        )


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def choices(key: str, values: list[int]) -> str:
    return f"set {key} to one of {', '.join(map(str, values))}" if values else "use network=mlp"


LOCAL_MIXER = NetworkBuilder(local_mixer, LocalMixerConfig, "an MLP-mixer of patches and groups of channels, for local losses")
