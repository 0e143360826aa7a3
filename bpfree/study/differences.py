"""Judge differences between rows of a study: their errors, the correction for many comparisons, and the seeds that would suffice.

A difference of means over n seeds on a test split of N examples has the variance

    s_d^2 / n + Var_j(d_j) / N

with ``s_d`` the deviation of the paired differences over seeds and ``d_j`` the difference of example j, averaged over seeds. The first
part is the error over seeds on this very test split, the second that of drawing other examples. ``s_d`` is pooled over the rows of a
column, since a handful of seeds estimate it badly. Degrees of freedom are Satterthwaite's (Biometrics Bulletin 2, 1946), the correction
is Holm's (Scandinavian Journal of Statistics 6, 1979).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bpfree.study.statistics import LEVEL, Interval, quantile, total_error

__all__ = ["Difference", "Paired", "gap_share", "holm", "judge"]

Examples = NDArray[np.float64]

POWER = 0.8
"""Power at which the smallest detectable difference is defined."""
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Paired:
    """The differences between a row and another row, seed by seed.

    Attributes:
        gains: of each seed that both have: what the row is better by, in the unit of the table.
        examples: (N,) the gain on each test example, averaged over these seeds; ``None`` where predictions are not available.
    """

    gains: Sequence[float]
    examples: Examples | None = None

    @property
    def gain(self) -> float:
        """Mean difference over seeds; positive: the row is better."""
        return statistics.fmean(self.gains)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the gains over seeds; not known from one seed."""
        return statistics.stdev(self.gains) if len(self.gains) > 1 else None

    @property
    def over_examples(self) -> float:
        """Variance of the gain over new examples: Var_j(d_j) / N; 0 where it is not known."""
        if self.examples is None or len(self.examples) < 2:
            return 0.0
        return float(self.examples.var(ddof=1)) / len(self.examples)


@dataclass(frozen=True)
class Difference:
    """A paired difference with its error and what may be said of it.

    Attributes:
        paired: the gains.
        over_seeds: standard error over seeds, from the pooled deviation; ``None``: no comparison has two seeds, or their gains are equal
            and nothing is known of single examples.
        error: standard error over seeds and new examples.
        freedom: degrees of freedom of ``error``.
        p: two-sided, of this comparison alone.
        adjusted: by Holm's correction over the family.
        detectable: the smallest difference that this many seeds detect at 5 % with a power of 80 %.
        seeds: that would decide one point; ``None``: no number of seeds would, on this test split.
    """

    paired: Paired
    over_seeds: float | None = None
    error: float | None = None
    freedom: float = math.inf
    p: float = 1.0
    adjusted: float = 1.0
    detectable: float | None = None
    seeds: int | None = None

    @property
    def gain(self) -> float:
        """Mean difference over seeds; positive: the row is better."""
        return self.paired.gain

    @property
    def gains(self) -> Sequence[float]:
        """Paired difference of each seed."""
        return self.paired.gains

    @property
    def interval(self) -> Interval | None:
        """95 % interval of the gain, for this comparison alone."""
        if self.error is None:
            return None
        half = quantile(self.freedom, (1 + LEVEL) / 2) * self.error
        return Interval(self.gain - half, self.gain + half)

    @property
    def why_unknown(self) -> str:
        """Say why the error is not known; empty if it is."""
        return "" if self.error is not None else "one seed only" if len(self.gains) < 2 else "error not known"

    @property
    def sign(self) -> int:
        """1: the row is better, -1: it is worse, 0: not distinguishable within the family, or the error is not known."""
        if self.error is None or self.adjusted > 1 - LEVEL:
            return 0
        return 1 if self.gain > 0 else -1


def judge(family: Mapping[object, tuple[object, Paired]], *, point: float = 1.0) -> dict[object, Difference]:
    """Judge a family of comparisons together.

    Args:
        family: of each comparison the column in which deviations are pooled, and its gains.
        point: the difference that :attr:`Difference.seeds` is to decide.

    Returns:
        A difference for each key.
    """
    pooled = {column: _pooled([paired for other, paired in family.values() if other == column]) for column, _ in family.values()}
    found = {key: _difference(paired, *pooled[column], point) for key, (column, paired) in family.items()}
    known = [key for key, each in found.items() if each.error is not None]
    adjusted = holm([found[key].p for key in known])
    return found | {key: dataclasses.replace(found[key], adjusted=p) for key, p in zip(known, adjusted, strict=True)}


