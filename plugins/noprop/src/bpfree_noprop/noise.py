"""The learned noise schedule of continuous time (Appendix B of arXiv 2503.24322), and ways along it from noise to label.

``SNR(t) = exp(-gamma(t))`` and ``abar(t) = sigmoid(-gamma(t))``: the label's share grows with t where gamma falls.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree_noprop.schedule import standard_normal

__all__ = ["Estimate", "LearnedSchedule", "denoise"]

Estimate = Callable[[Tensor, Tensor], Tensor]
"""``uhat`` (N, d) of a state (N, d) at a time ()."""

HIDDEN = 64
SLOPE = 10.0
"""Steepness of the hidden units at the start; their centres are spread evenly over [0, 1], which makes gamma nearly linear."""


class LearnedSchedule(nn.Module):
    """``gamma(t) = gamma_0 + (gamma_1 - gamma_0) (1 - gbar(t))`` with ``gbar(t) = (g(t) - g(0)) / (g(1) - g(0))``.

    g is a network of two layers with positive weights, so that it grows with t, and gamma falls from ``gamma(0) = gamma_1`` to
    ``gamma(1) = gamma_0``. That needs ``gamma_1 > gamma_0`` (the paper says only that both are trainable): what is
    learned is their distance, through a softplus.

    Args:
        gamma_0, gamma_1: at the start.
    """

    def __init__(self, gamma_0: float, gamma_1: float) -> None:
        super().__init__()
        self.gamma_0 = nn.Parameter(torch.tensor(gamma_0))
        self.raw_distance = nn.Parameter(inverse_softplus(torch.tensor(gamma_1 - gamma_0)))
        self.raw_in = nn.Parameter(inverse_softplus(torch.full((HIDDEN,), SLOPE)))
        self.bias = nn.Parameter(-SLOPE * (torch.arange(HIDDEN) + 0.5) / HIDDEN)
        self.raw_out = nn.Parameter(inverse_softplus(torch.full((HIDDEN,), 1.0)))

    def _growing(self, t: Tensor) -> Tensor:
        hidden = torch.sigmoid(t[..., None] * F.softplus(self.raw_in) + self.bias)
        return hidden @ F.softplus(self.raw_out)  # type: ignore[no-any-return]

    def forward(self, t: Tensor) -> Tensor:
        """``gamma(t)`` for times in [0, 1], of their shape."""
        first, last = self._growing(t.new_zeros(())), self._growing(t.new_ones(()))
        share = (self._growing(t) - first) / (last - first)
        return self.gamma_0 + F.softplus(self.raw_distance) * (1 - share)  # type: ignore[no-any-return]

    def with_slope(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``gamma(t)`` and ``gamma'(t)``, by autograd; both differentiable with respect to the parameters where gradients are on."""
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            t = t.detach().requires_grad_()
            gamma = self(t)
            (slope,) = torch.autograd.grad(gamma.sum(), t, create_graph=differentiable)
        return (gamma, slope) if differentiable else (gamma.detach(), slope.detach())


def inverse_softplus(value: Tensor) -> Tensor:
    """``x`` with ``softplus(x) = value``."""
    return value + torch.log(-torch.expm1(-value))


def denoise(
    z: Tensor, schedule: LearnedSchedule, estimate: Estimate, *, steps: int, stepper: str, generator: torch.Generator | None
) -> Tensor:
    """From ``z(0)`` to ``z(1)``: the reverse of the diffusion where there is a generator, else its probability-flow equation.

    With ``beta = -gamma' (1 - abar)``, from Eq. 3 in the limit of small steps:

    - stochastic: ``dz = -gamma' (sqrt(abar) uhat - (1 + abar) / 2 z) dt + sqrt(beta) dW``;
    - deterministic: ``dz/dt = -gamma' / 2 (sqrt(abar) uhat - abar z)``, whose z(t) has the same distribution at each t.

    Args:
        z: (N, d) the start.
        schedule: where the noise goes.
        estimate: of the clean embedding.
        steps: equal ones in t.
        stepper: ``euler``; ``heun`` (two estimates a step; second order in the drift); ``exact``, which would be so if the estimate did not
            change within a step: Eq. 3 itself, or its deterministic sibling.
        generator: of the noise.
    """
    times = torch.linspace(0, 1, steps + 1, device=z.device, dtype=z.dtype)
    gammas, slopes = schedule.with_slope(times)
    # as numbers, so that a step costs no operations on scalars
    grid = list(zip(times.unbind(), torch.sigmoid(-gammas.double()).tolist(), slopes.tolist(), strict=True))
    advance = {"exact": exact_step, "euler": euler_step, "heun": heun_step}[stepper]
    for now, then in itertools.pairwise(grid):
        z = advance(z, estimate, now, then, 1 / steps, generator)
    return z


Moment = tuple[Tensor, float, float]
"""A time, and there ``abar`` and ``gamma'``."""


def drift(z: Tensor, estimate: Estimate, at: Moment, *, noisy: bool) -> Tensor:
    """dz/dt without its noise."""
    t, abar, slope = at
    pull, decay = (-slope, (1 + abar) / 2) if noisy else (-slope / 2, abar)
    return pull * (abar**0.5 * estimate(z, t) - decay * z)


def disturbed(z: Tensor, at: Moment, h: float, generator: torch.Generator | None) -> Tensor | float:
    """The noise of a step of length h."""
    _, abar, slope = at
    return 0.0 if generator is None else (-slope * (1 - abar) * h) ** 0.5 * standard_normal(z, generator)


def euler_step(z: Tensor, estimate: Estimate, now: Moment, then: Moment, h: float, generator: torch.Generator | None) -> Tensor:
    """Euler, or Euler and Maruyama."""
    return z + h * drift(z, estimate, now, noisy=generator is not None) + disturbed(z, now, h, generator)


def heun_step(z: Tensor, estimate: Estimate, now: Moment, then: Moment, h: float, generator: torch.Generator | None) -> Tensor:
    """Heun's predictor and corrector; the noise is the same in both."""
    noisy, noise = generator is not None, disturbed(z, now, h, generator)
    first = drift(z, estimate, now, noisy=noisy)
    second = drift(z + h * first + noise, estimate, then, noisy=noisy)
    return z + h / 2 * (first + second) + noise


def exact_step(z: Tensor, estimate: Estimate, now: Moment, then: Moment, h: float, generator: torch.Generator | None) -> Tensor:
    """Eq. 3 between two times; without noise, the ellipse that keeps ``z - sqrt(abar) uhat`` in its direction."""
    before, after = now[1], then[1]
    uhat = estimate(z, now[0])
    if generator is None:
        ratio = ((1 - after) / (1 - before)) ** 0.5
        return (after**0.5 - ratio * before**0.5) * uhat + ratio * z
    alpha, left = before / after, 1 - before
    a, b = after**0.5 * (1 - alpha) / left, alpha**0.5 * (1 - after) / left
    return a * uhat + b * z + ((1 - after) * (1 - alpha) / left) ** 0.5 * standard_normal(z, generator)
