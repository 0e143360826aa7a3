"""What an estimate of real targets leaves open at each time: its residual covariance, measured out of sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bpfree_noprop.embeddings import full_precision

__all__ = ["TimedResiduals"]

POINTS = 33
"""Times at which residuals are measured, evenly spaced from 0 to 1."""


class TimedResiduals(nn.Module):
    """Covariances of the target given input and state, at even times, and by linear interpolation between them.

    Before they are measured they are those of a target of variance 1 of which the input says nothing: ``1 - abar(t)``.

    Args:
        abar: (P,) at the times.
        dim: d.
    """

    covariances: Tensor
    times: Tensor

    def __init__(self, abar: Callable[[Tensor], Tensor], dim: int) -> None:
        super().__init__()
        self.register_buffer("times", torch.linspace(0, 1, POINTS), persistent=False)
        self.register_buffer("covariances", (1 - abar(self.times)).detach()[:, None, None] * torch.eye(dim))

    def at(self, t: float) -> Tensor:
        """Return the covariance (d, d) at a time in [0, 1]."""
        place = t * (POINTS - 1)
        before = min(int(place), POINTS - 2)
        return torch.lerp(self.covariances[before], self.covariances[before + 1], place - before)

    def sums(self, u: Tensor, estimate: Callable[[float], Tensor]) -> Tensor:
        """Return the summed squares and products (P, d, d) of what estimates (N, d) of targets ``u`` (N, d) lack at each time."""
        errors = [estimate(t) - u for t in self.times.tolist()]
        with full_precision(u.device):
            return torch.stack([error.T @ error for error in errors])
