"""Predictive distributions of real targets: intervals of draws from them, and how good they are.

Gneiting and Raftery: Strictly Proper Scoring Rules, Prediction, and Estimation, 2007. Ferro: Fair scores for ensemble forecasts, 2014.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bpfree.errors import UsageError

__all__ = ["central", "crps", "gaussian_crps", "quantile"]


def quantile(draws: Tensor, share: float) -> Tensor:
    """Estimate a quantile (N, ...) of K draws (K, N, ...), so that a further draw is below it with this probability.

    It is the draw of rank ``share (K + 1)``, interpolated: of K + 1 exchangeable numbers the last is below the k-th smallest of the others
    with probability k / (K + 1). (The usual quantile, at rank ``1 + share (K - 1)``, makes intervals of few draws too narrow: 88.2 % in
    place of 90 of 100 draws.) Beyond the outermost draws it is these.
    """
    count = len(draws)
    place = min(max(share * (count + 1) - 1, 0.0), count - 1.0)
    below = math.floor(place)
    ordered = draws.sort(0).values
    low, high = ordered[below], ordered[min(below + 1, count - 1)]
    return torch.lerp(low, high, place - below)


def central(draws: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Return the ends (N, ...) of the central interval of K draws (K, N, ...) that a further draw is in with probability ``level``.

    Raises:
        UsageError: a level that is no probability, or needs more draws.
    """
    if not 0 < level < 1:
        raise UsageError(f"level={level!r} is no probability", where="interval", fix="give a number between 0 and 1, such as 0.9")
    outside = (1 - level) / 2
    if outside * (len(draws) + 1) < 1 - 1e-9:
        needed = math.ceil(1 / outside - 1e-9) - 1
        raise UsageError(f"{len(draws)} draws have no interval of {100 * level:g} %", where="interval", fix=f"take {needed} or more")
    return quantile(draws, outside), quantile(draws, 1 - outside)


def crps(draws: Tensor, targets: Tensor) -> Tensor:
    """Estimate the continuous ranked probability score of each target (N, ...) without bias, from K draws (K, N, ...).

    ``CRPS = E|X - y| - E|X - X'| / 2`` for independent draws X and X' of the distribution; the second mean is over pairs of different
    draws. Units are the target's, smaller is better, and of a prediction that is certain it is the absolute error.
    """
    count = len(draws)
    distance = (draws - targets).abs().mean(0)
    if count < 2:
        return distance
    ranks = torch.arange(1, count + 1, device=draws.device, dtype=draws.dtype)
    weights = (2 * ranks - count - 1).view(-1, *[1] * (draws.dim() - 1))
    return distance - (weights * draws.sort(0).values).sum(0) / (count * (count - 1))


def gaussian_crps(mean: Tensor, deviation: Tensor | float, targets: Tensor) -> Tensor:
    """Return the continuous ranked probability score (N, ...) of normal distributions: Gneiting and Raftery 2007, Eq. 21."""
    scale = torch.as_tensor(deviation, dtype=mean.dtype, device=mean.device)
    z = (targets - mean) / scale
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    score: Tensor = scale * (z * (2 * torch.special.ndtr(z) - 1) + 2 * density - 1 / math.sqrt(math.pi))
    return score
