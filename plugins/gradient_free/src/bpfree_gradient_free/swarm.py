"""Swarms of particles: positions, velocities and memories, and how they move.

Kennedy, Eberhart, Particle swarm optimization, 1995, with the constants of Clerc, Kennedy, The particle swarm: explosion, stability, and
convergence in a multidimensional complex space, 2002: inertia 0.7298 and acceleration 1.4962.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["Memory", "Swarms"]

Memory = Literal["inflated", "measured", "kept"]
INFINITY = float("inf")


class Swarms(nn.Module):
    """S swarms of P particles each, which look for the place of S rows of F numbers.

    All particles begin on the rows, with normal velocities. A swarm whose weights are all zero, ``inertia`` and both accelerations,
    therefore never leaves its row.

    Args:
        rows: (S, F) where they begin.
        particles: P, in each swarm.
        speed: (S, F), or what can be expanded to it: deviations of the first velocities.

    Attributes:
        position, velocity: (S, P, F).
        best: (S, P, F) the best place that each particle has been to.
        value: (S, P) the loss there; infinite before the first one is known.
    """

    position: Tensor
    velocity: Tensor
    best: Tensor
    value: Tensor

    def __init__(self, rows: Tensor, particles: int, speed: Tensor | float) -> None:
        super().__init__()
        count, size = rows.shape
        start = rows.detach()[:, None].expand(count, particles, size)
        self.register_buffer("position", start.clone())
        self.register_buffer("velocity", torch.randn_like(start, memory_format=torch.contiguous_format) * speed)
        self.register_buffer("best", start.clone())
        self.register_buffer("value", rows.new_full((count, particles), INFINITY))

    @torch.no_grad()
    def move(self, rows: Tensor, inertia: float, own: float, common: float, generator: torch.Generator) -> None:
        """Move all particles: v <- w v + c1 r1 (best - x) + c2 r2 (row - x), then x <- x + v, with r1 and r2 uniform for each number.

        Args:
            rows: (S, F) the best place of each swarm, which is what the network has.
            inertia: w.
            own: c1.
            common: c2.
            generator: of r1 and r2.
        """
        drawn = torch.rand(2, *self.position.shape, generator=generator, device=self.position.device, dtype=self.position.dtype)
        self.velocity.mul_(inertia)
        self.velocity.add_(drawn[0].mul_(self.best - self.position), alpha=own)
        self.velocity.add_(drawn[1].mul_(rows[:, None] - self.position), alpha=common)
        self.position.add_(self.velocity)

    def age(self, share: float) -> None:
        """Raise what is remembered by a share of its size, since it was measured on another batch.

        Args:
            share: such as 0.02.
        """
        self.value.add_(self.value.abs(), alpha=share)

    def remember(self, values: Tensor, first: int = 0) -> None:
        """Let each particle of some swarms remember its place where the loss is below the remembered one.

        Args:
            values: (M, P) losses of swarms from ``first`` on, at their positions.
            first: the first of these swarms.
        """
        chosen = slice(first, first + len(values))
        better = values < self.value[chosen]
        self.value[chosen] = torch.where(better, values.to(self.value.dtype), self.value[chosen])
        self.best[chosen] = torch.where(better[..., None], self.position[chosen], self.best[chosen])
