"""Symplectic integrators: semi-implicit Euler and leapfrog where H = T(p) + V(q), the implicit midpoint rule for any field.

A learned energy is not exactly separable, so the explicit ones would not be symplectic for it.
Hairer, Lubich, Wanner: Geometric Numerical Integration, 2nd ed., 2006, chapters I.3 and II.1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bpfree_sampled.systems import System

__all__ = ["euler", "implicit_midpoint", "integrator_of", "leapfrog", "rollout"]

Field = Callable[[Tensor], Tensor]
Advance = Callable[[Field, Tensor, float], Tensor]

ROUNDS = 100
"""Rounds of the fixed-point iteration, at most; it contracts where the step times the field's slope is below 2."""
SETTLED = 1e-14
"""Relative change at which the iteration ends."""


def euler(field: Field, states: Tensor, step: float) -> Tensor:
    """Take a step of semi-implicit Euler, of first order: q' = q + h H_p(q, p), then p' = p - h H_q(q', p)."""
    d = states.shape[-1] // 2
    q, p = states[..., :d] + step * field(states)[..., :d], states[..., d:]
    return torch.cat([q, p + step * field(torch.cat([q, p], -1))[..., d:]], -1)


def leapfrog(field: Field, states: Tensor, step: float) -> Tensor:
    """Take a step of leapfrog (Stoermer-Verlet), of second order: half a step of p, a step of q, half a step of p."""
    d = states.shape[-1] // 2
    q, p = states[..., :d], states[..., d:]
    p = p + step / 2 * field(states)[..., d:]
    q = q + step * field(torch.cat([q, p], -1))[..., :d]
    return torch.cat([q, p + step / 2 * field(torch.cat([q, p], -1))[..., d:]], -1)


def implicit_midpoint(field: Field, states: Tensor, step: float) -> Tensor:
    """Take a step of the implicit midpoint rule, of second order: x' = x + h f((x + x') / 2), by fixed-point iteration."""
    moved = states + step * field(states)
    for _ in range(ROUNDS):
        before, moved = moved, states + step * field((states + moved) / 2)
        if not bool((moved - before).abs().max() > SETTLED * moved.abs().max()):  # also where it is not finite
            break
    return moved


def integrator_of(system: System) -> Advance:
    """Return leapfrog for a separable system, and else the implicit midpoint rule."""
    return leapfrog if system.separable else implicit_midpoint


def rollout(
    field: Field, states: Tensor, step: float, steps: int, advance: Advance = implicit_midpoint, *, bound: float | None = None
) -> Tensor:
    """Follow trajectories.

    Args:
        field: (N, D) states to (N, D) derivatives.
        states: (N, D) where they begin.
        step: of time.
        steps: how many.
        advance: takes one.
        bound: no coordinate leaves -bound to bound; NaN becomes 0. So trajectories that escape have numbers, too.

    Returns:
        (steps + 1, N, D).
    """
    found = [states]
    for _ in range(steps):
        states = advance(field, states, step)
        if bound is not None:
            states = states.nan_to_num(nan=0.0).clamp(-bound, bound)
        found.append(states)
    return torch.stack(found)
