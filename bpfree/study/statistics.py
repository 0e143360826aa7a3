"""Statistics of reports: intervals, time to a target, performance profiles, probability of improvement.

Sources. Percentile bootstrap: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13. Performance profiles: Dolan and
Moré, Mathematical Programming 91, 2002; their integral: Dahl et al., "Benchmarking neural network training algorithms" (AlgoPerf),
2023. Score distributions and the probability of improvement, with a bootstrap that is stratified by task: Agarwal et al., "Deep
reinforcement learning at the edge of the statistical precipice" (rliable), NeurIPS 2021.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Improvement",
    "Interval",
    "bootstrap_interval",
    "first_reached",
    "interval",
    "median_with_misses",
    "performance_profile",
    "probability_of_improvement",
    "profile_integral",
    "quantile",
    "score_profile",
    "t_interval",
    "total_error",
]

LEVEL = 0.95
RESAMPLES = 10_000
FEW = 10
"""Below this number of values an interval is Student's: percentiles of a bootstrap over a handful of values are far too narrow."""

Array = NDArray[np.float64]


class Interval(NamedTuple):
    """An interval of a mean or of a probability."""

    low: float
    high: float


class Improvement(NamedTuple):
    """The probability that a run of one row is better than a run of another, with its interval."""

    probability: float
    interval: Interval


# --- the mean ---------------------------------------------------------------------------------------------------------


def interval(values: Sequence[float], examples: Array | None = None, *, binomial: tuple[float, int] | None = None) -> Interval | None:
    """Compute the 95 % interval of a mean over seeds, and over new examples.

    With s the deviation over n seeds and e_j the mean score of example j of N, the variance is ``s^2 / n + Var_j(e_j) / N``, by Student's t
    with Satterthwaite's degrees of freedom. Where the single examples are not known, the variance of a share over N of them is at most the
    binomial one. Without either it is over seeds alone: Student's t below ten values, percentile bootstrap from ten on.

    Args:
        values: of the seeds.
        examples: (N,) mean score of each example over these seeds.
        binomial: where ``examples`` are not known: ``p (1 - p) / N`` of a share p, in the unit of the values, and N.

    Returns:
        ``None`` for fewer than two values, where any is not finite, and where equal seeds alone would give an interval without width, which
        is no certainty.
    """
    if not _measurable(values):
        return None
    if examples is not None and len(examples) > 1:
        over_examples, count = float(np.var(examples, ddof=1)) / len(examples), len(examples)
    elif binomial is not None and binomial[1] > 1:
        over_examples, count = binomial
    else:
        known = t_interval(values) if len(values) < FEW else bootstrap_interval(values)
        return known if known is not None and known.high > known.low else None
    error, freedom = total_error(float(np.var(values, ddof=1)) / len(values), len(values) - 1, over_examples, count - 1)
    if not error:
        return None
    half, mean = quantile(freedom, (1 + LEVEL) / 2) * error, float(np.mean(values))
    return Interval(mean - half, mean + half)


def total_error(over_seeds: float, freedom: float, over_examples: float, examples: float) -> tuple[float, float]:
    """Add two independent variances: the standard error, and Satterthwaite's degrees of freedom.

    Args:
        over_seeds, over_examples: the variances.
        freedom, examples: their degrees of freedom; infinite ones add nothing.
    """
    variance = over_seeds + over_examples
    parts = [(part, free) for part, free in ((over_seeds, freedom), (over_examples, examples)) if part > 0 and math.isfinite(free)]
    if variance == 0 or not parts:
        return math.sqrt(variance), float(freedom)
    return math.sqrt(variance), variance**2 / sum(part**2 / free for part, free in parts)


def quantile(freedom: float, level: float) -> float:
    """Return a quantile of Student's distribution; the normal one's for infinitely many degrees of freedom."""
    from scipy.special import ndtri, stdtrit

    return float(stdtrit(freedom, level) if math.isfinite(freedom) else ndtri(level))


def t_interval(values: Sequence[float], level: float = LEVEL) -> Interval | None:
    """Compute ``mean ± t_{n-1} stdev / sqrt(n)``, with Student's quantile of n - 1 degrees of freedom."""
    if not _measurable(values):
        return None
    array, n = np.asarray(values, float), len(values)
    half = quantile(n - 1, (1 + level) / 2) * float(array.std(ddof=1)) / math.sqrt(n)
    return Interval(float(array.mean()) - half, float(array.mean()) + half)


def bootstrap_interval(values: Sequence[float], level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0) -> Interval | None:
    """Compute percentiles of the means of samples drawn with replacement; the result is deterministic."""
    if not _measurable(values):
        return None
    array = np.asarray(values, float)
    drawn = np.random.default_rng(seed).integers(0, len(array), (resamples, len(array)))
    return _percentiles(array[drawn].mean(1), level)


