"""The learned noise schedule of continuous time (Appendix B of arXiv 2503.24322), and ways along it from noise to label.

``SNR(t) = exp(-gamma(t))`` and ``abar(t) = sigmoid(-gamma(t))``: the label's share grows with t where gamma falls.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.errors import UsageError
from bpfree_noprop.schedule import correlated, standard_normal

__all__ = ["Estimate", "LearnedSchedule", "denoise", "noised"]

Estimate = Callable[[Tensor, int], Tensor]
"""``uhat`` (N, d) of a state (N, d) at a point of the grid of times."""

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
        fixed: whether they stay there, and only the way between them is learned.

    Raises:
        UsageError: gamma_1 is not above gamma_0.
    """

    ends: Tensor
    gamma_0: Tensor
    raw_distance: Tensor

    def __init__(self, gamma_0: float, gamma_1: float, *, fixed: bool = False) -> None:
        super().__init__()
        if not gamma_1 > gamma_0:
            raise UsageError(
                f"the noise must fall with t, from gamma_1 = {gamma_1:g} to gamma_0 = {gamma_0:g}",
                where="rule.gamma_0, rule.gamma_1",
                fix="choose gamma_1 above gamma_0",
            )
        ends = {"gamma_0": torch.tensor(float(gamma_0)), "raw_distance": inverse_softplus(torch.tensor(float(gamma_1 - gamma_0)))}
        for name, value in ends.items():
            if fixed:
                self.register_buffer(name, value)
            else:
                self.register_parameter(name, nn.Parameter(value))
        self.raw_in = nn.Parameter(inverse_softplus(torch.full((HIDDEN,), SLOPE)))
        self.bias = nn.Parameter(-SLOPE * (torch.arange(HIDDEN) + 0.5) / HIDDEN)
        self.raw_out = nn.Parameter(inverse_softplus(torch.full((HIDDEN,), 1.0)))
        self.register_buffer("ends", torch.tensor([0.0, 1.0]), persistent=False)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``gamma(t)`` and its derivative, each (K,), for times (K,) in [0, 1]; in the times' precision, under autocast too."""
        steepness, weight = F.softplus(self.raw_in), F.softplus(self.raw_out)
        hidden = torch.sigmoid(torch.cat([t, self.ends.to(t.dtype)])[:, None] * steepness + self.bias)
        grown = (hidden * weight).sum(1)  # a product of matrices would be rounded by autocast
        scale = F.softplus(self.raw_distance) / (grown[-1] - grown[-2])
        inner = hidden[:-2]
        rising = (inner * (1 - inner) * (steepness * weight)).sum(1)
        return self.gamma_0 + scale * (grown[-1] - grown[:-2]), -scale * rising

    def at_ends(self) -> tuple[Tensor, Tensor]:
        """Return ``gamma(0)`` and ``gamma(1)``, where g has no part."""
        return self.gamma_0 + F.softplus(self.raw_distance), self.gamma_0


