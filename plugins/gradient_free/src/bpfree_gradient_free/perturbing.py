"""Noise on the weights of a population, and the network's outputs with it: by whole tensors, or of low rank inside of layers.

A layer's weights of member i are ``W + sigma E_i``. With noise of low rank, ``E = A B^T / sqrt(r)``, the layer's output is ``W x + sigma
A (B^T x) / sqrt(r)``: one product with W for all members, and two thin ones for each (EGGROLL: Sarkar et al., arXiv 2511.16652).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree import Network
from bpfree_gradient_free.evaluating import outputs_of_stacks

__all__ = ["Low", "Noise", "draw", "outputs", "thin_layers", "weighted"]


@dataclass
class Low:
    """Noise of rank r on a matrix, or on a kernel as a matrix: A B^T / sqrt(r).

    Attributes:
        a: (M, outputs, r).
        b: (M, inputs, r).
        shape: of the parameter.
    """

    a: Tensor
    b: Tensor
    shape: torch.Size

    def dense(self) -> Tensor:
        """Return the noise itself, (M, *shape)."""
        return (self.a @ self.b.mT).div_(math.sqrt(self.a.shape[2])).view(-1, *self.shape)

    def mirrored(self) -> Low:
        """Return the noise followed by its opposite."""
        return Low(torch.cat([self.a, -self.a]), torch.cat([self.b, self.b]), self.shape)

    def weighted(self, weights: Tensor) -> Tensor:
        """Return the sum of the members' noise times their weights (M,), as one product."""
        scaled = self.a * (weights / math.sqrt(self.a.shape[2]))[:, None, None]
        return (scaled.movedim(1, 0).flatten(1) @ self.b.movedim(1, 0).flatten(1).mT).view(self.shape)


Noise = dict[str, Tensor | Low]
"""By the names of parameters: (M, ...), or of low rank."""


def draw(parameters: Mapping[str, nn.Parameter], count: int, rank: int, generator: torch.Generator) -> Noise:
    """Draw normal noise for ``count`` members: of full rank in one call, or of rank ``rank`` for tensors of two axes or more."""
    low = {name: rank for name, p in parameters.items() if rank and p.dim() > 1 and rank * (len(p) + p[0].numel()) < p.numel()}
    sizes = [rank * (len(p) + p[0].numel()) if name in low else p.numel() for name, p in parameters.items()]
    like = next(iter(parameters.values()))
    drawn = torch.empty(count, sum(sizes), device=like.device, dtype=like.dtype).normal_(generator=generator)
    found: Noise = {}
    for (name, p), part in zip(parameters.items(), drawn.split(sizes, 1), strict=True):
        if name in low:
            a, b = part.split([rank * len(p), rank * p[0].numel()], 1)
            found[name] = Low(a.reshape(count, len(p), rank), b.reshape(count, -1, rank), p.shape)
        else:
            found[name] = part.unflatten(1, p.shape) if p.dim() else part[:, 0]
    return found


def mirrored(noise: Noise) -> Noise:
    """Return the noise of members, followed by its opposite."""
    return {name: each.mirrored() if isinstance(each, Low) else torch.cat([each, -each]) for name, each in noise.items()}


def weighted(noise: Tensor | Low, weights: Tensor) -> Tensor:
    """Return the sum over members of their noise times their weights (M,)."""
    return noise.weighted(weights) if isinstance(noise, Low) else (weights @ noise.flatten(1)).view(noise.shape[1:])


# --- outputs ------------------------------------------------------------------------------------------------------------------


def thin_layers(network: Network) -> dict[str, Any]:
    """Return the layers that can add noise of low rank to their own output, by name; empty if other modules have parameters too."""
    layers = {name: part for name, part in network.named_modules() if _is_thin(part)}
    return layers if len(list(network.parameters())) == sum(len(list(part.parameters())) for part in layers.values()) else {}


def _is_thin(part: nn.Module) -> bool:
    return type(part) is nn.Linear or (type(part) is nn.Conv2d and part.groups == 1 and part.padding_mode == "zeros")


