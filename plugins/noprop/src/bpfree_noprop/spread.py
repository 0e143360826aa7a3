"""How far sampled chains of real targets spread: as far as their mean is off, measured out of sample.

With exact blocks a step's noise ``c_t I + a_t^2 V_t`` gives the chain's end the variance of the target given x. Blocks that have learned
from few examples trust x more than the state, in which the label is, than they should: a state's deviation is then damped by more than is
right, and ``V_t``, a mean square, makes up for a part of it alone. If the best weight of the state is w and a block's is kw, the variance
that the state hands on is ``(k^2 + (1 - k)^2) w^2`` in place of ``w^2``: at most half too small.

So all ``V_t`` are multiplied by one factor, for which draws spread as they must: of draws from the target's own distribution the mean
squared error of their mean is their variance. The error is measured out of sample, by cross-fitting on every training example; the
variance of draws needs no targets, and is that of the blocks that will be used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from bpfree.tasks.task import Examples

if TYPE_CHECKING:
    from bpfree_noprop.inference import DiscreteChain

__all__ = ["Spread", "match_spread", "measured_spread", "spread_factor"]

DRAWN = 100_000
"""Chains that are sampled, divided among the examples."""
FEWEST, MOST = 2, 24
"""Draws for an example."""
LARGEST = 10.0


class Spread(NamedTuple):
    """The variance of draws, and the squared error of their mean, per dimension of the whitened target."""

    variance: float
    error: float


def spread_factor(without: float, with_one: float, error: float) -> float:
    """Return the factor of the noise at which the variance is the squared error, between 0 and 10.

    The variance is linear in the factor as far as blocks are linear in the state.

    Args:
        without, with_one: variance of the draws with the factors 0 and 1.
        error: mean squared error of the draws' mean.
    """
    gained = with_one - without
    return min(max((error - without) / gained, 0.0), LARGEST) if gained > 0 else 1.0


def match_spread(rule: DiscreteChain, data: Examples, generator: torch.Generator, error: float | None = None) -> tuple[float, float]:
    """Find the factor of ``rule.residuals`` that gives draws the right spread.

    Args:
        rule: whose ``spread`` is set to the factor.
        data: examples.
        generator: of the draws.
        error: squared error of the draws' mean; ``None``: measured on the examples, which the rule has not learned from then.

    Returns:
        The factor, and the error.
    """
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    found = []
    for factor in (0.0, 1.0):
        rule.spread.fill_(factor)
        found.append(measured_spread(rule, data, torch.Generator(generator.device).manual_seed(seed)))
    error = found[1].error if error is None else error
    rule.spread.fill_(spread_factor(found[0].variance, found[1].variance, error))
    return float(rule.spread), error


@torch.no_grad()
def measured_spread(rule: DiscreteChain, data: Examples, generator: torch.Generator) -> Spread:
    """Draw for examples, and measure how far draws spread and how far their mean is off."""
    draws = min(max(DRAWN // len(data), FEWEST), MOST)
    variance, error, numbers = 0.0, 0.0, 0
    for batch in rule.batches(data, generator.device):
        u = rule.embed(rule.rows(batch))
        drawn = rule.embed(rule.sample(batch.inputs, draws, generator).flatten(0, 1).flatten(1)).unflatten(0, (draws, len(batch)))
        own = drawn.var(0)
        variance += float(own.sum())
        error += float(((u - drawn.mean(0)).square() - own / draws).sum())  # of the mean of endless draws
        numbers += u.numel()
    return Spread(variance / numbers, error / numbers)
