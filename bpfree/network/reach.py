"""The outputs that a site influences: measured by a derivative, not read from the layers' names.

A forward gradient multiplies noise by the derivative of the losses that the noise reaches. The fewer these are, the less noise from
elsewhere is in that scalar; to leave out one that is reached would bias the estimate. So each site is probed in a copy of the
module with random parameters: noise on half of the examples, of the tokens, of the groups of channels; what moves is reached. The halves
are those of the binary digits of a token's or group's number, so that any two of them are apart in one of the probes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bpfree.network.perturb import Perturber
from bpfree.network.sites import RELU_FUNCTIONS, Site

__all__ = ["Reach", "by_channel", "channel_axis", "probe", "token_axis"]

EXAMPLES = 4
DROPOUT_FUNCTIONS = {"dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"}


@dataclass(frozen=True)
class Reach:
    """Outputs that a site's noise does not move: of other examples, tokens or groups of channels.

    Attributes:
        examples: each example's noise reaches that example's output only.
        tokens: each token's noise reaches that token's output only; site and output have the same number of tokens.
        groups: each group's noise reaches that group's output only; there are several, which divide the channels of site and output.
    """

    examples: bool
    tokens: bool
    groups: bool


def channel_axis(shape: torch.Size) -> int:
    """Return the axis of the channels in a shape without batch axis: (C,), (tokens, C) or (C, height, width)."""
    return 0 if len(shape) == 3 else len(shape) - 1


def token_axis(shape: torch.Size) -> int | None:
    """Return the axis of the tokens in a shape without batch axis, if it has one."""
    return 0 if len(shape) == 2 else None


def by_channel(shape: torch.Size, groups: int) -> Tensor:
    """Return the group of each channel, shaped to broadcast over (N, *shape); groups are runs of neighbouring channels."""
    axis = channel_axis(shape)
    view = [1] * (len(shape) + 1)
    view[axis + 1] = shape[axis]
    return torch.arange(groups).repeat_interleave(shape[axis] // groups).view(view)


def probe(module: nn.Module, sites: Sequence[Site], input_shape: torch.Size, groups: int = 1) -> list[Reach]:
    """Measure the reach of each site.

    Args:
        module: in the mode in which it will train; it is copied, not executed.
        sites: in the module.
        input_shape: of one input, without the batch axis.
        groups: of channels of the output.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad(), _Open():
        torch.default_generator.manual_seed(0)
        perturber = Perturber(_random(copy.deepcopy(module).cpu().double()), quick=False)
        x = torch.randn(EXAMPLES, *input_shape, dtype=torch.float64)
        apart = _stays(perturber, sites, x, _by_example)  # the usual case, which costs one execution
        return [_measure(perturber, site, x, groups, apart) for site in sites]


def _measure(perturber: Perturber, site: Site, x: Tensor, groups: int, apart: bool) -> Reach:
    def by_group(shape: torch.Size) -> Tensor | None:
        divided = groups > 1 and shape[channel_axis(shape)] % groups == 0
        return by_channel(shape, groups) if divided else None

    examples = apart or _stays(perturber, [site], x, _by_example)
    x = x[: EXAMPLES // 2] if examples else x  # where examples do not meet, half of them suffice
    return Reach(examples, _stays(perturber, [site], x, _by_token), _stays(perturber, [site], x, by_group))


def _by_example(shape: torch.Size) -> Tensor:
    """Assign the examples to two halves."""
    return (torch.arange(EXAMPLES) * 2 // EXAMPLES).view(-1, *[1] * len(shape))


def _by_token(shape: torch.Size) -> Tensor | None:
    axis = token_axis(shape)
    return None if axis is None else torch.arange(shape[axis]).view(1, -1, *[1] * (len(shape) - 1))


def _stays(perturber: Perturber, sites: Sequence[Site], x: Tensor, number: Callable[[torch.Size], Tensor | None]) -> bool:
    """Tell whether noise on the parts of a site moves only parts of the same number.

    Args:
        perturber: of the copy.
        sites: which get noise at once.
        x: the examples.
        number: the number of each entry's part, by the shape without batch axis; ``None``: it has no such parts.
    """
    parts = [number(site.shape) for site in sites]
    if any(part is None for part in parts):
        return False
    count = max((int(part.max()) + 1 for part in parts if part is not None), default=1)
    for bit in range(max(1, (count - 1).bit_length())):
        for value in (0, 1):
            regions = [(part >> bit & 1) == value for part in parts if part is not None]
            noise = [torch.randn(1, len(x), *site.shape, dtype=x.dtype) * region for site, region in zip(sites, regions, strict=True)]
            if not noise:
                return True
            tangent = perturber.execute(x, sites, noise, mask=False).tangent
            assert tangent is not None
            moved = number(tangent.shape[2:])
            if moved is None or int(moved.max()) + 1 != count or bool(((tangent[0] != 0) & ((moved >> bit & 1) != value)).any()):
                return False
    return True


def _random(module: nn.Module) -> nn.Module:
    """Draw random parameters, so that no path is closed by a zero."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


class _Open(TorchFunctionMode):
    """Replaces ReLUs by leaky units and disables dropout, in modules or functions, so that no path is closed by chance."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        x = args[0] if args else kwargs.get("input")
        if name in RELU_FUNCTIONS:
            return F.leaky_relu(x, 0.3, inplace=name == "relu_" or kwargs.get("inplace", len(args) > 1 and args[1]))
        if name in DROPOUT_FUNCTIONS:
            return x
        if name in ("bernoulli", "bernoulli_"):  # of a random depth
            return x.fill_(1) if name == "bernoulli_" else torch.ones_like(x)
        return func(*args, **kwargs)
