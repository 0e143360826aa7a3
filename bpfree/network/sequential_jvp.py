"""Modules in sequence, executed one by one with derivatives along K directions.

The quick way for what most blocks are, nested ``nn.Sequential``: no hooks between the layers, all directions at once, and rules of
their own for linear maps and ReLUs. It gives what :class:`bpfree.network.perturb.Perturber` gives otherwise.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, jvp, vmap

from bpfree.network.forward_mode import Products, differentiable_attention, where_active
from bpfree.network.sites import Site

__all__ = ["Chain"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Chain:
    """The leaves of nested ``nn.Sequential``, in order.

    Args:
        module: whatever it is; without ``nn.Sequential``, or with a leaf that is used twice, nothing :meth:`fits`.
    """

    def __init__(self, module: nn.Module) -> None:
        self._leaves: dict[str, nn.Module] = {}
        self._called: list[nn.Module] = []
        self._visit("", module)
        followed = zip(self._leaves, itertools.islice(self._leaves.values(), 1, None), strict=False)
        self._before_relu = {path for path, after in followed if type(after) is nn.ReLU}
        self._simple = "" not in self._leaves and len({id(leaf) for leaf in self._leaves.values()}) == len(self._leaves)

    def _visit(self, path: str, part: nn.Module) -> None:
        self._called.append(part)
        if type(part) is not nn.Sequential:
            self._leaves[path] = part
            return
        for name, child in part._modules.items():  # with repetitions, unlike named_children
            assert child is not None
            self._visit(f"{path}.{name}" if path else name, child)

    def fits(self, sites: Sequence[Site], weights: Collection[str], record: Collection[str]) -> bool:
        """Tell whether all requested places lie between the leaves, and these have no other hooks."""
        return (
            self._simple
            and not any(part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__ for part in self._called)
            and all(path in self._leaves for path in record)
            and all(not site.before and site.module in self._leaves for site in sites)
            and all(name.rpartition(".")[0] in self._leaves for name in weights)
        )

    @torch.no_grad()
    def execute(
        self,
        x: Tensor,
        sites: Sequence[Site],
        noise: Sequence[Tensor],
        weights: Mapping[str, Tensor],
        record: Collection[str],
        mask: bool,
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor], list[Tensor]]:
        """Return output, derivative, recorded inputs, and the noise as used; the arguments are those of ``Perturber.execute``."""
        used, inputs = list(noise), {}
        places = {site.module: index for index, site in enumerate(sites)}
        moves = _by_leaf(weights)
        tangent: Tensor | None = None
        waiting: int | None = None  # noise in front of a ReLU goes in behind it: one pass over it instead of two
        for path, leaf in self._leaves.items():
            if path in record:
                inputs[path] = x
            if type(leaf) is nn.ReLU:
                x = leaf(x)
                tangent = None if tangent is None else where_active(tangent, x)
                if waiting is not None:
                    used[waiting] = where_active(used[waiting], x)
                    tangent, waiting = _add(tangent, used[waiting], x), None
            else:
                x, tangent = _execute(leaf, x, tangent, moves.get(path, {}))
            index = places.get(path)
            if index is None:
                continue
            masked = mask and sites[index].masked
            if masked and path in self._before_relu:
                waiting = index
                continue
            if masked:
                used[index] = where_active(used[index], x)
            tangent = _add(tangent, used[index], x)
        return x, tangent, inputs, used


def _by_leaf(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    moves: dict[str, dict[str, Tensor]] = {}
    for name, direction in weights.items():
        path, _, own = name.rpartition(".")
        moves.setdefault(path, {})[own] = direction
    return moves


def _add(tangent: Tensor | None, noise: Tensor, value: Tensor) -> Tensor:
    """Add noise (K, N or 1, ...) to a derivative (K, N, ...)."""
    noise = noise.to(value.dtype)
    return noise.expand(len(noise), *value.shape) if tangent is None else tangent + noise


def _execute(leaf: nn.Module, x: Tensor, tangent: Tensor | None, moves: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Compute output (N, ...) and derivative (K, N, ...) of a leaf, from those of its input and its parameters."""
    if tangent is None and not moves:
        return leaf(x), None
    if type(leaf) is nn.Linear:
        return _linear(leaf, x, tangent, moves)
    if tangent is not None and not moves:
        if isinstance(leaf, CONVOLUTIONS) and type(leaf) in CONVOLUTIONS:
            return leaf(x), leaf._conv_forward(tangent.flatten(0, 1), leaf.weight, None).unflatten(0, tangent.shape[:2])
        if type(leaf) is nn.Flatten and leaf.start_dim > 0:
            return leaf(x), leaf(tangent.flatten(0, 1)).unflatten(0, tangent.shape[:2])
    count = len(tangent) if tangent is not None else len(next(iter(moves.values())))
    return _once(leaf, x, tangent, moves) if count == 1 else _together(leaf, x, tangent, moves, count)


def _linear(leaf: nn.Linear, x: Tensor, tangent: Tensor | None, moves: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    def beside(value: Tensor) -> Tensor:
        """Insert axes of length 1 after the first of (K, ...), as many as the derivative has."""
        return value.reshape(len(value), *[1] * (x.dim() + 1 - value.dim()), *value.shape[1:])

    output: Tensor = leaf(x)
    terms = [] if tangent is None else [F.linear(tangent, leaf.weight)]
    if "weight" in moves:
        terms.append(x @ beside(moves["weight"].mT))
    if "bias" in moves:
        terms.append(beside(moves["bias"]))
    total = sum(terms[1:], terms[0])
    return output, total.expand(len(total), *output.shape)


def _once(leaf: nn.Module, x: Tensor, tangent: Tensor | None, moves: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Execute along one direction, by dual numbers."""
    with forward_ad.dual_level(), differentiable_attention(), Products():
        dual = x if tangent is None else forward_ad.make_dual(x, tangent[0].clone())  # cloned: a layer in place would overwrite it
        parameters = {name: forward_ad.make_dual(leaf.get_parameter(name).detach(), value[0]) for name, value in moves.items()}
        output, moved = forward_ad.unpack_dual(functional_call(leaf, parameters, (dual,)) if parameters else leaf(dual))
    return output, (torch.zeros_like(output) if moved is None else moved).unsqueeze(0)


def _together(leaf: nn.Module, x: Tensor, tangent: Tensor | None, moves: Mapping[str, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Execute along several directions, by ``vmap``; the output is computed once."""
    parameters = {name: leaf.get_parameter(name).detach() for name in moves}

    def run(value: Tensor, own: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        output = functional_call(leaf, own, (value,)) if own else leaf(value)
        return output, output

    def along(change: Tensor, own: dict[str, Tensor]) -> Any:
        return jvp(run, (x, parameters), (change, own), has_aux=True)[1:]

    with differentiable_attention(), Products():
        each: Any = vmap(along, out_dims=(0, None), randomness="same")  # type: ignore[arg-type]
        tangents, output = each(x.new_zeros(count, *x.shape) if tangent is None else tangent.clone(), dict(moves))
    return output, tangents
