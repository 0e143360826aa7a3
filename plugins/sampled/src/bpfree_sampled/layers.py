"""Activations with their derivatives, and images of points under a layer, with or without derivatives by the inputs.

A *dual* tensor (N, 1 + D, M) has the values of M units in its first row, and below it their derivatives by each of D inputs: what forward
mode computes, in closed form. So a field that is made of derivatives is an ordinary output of an ordinary chain of blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ACTIVATIONS", "dual_layer", "first_duals", "image"]


def _tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    made = x.tanh()
    return made, 1 - made.square()


def _relu(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.relu(), (x > 0).to(x.dtype)


VALUES: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": torch.relu}
ACTIVATIONS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"tanh": _tanh, "relu": _relu}
"""Values and derivatives (N, M) at (N, M), by name."""


def image(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """Compute the values (N, M) of a layer's units at points (N, D)."""
    return VALUES[activation](F.linear(x, weight, bias))


def first_duals(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """Compute values of a first layer's units at points (N, D), and their derivatives by the coordinates: (N, 1 + D, M)."""
    values, slopes = ACTIVATIONS[activation](F.linear(x, weight, bias))
    return torch.cat([values[:, None], slopes[:, None] * weight.T], dim=1)


def dual_layer(duals: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """Compute the duals (N, 1 + D, M) of a further layer, of those (N, 1 + D, L) below it."""
    moved = F.linear(duals, weight)
    values, slopes = ACTIVATIONS[activation](moved[:, 0] + bias)
    return torch.cat([values[:, None], slopes[:, None] * moved[:, 1:]], dim=1)
