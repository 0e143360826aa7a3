"""Which times a batch is trained at: spread evenly over what there is to learn of the label, which is measured on the way.

By I-MMSE a state's information on the label grows with t as ``SNR'(t) e(t) / 2`` nats, where e(t) is the squared error of the best
estimate. A time that is drawn with this density says as much as any other; a uniform one says next to nothing wherever the estimate is
certain already, and under Eq. 9 has its largest weight there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bpfree_noprop.noise import LearnedSchedule

__all__ = ["InformationTimes"]

BINS = 32
EVEN = 0.1
"""Share of the draws that are uniform in t, so that the error is known everywhere and weights are at most ten times those of Eq. 9."""
MEMORY = 0.998
"""What an example leaves of the examples before it in its bin's mean error: the last five hundred count."""


class InformationTimes(nn.Module):
    """Draws times in proportion to ``SNR'(t) e(t)``, with the mean squared error e measured in bins of t.

    Attributes:
        errors, counts: (K,) sums of squared errors and numbers of examples, of which older ones count less and less; they begin with one
            example of error 1 in each bin.
    """

    errors: Tensor
    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("errors", torch.ones(BINS))
        self.register_buffer("counts", torch.ones(BINS))

    @property
    def profile(self) -> Tensor:
        """Mean squared error (K,) of each bin."""
        return self.errors / self.counts

    @torch.no_grad()
    def masses(self, schedule: LearnedSchedule) -> Tensor:
        """Return the probabilities (K,) of the bins."""
        edges = torch.linspace(0, 1, BINS + 1, device=self.errors.device, dtype=self.errors.dtype)
        information = torch.exp(-schedule(edges)[0]).diff() * self.profile
        return (1 - EVEN) * information / information.sum() + EVEN / BINS

    @torch.no_grad()
    def draw(self, count: int, schedule: LearnedSchedule, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``count`` times, and return them with their densities, (N,) each.

        They are evenly spread quantiles with one random shift for all: each is distributed as it should be, and together they leave no
        gap. Within a bin the density is constant.
        """
        masses = self.masses(schedule)
        shift = torch.rand((), generator=generator, device=masses.device, dtype=masses.dtype)
        quantiles = (torch.arange(count, device=masses.device, dtype=masses.dtype) / count + shift) % 1
        ends = masses.cumsum(0)
        bins = torch.searchsorted(ends, quantiles, right=True).clamp_max(BINS - 1)
        within = ((quantiles - ends[bins] + masses[bins]) / masses[bins]).clamp(0, 1)
        return (bins + within) / BINS, masses[bins] * BINS

    @torch.no_grad()
    def note(self, t: Tensor, errors: Tensor) -> None:
        """Add examples' squared errors (N,) at their times (N,)."""
        bins = (t * BINS).long().clamp(0, BINS - 1)
        counts = torch.zeros_like(self.counts).index_add_(0, bins, torch.ones_like(errors, dtype=self.counts.dtype))
        sums = torch.zeros_like(self.errors).index_add_(0, bins, errors.to(self.errors.dtype))
        kept = MEMORY**counts
        self.counts.copy_(kept * self.counts + counts)
        self.errors.copy_(kept * self.errors + sums)