def shares(gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``sqrt(abar)`` and ``sqrt(1 - abar)``, whose gradients are finite at any gamma."""
    return torch.exp(F.logsigmoid(-gamma) / 2), torch.exp(F.logsigmoid(gamma) / 2)


def noised(u: Tensor, gamma: Tensor, generator: torch.Generator) -> Tensor:
    """Draw ``z_t ~ q(z_t|y)`` for embeddings ``u`` (N, d): Eq. 6 at ``gamma(t)``, (N, 1) or ()."""
    signal, noise = shares(gamma)
    return signal * u + noise * standard_normal(u, generator)


def inverse_softplus(value: Tensor) -> Tensor:
    """Return ``x`` with ``softplus(x) = value``."""
    return value + torch.log(-torch.expm1(-value))


def denoise(
    z: Tensor,
    schedule: LearnedSchedule,
    estimate: Estimate,
    *,
    steps: int,
    stepper: str,
    generator: torch.Generator | None,
    spread: Callable[[float], Tensor] | None = None,
) -> Tensor:
    """Integrate from ``z(0)`` to ``z(1)``: with a generator the reversed diffusion, otherwise its probability-flow equation.

    With ``beta = -gamma' (1 - abar)``, from Eq. 3 in the limit of small steps:

    - stochastic: ``dz = -gamma' (sqrt(abar) uhat - (1 + abar) / 2 z) dt + sqrt(beta) dW``;
    - deterministic: ``dz/dt = -gamma' / 2 (sqrt(abar) uhat - abar z)``, whose z(t) has the same distribution at each t.

    Args:
        z: (N, d) the start.
        schedule: where the noise goes.
        estimate: of the clean embedding.
        steps: equal ones in t.
        stepper: ``euler``; ``heun`` (two estimates a step; second order in the drift); ``exact``, which is exact if the estimate does
            not change within a step: Eq. 3, or its deterministic counterpart.
        generator: of the noise.
        spread: (d, d) covariance of the target given what is seen at a time, of which an exact step with noise takes in its share.
    """
    with torch.no_grad():
        gammas, slopes = schedule(torch.linspace(0, 1, steps + 1, device=z.device, dtype=torch.float64))
        gammas = gammas.cummin(0).values  # a flat stretch may rise by a rounding error
    # as numbers, so that a step costs no operations on scalars
    numbers = (F.logsigmoid(-gammas).tolist(), torch.sigmoid(gammas).tolist(), slopes.tolist())
    grid = [Moment(*values) for values in zip(range(steps + 1), *numbers, strict=True)]
    at = None if spread is None else lambda place: spread(place / steps)
    steppers: dict[str, Callable[..., Tensor]] = {"exact": partial(exact_step, spread=at), "euler": euler_step, "heun": heun_step}
    advance = steppers[stepper]
    for now, then in itertools.pairwise(grid):
        z = advance(z, estimate, now, then, 1 / steps, generator)
    return z


class Moment(NamedTuple):
    """A point of the grid: its index, and there ``log abar``, ``1 - abar`` and ``gamma'``, which keep their precision near the ends."""

    place: int
    log_signal: float
    noise: float
    slope: float

    @property
    def signal(self) -> float:
        """``abar``."""
        return math.exp(self.log_signal)


def drift(z: Tensor, estimate: Estimate, at: Moment, *, noisy: bool) -> Tensor:
    """Return dz/dt without its noise."""
    pull, decay = (-at.slope, (1 + at.signal) / 2) if noisy else (-at.slope / 2, at.signal)
    return pull * (math.sqrt(at.signal) * estimate(z, at.place) - decay * z)


def disturbed(z: Tensor, at: Moment, h: float, generator: torch.Generator | None) -> Tensor | float:
    """Draw the noise of a step of length h."""
    return 0.0 if generator is None else math.sqrt(-at.slope * at.noise * h) * standard_normal(z, generator)


def euler_step(z: Tensor, estimate: Estimate, now: Moment, then: Moment, h: float, generator: torch.Generator | None) -> Tensor:
    """Take a step of Euler, or of Euler and Maruyama if there is noise."""
    return z + h * drift(z, estimate, now, noisy=generator is not None) + disturbed(z, now, h, generator)


def heun_step(z: Tensor, estimate: Estimate, now: Moment, then: Moment, h: float, generator: torch.Generator | None) -> Tensor:
    """Take Heun's predictor and corrector steps, with the same noise in both."""
    noisy, noise = generator is not None, disturbed(z, now, h, generator)
    first = drift(z, estimate, now, noisy=noisy)
    second = drift(z + h * first + noise, estimate, then, noisy=noisy)
    return z + h / 2 * (first + second) + noise


def exact_step(
    z: Tensor,
    estimate: Estimate,
    now: Moment,
    then: Moment,
    h: float,
    generator: torch.Generator | None,
    spread: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Apply Eq. 3 between two times; without noise, the ellipse that keeps ``z - sqrt(abar) uhat`` in its direction.

    ``spread`` (d, d) at a point of the grid is what the estimate leaves open: ``a^2`` times it adds to the noise.
    """
    uhat, left = estimate(z, now.place), then.noise / now.noise
    if generator is None:
        return (math.sqrt(then.signal) - math.sqrt(left * now.signal)) * uhat + math.sqrt(left) * z
    log_alpha = now.log_signal - then.log_signal
    lost = -math.expm1(log_alpha)  # 1 - alpha
    a, b = math.sqrt(then.signal) * lost / now.noise, math.exp(log_alpha / 2) * left
    mean = a * uhat + b * z
    if spread is None:
        return mean + math.sqrt(left * lost) * standard_normal(z, generator)
    return mean + correlated(z, left * lost, a**2 * spread(now.place), generator)