def _measurable(values: Sequence[float]) -> bool:
    return len(values) > 1 and all(map(math.isfinite, values))


def _percentiles(drawn: Array, level: float) -> Interval:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


# --- time to a target ---------------------------------------------------------------------------------------------------


def first_reached(
    history: Sequence[Mapping[str, float]], metric: str, target: float, *, greater: bool = True
) -> Mapping[str, float] | None:
    """Find the first epoch whose metric is at the target or beyond it; ``None`` if there is none.

    Args:
        history: metrics of each epoch, in order.
        metric: such as ``val/accuracy``; epochs without it are skipped.
        target: in the metric's own unit.
        greater: whether beyond is above (an accuracy) or below (a loss).
    """
    sign, slack = (1 if greater else -1), 1e-9 * max(1.0, abs(target))  # 90 of 100 reach 0.9, whatever the rounding
    return next((epoch for epoch in history if metric in epoch and sign * (epoch[metric] - target) >= -slack), None)


def median_with_misses(times: Sequence[float]) -> float:
    """Compute the median time, with misses as infinite: infinite if half of the runs or more miss; NaN without runs."""
    if not times:
        return math.nan
    ordered = sorted(times)
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return math.inf if math.isinf(high) else (low + high) / 2


# --- profiles -----------------------------------------------------------------------------------------------------------


def performance_profile(times: Sequence[Sequence[float]], taus: Sequence[float]) -> Array:
    """Compute ``rho[row, i]``, the share of tasks on which the row takes at most ``taus[i]`` times the time of the fastest row.

    Args:
        times: by row and task; infinite where the target is missed. A task that no row solves counts as unsolved for every row.
        taus: ratios, from 1.
    """
    array = np.asarray(times, float)
    best = array.min(0, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = np.where(np.isfinite(array), array / best, math.inf)
    shares: Array = (ratios[:, :, None] <= np.asarray(taus, float) * (1 + 1e-12)).mean(1)
    return shares


def profile_integral(times: Sequence[Sequence[float]], limit: float = 4.0) -> Array:
    """Compute each row's integral of the profile over [1, limit], over ``limit - 1``: 1 is fastest everywhere, 0 never within limit.

    It is exact: a task whose ratio is r <= limit adds ``limit - r``.
    """
    array = np.asarray(times, float)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = np.where(np.isfinite(array), array / array.min(0, keepdims=True), math.inf)
    gained: Array = np.clip(limit - ratios, 0, None).mean(1) / (limit - 1)
    return gained


def score_profile(scores: Sequence[Sequence[float]], taus: Sequence[float]) -> Array:
    """Compute the share of runs with a score above each tau, averaged over tasks with equal weight.

    Args:
        scores: of one row: the scores of its runs, for each task, greater is better. NaN is below everything.
        taus: scores.
    """
    steps = np.asarray(taus, float)
    shares: Array = np.mean([(np.asarray(runs, float)[:, None] > steps).mean(0) for runs in scores], axis=0)
    return shares


# --- probability of improvement -----------------------------------------------------------------------------------------


def probability_of_improvement(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], resamples: int = 2000, seed: int = 0
) -> Improvement:
    """Estimate ``P(X > Y)``, with ties as one half, averaged over tasks; its interval resamples runs within each task.

    On a task with n and m runs it is the Mann-Whitney statistic U over n m.

    Args:
        ours, theirs: scores of the runs for each task, greater is better. NaN is below everything, and equal to NaN.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    generator = np.random.default_rng(seed)
    wins, drawn = [], np.zeros(resamples)
    for x, y in zip(ours, theirs, strict=True):
        table = _wins(np.asarray(x, float), np.asarray(y, float))
        wins.append(float(table.mean()))
        rows = _resampled(generator, resamples, len(x))
        columns = _resampled(generator, resamples, len(y))
        drawn += np.einsum("ri,ij,rj->r", rows, table, columns, optimize=True)
    return Improvement(float(np.mean(wins)), _percentiles(drawn / len(wins), LEVEL))


def _wins(x: Array, y: Array) -> Array:
    """Compare all pairs, (n, m): 1 where x is greater, 1/2 where both are equal."""
    x, y = (np.where(np.isnan(values), -math.inf, values) for values in (x, y))
    return np.greater.outer(x, y) + 0.5 * np.equal.outer(x, y)


def _resampled(generator: np.random.Generator, resamples: int, count: int) -> Array:
    """Draw resamples, (resamples, count): how often each of ``count`` runs was drawn, over ``count``."""
    drawn: Array = generator.multinomial(count, [1 / count] * count, size=resamples) / count
    return drawn
