"""Hamiltonian systems: energies and fields in closed form, in double precision.

A state is (q, p), D = 2 d numbers. The field of an energy H is (dH/dp, -dH/dq). All constants are 1, but those of Lotka-Volterra, whose
energy is d e^p - c p + b e^q - a q with (a, b, c, d) = (-2, -1, -1, -1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SYSTEMS", "System", "turned"]


def turned(gradient: Tensor) -> Tensor:
    """Turn gradients (..., D) of an energy into its field: (dH/dp, -dH/dq)."""
    by_q, by_p = gradient.chunk(2, dim=-1)
    return torch.cat([by_p, -by_q], dim=-1)


@dataclass(frozen=True)
class System:
    """A system of d degrees of freedom.

    Attributes:
        energy: (N, D) states to (N,) energies.
        gradient: (N, D) states to (N, D) derivatives of the energy, in closed form.
        freedoms: d.
        separable: whether H = T(p) + V(q).
        box: lowest and highest value of each coordinate, (q, p) one after the other, from which states are drawn.
        start: likewise, of the states from which trajectories begin: bounded ones, which stay in the box.
        names: of the coordinates.
    """

    energy: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor], Tensor]
    freedoms: int
    separable: bool
    box: tuple[float, ...]
    start: tuple[float, ...]
    names: tuple[str, ...]

    def field(self, states: Tensor) -> Tensor:
        """Compute the derivatives by time (N, D) at states (N, D)."""
        return turned(self.gradient(states))


def _pendulum(x: Tensor) -> Tensor:
    q, p = x.unbind(-1)
    return p.square() / 2 + 1 - q.cos()


def _pendulum_gradient(x: Tensor) -> Tensor:
    q, p = x.unbind(-1)
    return torch.stack([q.sin(), p], dim=-1)


def _spring(x: Tensor) -> Tensor:
    return x.square().sum(-1) / 2


def _lotka_volterra(x: Tensor) -> Tensor:
    q, p = x.unbind(-1)
    return -p.exp() + p - q.exp() + 2 * q


def _lotka_volterra_gradient(x: Tensor) -> Tensor:
    q, p = x.unbind(-1)
    return torch.stack([2 - q.exp(), 1 - p.exp()], dim=-1)


def _double_pendulum(x: Tensor) -> Tensor:
    q1, q2, p1, p2 = x.unbind(-1)
    kinetic = (p1.square() + 2 * p2.square() - 2 * p1 * p2 * (q1 - q2).cos()) / (2 * (1 + (q1 - q2).sin().square()))
    return kinetic - 2 * q1.cos() - q2.cos()


def _double_pendulum_gradient(x: Tensor) -> Tensor:
    q1, q2, p1, p2 = x.unbind(-1)
    cosine, sine = (q1 - q2).cos(), (q1 - q2).sin()
    below = 1 + sine.square()
    above = p1.square() + 2 * p2.square() - 2 * p1 * p2 * cosine
    turn = p1 * p2 * sine / below - above * sine * cosine / below.square()  # of the kinetic energy, by q1 - q2
    return torch.stack([turn + 2 * q1.sin(), -turn + q2.sin(), (p1 - p2 * cosine) / below, (2 * p2 - p1 * cosine) / below], dim=-1)


def _henon_heiles(x: Tensor) -> Tensor:
    q1, q2, _, _ = x.unbind(-1)
    return x.square().sum(-1) / 2 + q1.square() * q2 - q2**3 / 3


def _henon_heiles_gradient(x: Tensor) -> Tensor:
    q1, q2, p1, p2 = x.unbind(-1)
    return torch.stack([q1 + 2 * q1 * q2, q2 + q1.square() - q2.square(), p1, p2], dim=-1)


PLANE, SPACE = ("q", "p"), ("q1", "q2", "p1", "p2")
TURN, CENTRE = 2 * math.pi, math.log(2)
SYSTEMS = {
    "pendulum": System(_pendulum, _pendulum_gradient, 1, True, (-TURN, TURN, -6, 6), (-2, 2, -0.5, 0.5), PLANE),
    "spring": System(_spring, lambda x: x, 1, True, (-2, 2, -2, 2), (-1, 1, -1, 1), PLANE),
    "lotka-volterra": System(
        _lotka_volterra, _lotka_volterra_gradient, 1, True, (-2, 2, -2, 2), (CENTRE - 0.5, CENTRE + 0.5, -0.5, 0.5), PLANE
    ),
    "double-pendulum": System(
        _double_pendulum,
        _double_pendulum_gradient,
        2,
        False,
        (-math.pi, math.pi, -math.pi, math.pi, -1, 1, -1, 1),
        (-0.5, 0.5, -0.5, 0.5, -0.2, 0.2, -0.2, 0.2),
        SPACE,
    ),
    "henon-heiles": System(
        _henon_heiles, _henon_heiles_gradient, 2, True, (-5, 5) * 4, (-0.25, 0.25) * 4, SPACE
    ),  # its trajectories are bounded below an energy of 1/6
}
"""The systems by name. Boxes of the pendulum and of Henon-Heiles are those of the published tables, that of the double pendulum is ours."""