def outputs(network: Network, noise: Noise, scales: Mapping[str, Tensor], inputs: Any, layers: Mapping[str, Any], together: bool) -> Tensor:
    """Execute the network once for each member: (M, N, ...).

    Args:
        network: whose weights are perturbed.
        noise: of M members.
        scales: of the noise on each parameter: a number, or a tensor of the parameter's shape.
        inputs: (N, ...).
        layers: of :func:`thin_layers`, where noise is of low rank; empty: weights are made for each member.
        together: whether members whose weights are made are executed as one computation.
    """
    if layers and isinstance(inputs, Tensor):
        return _inside(network, noise, scales, inputs, layers)
    members = dict(network.named_parameters())
    stacks = {}
    for name, each in noise.items():
        dense = each.dense() if isinstance(each, Low) else each
        stacks[name] = torch.addcmul(members[name].detach(), dense, scales[name])
    return outputs_of_stacks(network, stacks, inputs, together=together)


def _inside(network: Network, noise: Noise, scales: Mapping[str, Tensor], inputs: Tensor, layers: Mapping[str, Any]) -> Tensor:
    first = next(iter(noise.values()))
    count = len(first.a if isinstance(first, Low) else first)
    hooks = {part: _hook(name, part, noise, scales, count) for name, part in layers.items()}
    with _added(hooks):
        made: Tensor = network(inputs.repeat(count, *[1] * (inputs.dim() - 1)))
    return made.unflatten(0, (count, -1))  # type: ignore[no-any-return]


Hook = Callable[[Any, tuple[Any, ...], Tensor], Tensor]


@contextmanager
def _added(hooks: Mapping[nn.Module, Hook]) -> Iterator[None]:
    handles = [part.register_forward_hook(hook) for part, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(name: str, layer: Any, noise: Noise, scales: Mapping[str, Tensor], count: int) -> Hook:
    """Make a hook that adds to the layer's output what its noise makes of its input; examples of a member are consecutive."""
    weight, bias = noise.get(f"{name}.weight"), noise.get(f"{name}.bias")
    prefix = f"{name}."

    def add(module: Any, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        x = arguments[0].unflatten(0, (count, -1))
        made = output.unflatten(0, (count, -1))
        if weight is not None:
            response = _convolved(layer, x, weight) if isinstance(layer, nn.Conv2d) else _multiplied(x, weight)
            made = made + response * scales[f"{prefix}weight"]
        if bias is not None and not isinstance(bias, Low):
            shape = (count, 1, -1, 1, 1) if isinstance(layer, nn.Conv2d) else (count, *[1] * (made.dim() - 2), -1)
            made = made + bias.view(shape) * scales[f"{prefix}bias"]
        return made.flatten(0, 1)  # type: ignore[no-any-return]

    return add


def _multiplied(x: Tensor, noise: Tensor | Low) -> Tensor:
    """Return E x: (M, N, ..., outputs) of x (M, N, ..., inputs)."""
    rows = x.flatten(1, -2)
    found = (rows @ noise.b) @ noise.a.mT / math.sqrt(noise.a.shape[2]) if isinstance(noise, Low) else rows @ noise.mT
    return found.unflatten(1, x.shape[1:-1])  # type: ignore[no-any-return]


def _convolved(layer: nn.Conv2d, x: Tensor, noise: Tensor | Low) -> Tensor:
    """Return E * x, (M, N, outputs, ...) of x (M, N, inputs, height, width): the kernels of all members as groups of one convolution."""
    count, kernel = len(x), layer.weight.shape[1:]
    kernels = noise.b.mT.reshape(-1, *kernel) if isinstance(noise, Low) else noise.flatten(0, 1)
    side_by_side = x.transpose(0, 1).flatten(1, 2)
    found = F.conv2d(side_by_side, kernels, None, layer.stride, layer.padding, layer.dilation, count)
    found = found.unflatten(1, (count, -1)).transpose(0, 1)  # (M, N, r or outputs, height, width)
    if isinstance(noise, Low):
        found = torch.einsum("mnrhw,mor->mnohw", found, noise.a) / math.sqrt(noise.a.shape[2])
    return found