def _pooled(family: Sequence[Paired]) -> tuple[float | None, int]:
    """Pool the deviation over seeds of all comparisons; return it with its degrees of freedom."""
    several = [paired for paired in family if len(paired.gains) > 1]
    freedom = sum(len(paired.gains) - 1 for paired in several)
    if not freedom:
        return None, 0
    squares = sum((len(paired.gains) - 1) * statistics.variance(paired.gains) for paired in several)
    return math.sqrt(squares / freedom), freedom


def _difference(paired: Paired, deviation: float | None, freedom: int, point: float) -> Difference:
    rounding = 1e-12 * max(map(abs, paired.gains))
    if deviation is None or (deviation <= rounding and paired.examples is None):  # equal seeds say nothing about new examples
        return Difference(paired)
    n, examples = len(paired.gains), paired.over_examples
    count = math.inf if paired.examples is None else len(paired.examples) - 1
    over_seeds = deviation / math.sqrt(n)
    error, free = total_error(over_seeds**2, freedom, examples, count)
    p = 1.0 if paired.gain == 0 else 0.0 if error == 0 else _two_sided(abs(paired.gain) / error, free)
    detectable = (quantile(free, (1 + LEVEL) / 2) + quantile(free, POWER)) * error
    return Difference(paired, over_seeds, error, free, p, p, detectable, _seeds_for(point, deviation, freedom, examples, count))


def _seeds_for(point: float, deviation: float, freedom: float, over_examples: float, examples: float) -> int | None:
    """Find the fewest seeds that detect a difference of ``point``; ``None`` beyond ``MOST_SEEDS``."""
    normal = (
        quantile(math.inf, (1 + LEVEL) / 2) + quantile(math.inf, POWER)
    ) ** 2  # Student's quantiles are larger than the normal ones, so that fewer seeds cannot suffice
    room = point**2 / normal - over_examples
    fewest = math.ceil(deviation**2 / room) if room > 0 else MOST_SEEDS + 1
    for n in range(max(2, fewest), MOST_SEEDS + 1):
        error, free = total_error(deviation**2 / n, freedom, over_examples, examples)
        if (quantile(free, (1 + LEVEL) / 2) + quantile(free, POWER)) * error <= point:
            return n
    return None


def holm(values: Sequence[float]) -> list[float]:
    """Adjust p-values by Holm's step-down correction, in their order."""
    order = sorted(range(len(values)), key=values.__getitem__)
    adjusted, largest = [1.0] * len(values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = largest
    return adjusted


def _two_sided(t: float, freedom: float) -> float:
    from scipy.special import ndtr, stdtr

    return float(2 * (stdtr(freedom, -t) if math.isfinite(freedom) else ndtr(-t)))


# --- share of the gap -------------------------------------------------------------------------------------------------


def gap_share(
    ours: Sequence[float], floor: Sequence[float], ceiling: Sequence[float], *, error: float, least: float
) -> tuple[float, Interval | None] | None:
    """Compute (rule - floor) / (ceiling - floor) from means, with Fieller's interval over seeds.

    It holds every ratio r for which Student's test does not reject that the mean of ``(rule - floor) - r (ceiling - floor)`` is zero:
    Fieller, "Some problems in interval estimation", Journal of the Royal Statistical Society B 16, 1954.

    Args:
        ours, floor, ceiling: scores of the same seeds, greater is better.
        error: standard error of the gap, ceiling less floor.
        least: the smallest gap for which a share is reported.

    Returns:
        ``None`` where the gap is below three standard errors or ``least``; the interval is ``None`` below three seeds, and where they do
        not tell the gap from zero, so that it has no ends.
    """
    gap = statistics.fmean(ceiling) - statistics.fmean(floor)
    if gap < least or gap < 3 * error:
        return None
    rows = np.asarray([ours, ceiling], float) - np.asarray(floor, float)
    share = float(rows[0].mean() / rows[1].mean())
    return share, _fieller(rows) if len(ours) > 2 else None


def _fieller(rows: Examples) -> Interval | None:
    """Compute Fieller's interval of the ratio of the means of two rows, (2, n)."""
    n = rows.shape[1]
    above, below = rows.mean(1)
    (v_above, both), (_, v_below) = np.cov(rows) / n * quantile(n - 1, (1 + LEVEL) / 2) ** 2
    a, b, c = below**2 - v_below, above * below - both, above**2 - v_above
    if a <= 0:
        return None
    half = math.sqrt(max(0.0, b * b - a * c))
    return Interval(float((b - half) / a), float((b + half) / a))
