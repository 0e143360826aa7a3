"""The linear layers and convolutions of a chain, in the order of execution, with what is executed between and behind them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from bpfree import Network
from bpfree.errors import UsageError

__all__ = ["Layer", "find_layers", "run"]

ELEMENTWISE = (
    *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Softplus, nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Hardtanh),
    nn.Identity,
)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Layer:
    """A linear layer or convolution, each of whose outputs is a neuron: a unit, or a channel.

    Attributes:
        name: path in the network's blocks, with ``/`` for dots, so that it can name a buffer's owner.
        module: the layer.
        before: what is executed between the layer below (or the input) and this one.
        behind: what follows it, up to the network's output.
        tail: what follows it up to the next layer.
    """

    name: str
    module: Any
    before: list[nn.Module]
    behind: list[nn.Module] = field(default_factory=list)
    tail: list[nn.Module] = field(default_factory=list)

    @property
    def neurons(self) -> int:
        """Number of outputs."""
        return len(self.module.weight)

    @property
    def numbers(self) -> int:
        """Weights of a neuron, with its bias where there is one."""
        return int(self.module.weight[0].numel()) + (self.module.bias is not None)

    @property
    def learns(self) -> bool:
        """Whether the layer may be changed; the bias goes with the weight."""
        return bool(self.module.weight.requires_grad)

    @property
    def axis(self) -> int:
        """Axis of the neurons in the layer's output."""
        return 1 if isinstance(self.module, _ConvNd) else -1

    @property
    def is_pointwise(self) -> bool:
        """Whether a neuron's output meets others in the next linear layer alone, so that a change of it is a change of rank one there."""
        plain = all(isinstance(part, (*ELEMENTWISE, _DropoutNd)) for part in self.tail)
        return plain and type(self.module) is nn.Linear and len(self.behind) > len(self.tail) and type(self.next) is nn.Linear

    @property
    def next(self) -> Any:
        """The layer above; there must be one."""
        return self.behind[len(self.tail)]

    def rows(self) -> Tensor:
        """Return the weights of each neuron with its bias as rows, (neurons, numbers): a copy."""
        weight, bias = self.module.weight.detach().flatten(1), self.module.bias
        return weight.clone() if bias is None else torch.cat([weight, bias.detach()[:, None]], 1)

    def write(self, rows: Tensor, first: int = 0) -> None:
        """Set the weights and biases of neurons from ``first`` on to rows (M, numbers)."""
        weight, bias = self.module.weight, self.module.bias
        chosen = slice(first, first + len(rows))
        weight[chosen] = rows[:, : weight[0].numel()].view(len(rows), *weight.shape[1:])
        if bias is not None:
            bias[chosen] = rows[:, -1]

    def execute(self, x: Tensor, rows: Tensor) -> Tensor:
        """Compute the pre-activations that M neurons with other weights would have, as one product: M in place of the layer's outputs.

        Args:
            x: (N, ...) the layer's input.
            rows: (M, numbers).
        """
        weight = rows[:, : self.module.weight[0].numel()].view(len(rows), *self.module.weight.shape[1:])
        bias = None if self.module.bias is None else rows[:, -1].contiguous()
        return self.module._conv_forward(x, weight, bias) if isinstance(self.module, _ConvNd) else F.linear(x, weight, bias)


def run(parts: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Execute modules one after the other."""
    for part in parts:
        x = part(x)
    return x


def find_layers(network: Network) -> list[Layer]:
    """Find the layers of a chain of blocks; the last one's ``behind`` ends with the network's output.

    Raises:
        UsageError: parameters of a linear layer are inside a module that is no ``nn.Sequential``, or a convolution has groups.
    """
    parts = [found for name, block in network.blocks.items() for found in _leaves(name, block)]
    places = [place for place, (_, part) in enumerate(parts) if type(part) in (nn.Linear, *CONVOLUTIONS)]
    modules = [part for _, part in parts]
    for name, part in parts:
        _check(name, part)
    if not places:
        raise UsageError("no linear layer or convolution was found", where="network", fix="set rule.swarm=network")
    found, start = [], 0
    for place, after in zip(places, [*places[1:], len(parts)], strict=True):
        name = parts[place][0].replace(".", "/")
        found.append(Layer(name, modules[place], modules[start:place], modules[place + 1 :], modules[place + 1 : after]))
        start = place + 1
    return found


def _leaves(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if type(module) is not nn.Sequential:
        yield name, module
        return
    for child, part in module.named_children():
        yield from _leaves(f"{name}.{child}", part)


def _check(name: str, part: nn.Module) -> None:
    inside = [path for path, child in part.named_modules() if path and isinstance(child, (nn.Linear, _ConvNd))]
    if inside:
        raise UsageError(
            f"the layers inside of {type(part).__name__} are not executed one after the other as far as can be seen",
            where=f"{name}.{inside[0]}",
            fix="set rule.swarm=network, or choose a network of layers in sequence (mlp, vgg)",
        )
    if isinstance(part, _ConvNd) and (type(part) not in CONVOLUTIONS or part.groups > 1):
        raise UsageError("swarms of neurons need convolutions without groups", where=name, fix="set rule.swarm=network")
