"""Weights of hidden units from pairs of data points, or from fixed distributions.

Bolager, Burak, Datar, Sun, Dietrich: Sampling weights of deep neural networks, NeurIPS 2023, arXiv 2306.16830 (SWIM).
Rahma, Datar, Dietrich: Training Hamiltonian neural networks without backpropagation, 2024, arXiv 2411.17511 (U-SWIM, A-SWIM).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bpfree import BpfreeError

__all__ = ["Layer", "normal_layer", "pair_layer", "permuted", "rotated"]

SCALES = {"tanh": (math.log(3), math.log(3) / 2), "relu": (1.0, 0.0)}
"""Factors s1 and s2 by activation: a unit has sums -s2 and s1 - s2 at its base points; of tanh its values are -1/2 and 1/2 there."""
CLOSE = 1e-10
"""Points that are nearer to each other give no direction; and the sum of weights below which pairs are drawn uniformly."""
MOST_PAIRS = 1 << 24
"""Categories that ``torch.multinomial`` can draw from."""


class Layer(NamedTuple):
    """Sampled units: ``weight`` (M, D), ``bias`` (M,), and the positions ``one`` and ``other`` (M,) of their base points."""

    weight: Tensor
    bias: Tensor
    one: Tensor
    other: Tensor


def pair_layer(
    points: Tensor, units: int, activation: str, generator: torch.Generator, values: Tensor | None = None, *, classes: bool = False
) -> Layer:
    """Sample units from pairs of points: steep where a function changes steeply.

    Of n = K ceil(M / K) candidate pairs, uniform ones, M different ones are drawn with probabilities proportional to
    ``max_c |f_c(x_j) - f_c(x_i)| / |x_j - x_i|``, or uniform ones without values. A unit is -1/2 at x_i and 1/2 at x_j (tanh), or 0 and 1
    (ReLU).

    Args:
        points: (K, D).
        units: M.
        activation: ``tanh`` or ``relu``.
        generator: of the draws.
        values: f at the points (K, C); ``None``: pairs are uniform.
        classes: values are one-hot classes or labels: they differ by 1 or by 0.

    Raises:
        BpfreeError: fewer than two different points, or too many pairs.
    """
    count, device = len(points), points.device
    candidates = count * math.ceil(units / count) if count else 0
    if count < 2 or candidates > MOST_PAIRS:
        fix = f"give 2 to {MOST_PAIRS} points: rule.points"
        raise BpfreeError(f"units cannot be sampled from pairs of {count} points", where="sampling of hidden weights", fix=fix)
    one = torch.randint(count, (candidates,), generator=generator, device=device)
    other = (one + torch.randint(1, count, (candidates,), generator=generator, device=device)) % count
    distance = _distances(points, one, other)
    apart = distance > CLOSE
    chances = apart.to(distance.dtype)
    if values is not None:
        change = (values[other] - values[one]).abs().amax(1).to(distance.dtype)
        steep = (change > 0).to(distance.dtype) if classes else change
        steep = chances * steep / distance.clamp_min(CLOSE)
        chances = steep if float(steep.sum()) >= CLOSE else chances
    drawn = _draw(chances, units, generator)
    one, other = one[drawn], other[drawn]
    return _units(points[one], points[other], activation, one, other)


def _distances(points: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Compute distances of pairs, a part at a time: the differences of all pairs may not fit into memory."""
    parts = max(1, (1 << 24) // max(1, points.shape[1]))
    pieces = zip(one.split(parts), other.split(parts), strict=True)
    return torch.cat([(points[b] - points[a]).norm(dim=1) for a, b in pieces])


def _draw(chances: Tensor, units: int, generator: torch.Generator) -> Tensor:
    """Draw different positions as long as there are some with a chance, and the rest with replacement."""
    possible = int((chances > 0).sum())
    if not possible:
        raise BpfreeError("all points are the same, so no pair has a direction", where="sampling of hidden weights", fix="give other data")
    drawn = torch.multinomial(chances, min(units, possible), replacement=False, generator=generator)
    if possible < units:
        drawn = torch.cat([drawn, torch.multinomial(chances, units - possible, replacement=True, generator=generator)])
    return drawn


def _units(one_points: Tensor, other_points: Tensor, activation: str, one: Tensor, other: Tensor) -> Layer:
    """Place units on pairs of base points (M, D)."""
    scale, shift = SCALES[activation]
    direction = other_points - one_points
    weight = scale * direction / direction.square().sum(1, keepdim=True).clamp_min(CLOSE**2)
    return Layer(weight, -(weight * one_points).sum(1) - shift, one, other)


def normal_layer(points: Tensor, units: int, generator: torch.Generator, *, scale: float, low: float, high: float) -> Layer:
    """Draw units without looking at the data (an extreme learning machine): weights N(0, 1) and biases U(low, high), times ``scale``.

    Args:
        points: (K, D), of which only the size, type and device matter.
        units: M.
        generator: of the draws.
        scale: factor of weights and biases.
        low, high: ends of the biases' range, before.
    """
    like = {"dtype": points.dtype, "device": points.device}
    weight = scale * torch.randn(units, points.shape[1], generator=generator, **like)  # type: ignore[call-overload]
    bias = scale * (low + (high - low) * torch.rand(units, generator=generator, **like))  # type: ignore[call-overload]
    nowhere = torch.full((units,), -1, device=points.device)
    return Layer(weight, bias, nowhere, nowhere)


def rotated(layer: Layer, points: Tensor, activation: str, generator: torch.Generator) -> Layer:
    """Turn each unit's weights into a random direction, a control: sizes and first base points stay."""
    weight = torch.randn(layer.weight.shape, generator=generator, dtype=layer.weight.dtype, device=layer.weight.device)
    weight = weight * (layer.weight.norm(dim=1) / weight.norm(dim=1))[:, None]
    return layer._replace(weight=weight, bias=-(weight * points[layer.one]).sum(1) - SCALES[activation][1])


def permuted(layer: Layer, generator: torch.Generator) -> Layer:
    """Permute the biases among the units, a control: directions and sizes stay, places do not."""
    return layer._replace(bias=layer.bias[torch.randperm(len(layer.bias), generator=generator, device=layer.bias.device)])
