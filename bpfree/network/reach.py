"""Which outputs a site influences: measured by a derivative, not read from the layers' names.

A forward gradient multiplies noise by the derivative of the losses that the noise reaches. The fewer these are, the less noise from
elsewhere is in that scalar; to leave out one that is reached would bias the estimate. So each site is probed: noise on half
of the examples, one token and one group of channels, in a copy with random parameters; what moves is reached.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bpfree.network.perturb import Perturber
from bpfree.network.sites import Site

__all__ = ["Reach", "by_channel", "channel_axis", "probe", "token_axis"]

EXAMPLES = 8


@dataclass(frozen=True)
class Reach:
    """What a site's noise leaves alone: where it moves no output of other examples, tokens or groups of channels.

    Attributes:
        examples: each example's noise reaches that example's output only.
        tokens: each token's noise reaches that token's output only.
        groups: each group's noise reaches that group's output only.
    """

    examples: bool
    tokens: bool
    groups: bool


def channel_axis(shape: torch.Size) -> int:
    """The axis of the channels in a shape without batch axis: (C,), (tokens, C) or (C, height, width)."""
    return 0 if len(shape) == 3 else len(shape) - 1


def token_axis(shape: torch.Size) -> int | None:
    """The axis of the tokens in a shape without batch axis, if it has one."""
    return 0 if len(shape) == 2 else None


def by_channel(shape: torch.Size, groups: int) -> Tensor:
    """The group of each channel, shaped to broadcast over (N, *shape); groups are runs of neighbouring channels."""
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
    with torch.random.fork_rng():
        torch.manual_seed(0)
        perturber = Perturber(_smooth(copy.deepcopy(module).cpu().double()))
        x = torch.randn(EXAMPLES, *input_shape, dtype=torch.float64)
        found = [[_probe_once(perturber, site, x, groups, last) for last in (False, True)] for site in sites]
    return [Reach(*(all(part) for part in zip(*pair, strict=True))) for pair in found]


def _probe_once(perturber: Perturber, site: Site, x: Tensor, groups: int, last: bool) -> tuple[bool, bool, bool]:
    region = torch.ones(EXAMPLES, *site.shape, dtype=torch.bool)
    region[EXAMPLES // 2 :] = False
    tokens, grouped = token_axis(site.shape), site.shape[channel_axis(site.shape)] % groups == 0
    chosen_token, chosen_group = (-1, groups - 1) if last else (0, 0)
    if tokens is not None:
        other = torch.ones(site.shape[0], dtype=torch.bool)
        other[chosen_token] = False
        region[:, other] = False
    if grouped:
        region &= by_channel(site.shape, groups) == chosen_group
    noise = torch.randn(1, EXAMPLES, *site.shape, dtype=torch.float64) * region
    tangent = perturber.execute(x, [site], [noise], mask=False).tangent
    assert tangent is not None
    moved = tangent[0] != 0
    return _outside(moved, chosen_token, chosen_group, groups, tokens is not None, grouped)


def _outside(moved: Tensor, token: int, group: int, groups: int, tokens: bool, grouped: bool) -> tuple[bool, bool, bool]:
    shape = moved.shape[1:]
    examples = not bool(moved[EXAMPLES // 2 :].any())
    own_token = tokens and token_axis(shape) is not None and not bool(moved[:, slice(1, None) if token == 0 else slice(None, -1)].any())
    divided = groups > 1 and grouped and shape[channel_axis(shape)] % groups == 0
    own_group = divided and not bool((moved & (by_channel(shape, groups) != group)).any())
    return examples, own_token, own_group


def _smooth(module: nn.Module) -> nn.Module:
    """Random parameters, and leaky units in place of ReLUs, so that no path is closed by chance; no dropout."""
    for parent in list(module.modules()):
        if isinstance(parent, nn.modules.dropout._DropoutNd):
            parent.eval()
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(parent, name, nn.LeakyReLU(0.3))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module
