"""From losses of a population to weights of its members: raw, by centred ranks, or by the utilities of natural evolution strategies."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Shaping", "recombination", "shaped"]

Shaping = Literal["ranks", "utilities", "none"]


def shaped(losses: Tensor, shaping: Shaping) -> Tensor:
    """Return the weight of each member (M,), larger for larger losses, with a sum of zero.

    Args:
        losses: (M,); what is not finite counts as the worst.
        shaping: ``none``: (loss - mean) / (M - 1), so that the weighted sum of noise over its deviation estimates the gradient;
            ``ranks``: ranks between -1/2 and 1/2, over M (Salimans et al. 2017); ``utilities``: minus those of NES (Wierstra et al. 2014).
    """
    count = len(losses)
    values = losses.nan_to_num(nan=math.inf, posinf=math.inf)
    if shaping == "none":
        return (losses - losses.mean()) / max(count - 1, 1)
    ranks = values.argsort(stable=True).argsort()  # 0 is the best
    if shaping == "ranks":
        return (ranks.to(losses.dtype) / max(count - 1, 1) - 0.5) / count
    return -_utilities(count, losses)[ranks]


def _utilities(count: int, like: Tensor) -> Tensor:
    """Return utilities by rank, the best first: max(0, log(M/2 + 1) - log k), normed to a sum of 1, less 1/M."""
    places = torch.arange(1, count + 1, device=like.device, dtype=like.dtype)
    raw = (math.log(count / 2 + 1) - places.log()).clamp_min(0)
    return raw / raw.sum() - 1 / count


def recombination(losses: Tensor) -> tuple[Tensor, float]:
    """Return weights of CMA-ES (M,): positive for the better half, with a sum of 1, else 0; and the number of members they are worth.

    Args:
        losses: (M,); what is not finite counts as the worst.
    """
    count = len(losses)
    ranks = losses.nan_to_num(nan=math.inf, posinf=math.inf).argsort(stable=True).argsort()
    places = torch.arange(1, count + 1, dtype=torch.float64)
    raw = (math.log((count + 1) / 2) - places.log()).clamp_min(0) if count > 1 else places
    raw = raw / raw.sum()
    return raw.to(losses)[ranks], float(1 / raw.square().sum())
