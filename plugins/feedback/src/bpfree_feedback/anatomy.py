"""Blocks taken apart: the weights of a block, its nonlinearity, and executions of it that keep what both saw.

A rule that computes credit from activity needs more of a block than its output: what its linear map took and made, and what its
nonlinearity made of that, before a pooling or a dropout changes it further.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bpfree import Network, Trace, UsageError
from bpfree.network import recorded_calls
from bpfree.network.closed_form import CONVOLUTIONS, is_linear

__all__ = ["NONLINEARITIES", "RATES", "Anatomy", "Seen", "pulled", "take_apart", "watched"]

RATES = (nn.Sigmoid, nn.Hardsigmoid, nn.ReLU, nn.Softplus)
"""Nonlinearities whose outputs are never negative, as event rates are."""
NONLINEARITIES = (*RATES, nn.Tanh, nn.Hardtanh, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.ELU, nn.SELU, nn.ReLU6, nn.Hardswish)
RESHAPES = (nn.Flatten, nn.Identity)


@dataclass(frozen=True)
class Anatomy:
    """The parts of a block.

    Attributes:
        name: of the block.
        block: the block.
        site: its linear layer or convolution.
        activation: its last nonlinearity; ``None``: it has none.
        plain: whether nothing but the site, reshapes and a sigmoid right behind the site is executed, so that everything that credit
            passes on its way between two sites is known in closed form.
    """

    name: str
    block: nn.Module
    site: Any
    activation: nn.Module | None
    plain: bool

    @property
    def learns(self) -> bool:
        """Whether the site has a parameter that learns now."""
        return any(parameter.requires_grad for parameter in self.site.parameters())


def take_apart(network: Network, extra: tuple[type[nn.Module], ...] = ()) -> list[Anatomy]:
    """Take each block of a network apart, the readout last.

    Args:
        network: a chain.
        extra: further nonlinearities.

    Raises:
        UsageError: a block does not have exactly one linear layer or convolution, or a readout goes on after it.
    """
    found = []
    for name, block in network.blocks.items():
        layers = [layer for layer in block.modules() if not any(True for _ in layer.children())]
        sites = [layer for layer in layers if (type(layer) is nn.Linear or type(layer) in CONVOLUTIONS) and is_linear(layer)]
        others = [part for part in block.modules() if part not in sites and any(p.dim() > 1 for p in part.parameters(recurse=False))]
        if len(sites) != 1 or others:
            what = f"block {name!r} has {len(sites)} linear layers or convolutions"
            what += f" beside {type(others[0]).__name__}" if others else ""
            raise UsageError(what, fix="use a network whose blocks have one each: mlp, vgg, or a chain that is cut at each of them")
        place = layers.index(sites[0])
        behind = [layer for layer in layers[place + 1 :] if isinstance(layer, NONLINEARITIES + extra)]
        if name == network.readout and any(not isinstance(layer, RESHAPES) for layer in layers[place + 1 :]):
            what = f"the readout {name!r} goes on after its linear layer"
            raise UsageError(what, fix="end it with the linear layer that makes the scores")
        around = [*layers[:place], *(layer for layer in layers[place + 1 :] if layer not in behind)]
        plain = all(isinstance(layer, RESHAPES) for layer in around) and [type(layer) for layer in behind] in ([nn.Sigmoid], [])
        plain = plain and (layers[place + 1 : place + 2] == behind[:1]) and _is_flat(block)
        found.append(Anatomy(name, block, sites[0], behind[-1] if behind else None, plain))
    return found


def _is_flat(block: nn.Module) -> bool:
    """Tell whether a block executes its layers in order, and does nothing else."""
    parts = [part for part in block.modules() if any(True for _ in part.children())]
    return all(type(part) is nn.Sequential for part in parts)


@dataclass(frozen=True)
class Seen:
    """What an execution of a block showed.

    Attributes:
        anatomy: of the block.
        trace: the execution.
        source: (N, ...) what the site took.
        u: (N, ...) what it made.
        rate: (N, ...) what the nonlinearity made of that; ``u`` itself where there is none.
    """

    anatomy: Anatomy
    trace: Trace
    source: Tensor
    u: Tensor
    rate: Tensor

    @property
    def response(self) -> Tensor:
        """The block's output, with its dropout mask, where it has the shape of ``u``; else (before a pooling) the nonlinearity's."""
        return self.trace.output if self.trace.output.shape == self.u.shape else self.rate


@contextmanager
def watched(anatomies: Iterable[Anatomy]) -> Iterator[Any]:
    """Yield a function that tells what the latest execution of a block inside showed: ``seen(anatomy, trace)``."""
    anatomies = list(anatomies)
    layers = [layer for one in anatomies for layer in (one.site, one.activation) if layer is not None]
    with recorded_calls(*layers) as calls:

        def seen(anatomy: Anatomy, trace: Trace) -> Seen:
            source, u = calls[anatomy.site].pop()
            rate = u if anatomy.activation is None else calls[anatomy.activation].pop().output
            return Seen(anatomy, trace, source, u, rate)

        yield seen


def pulled(output: Tensor, source: Tensor, signal: Tensor) -> Tensor:
    """Return the vector-Jacobian product of ``signal`` from ``output`` down to ``source``, which are of one graph, or the same tensor."""
    if output is source:
        return signal
    return torch.autograd.grad(output, source, signal.to(output.dtype), retain_graph=True)[0]
