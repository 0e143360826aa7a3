"""Statistics of reports. Oracles: scipy's Student interval, bootstrap and Mann-Whitney test; profiles and medians by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from bpfree.study import statistics

THREE = [97.2, 98.1, 96.4]
TWELVE = [float(value) for value in np.random.default_rng(3).normal(90, 2, 12)]


@pytest.mark.parametrize("values", [THREE, TWELVE, [1.0, 2.0]])
def test_students_interval(values: list[float]) -> None:
    oracle = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert statistics.t_interval(values) == pytest.approx(oracle)


def test_the_bootstrap_is_scipys_and_repeats_itself() -> None:
    """Both are random: they agree to the error of 10,000 resamples, a few per cent of the width."""
    found = statistics.bootstrap_interval(TWELVE)
    oracle = stats.bootstrap((TWELVE,), np.mean, method="percentile", n_resamples=100_000, random_state=1).confidence_interval
    assert found == pytest.approx((oracle.low, oracle.high), abs=0.03 * (oracle.high - oracle.low))
    assert found == statistics.bootstrap_interval(TWELVE)


def test_which_interval() -> None:
    assert statistics.interval(TWELVE[:9]) == statistics.t_interval(TWELVE[:9])
    assert statistics.interval(TWELVE[:10]) == statistics.bootstrap_interval(TWELVE[:10])


def test_an_interval_over_new_examples_holds_the_mean() -> None:
    """Oracle: simulation. Seeds shift all examples alike, examples differ: the mean over both is in 95 % of the intervals."""
    draw = np.random.default_rng(0)
    held = alone = 0
    for _ in range(400):
        seeds, examples = draw.normal(0, 1, 5), draw.normal(0, 10, 80)
        values, of_each = 90 + seeds + examples.mean(), 90 + seeds.mean() + examples
        both, over_seeds = statistics.interval(list(values), of_each), statistics.interval(list(values))
        assert both is not None
        assert over_seeds is not None
        assert (both.low + both.high) / 2 == pytest.approx(values.mean())
        held += both.low <= 90 <= both.high
        alone += over_seeds.low <= 90 <= over_seeds.high
    assert held / 400 == pytest.approx(0.95, abs=0.04)
    assert alone / 400 < 0.85  # it is of this test split
    assert statistics.interval([97.0], np.ones(5)) is None
    assert statistics.interval([97.0, 98.0], np.ones(1)) == statistics.t_interval([97.0, 98.0])


@pytest.mark.parametrize("values", [[], [97.0], [97.0, math.nan], [1.0, math.inf]])
def test_no_interval(values: list[float]) -> None:
    assert statistics.interval(values) is None


def test_equal_values_have_no_interval_over_seeds_alone() -> None:
    """An interval without width would be a certainty that three equal seeds do not give."""
    assert statistics.interval([5.0] * 3) is None
    assert statistics.interval([5.0] * 12) is None
    assert statistics.interval([5.0] * 3, np.full(10, 5.0)) is None
    half = float(stats.t.ppf(0.975, 99)) * 0.3
    assert statistics.interval([5.0] * 3, binomial=(0.09, 100)) == pytest.approx((5 - half, 5 + half))


# --- time to a target ---------------------------------------------------------------------------------------------------


def test_the_first_epoch_at_the_target() -> None:
    history = [
        {"epoch": 1.0, "val/accuracy": 0.5},
        {"epoch": 2.0},
        {"epoch": 3.0, "val/accuracy": 0.9},
        {"epoch": 4.0, "val/accuracy": 0.7},
    ]
    assert (statistics.first_reached(history, "val/accuracy", 0.6) or {})["epoch"] == 3
    assert (statistics.first_reached(history, "val/accuracy", 0.1 * 9) or {})["epoch"] == 3  # 0.9 but for rounding
    assert (statistics.first_reached(history, "val/accuracy", 0.5) or {})["epoch"] == 1
    assert statistics.first_reached(history, "val/accuracy", 0.95) is None
    assert statistics.first_reached([], "val/accuracy", 0.1) is None
    losses = [{"epoch": 1.0, "val/loss": 2.0}, {"epoch": 2.0, "val/loss": math.nan}, {"epoch": 3.0, "val/loss": 0.5}]
    assert (statistics.first_reached(losses, "val/loss", 1.0, greater=False) or {})["epoch"] == 3


@pytest.mark.parametrize(
    ("times", "median"),
    [
        ([3.0, 1.0, 2.0], 2.0),
        ([1.0, 2.0, math.inf], 2.0),
        ([1.0, math.inf, math.inf], math.inf),
        ([1.0, math.inf], math.inf),
        ([1.0, 2.0, 4.0, math.inf], 3.0),
        ([1.0, 2.0, math.inf, math.inf], math.inf),
        ([7.0], 7.0),
    ],
)
def test_medians_with_misses(times: list[float], median: float) -> None:
    assert statistics.median_with_misses(times) == median


def test_no_runs_have_no_median() -> None:
    assert math.isnan(statistics.median_with_misses([]))


# --- profiles -----------------------------------------------------------------------------------------------------------

TIMES = [[1.0, 4.0, math.inf, math.inf], [2.0, 2.0, 5.0, math.inf], [math.inf, 9.0, 5.0, math.inf]]
"""Three rows on four tasks. Ratios to the fastest: 1, 2, -, - | 2, 1, 1, - | -, 4.5, 1, -; no one solves the last task."""


def test_performance_profiles() -> None:
    found = statistics.performance_profile(TIMES, [1, 1.5, 2, 4])
    assert found.tolist() == [[0.25, 0.25, 0.5, 0.5], [0.5, 0.5, 0.75, 0.75], [0.25, 0.25, 0.25, 0.25]]


def test_their_integrals() -> None:
    """Up to 4: (4 - ratio) / 3 of each task within it, over four tasks."""
    assert statistics.profile_integral(TIMES) == pytest.approx([(3 + 2) / 12, (2 + 3 + 3) / 12, 3 / 12])
    taus = np.linspace(1, 4, 30_001)
    assert statistics.profile_integral(TIMES) == pytest.approx(statistics.performance_profile(TIMES, taus).mean(1), abs=1e-3)


def test_score_profiles_count_each_task_the_same() -> None:
    scores = [[0.2, 0.6], [0.4, 0.5, 0.9, math.nan]]
    assert statistics.score_profile(scores, [0.0, 0.5, 0.95]).tolist() == [(1 + 0.75) / 2, (0.5 + 0.25) / 2, 0.0]


# --- probability of improvement -----------------------------------------------------------------------------------------


def test_a_probability_is_mann_whitneys_statistic_over_the_pairs() -> None:
    generator = np.random.default_rng(0)
    ours, theirs = (generator.integers(0, 8, (3, 6)).astype(float).tolist() for _ in range(2))
    oracle = np.mean([stats.mannwhitneyu(x, y).statistic / 36 for x, y in zip(ours, theirs, strict=True)])
    found = statistics.probability_of_improvement(ours, theirs)
    assert found.probability == pytest.approx(oracle)
    assert found.interval.low <= found.probability <= found.interval.high
    opposite = statistics.probability_of_improvement(theirs, ours)
    assert opposite.probability == pytest.approx(1 - oracle)
    assert found == statistics.probability_of_improvement(ours, theirs)


def test_probabilities_by_hand() -> None:
    assert statistics.probability_of_improvement([[2.0, 3.0]], [[0.0, 1.0]]) == (1.0, (1.0, 1.0))
    assert statistics.probability_of_improvement([[1.0, 1.0]], [[1.0, 1.0]]) == (0.5, (0.5, 0.5))
    assert statistics.probability_of_improvement([[1.0, 3.0], [5.0]], [[1.0, 2.0], [0.0]]).probability == ((0.5 + 0 + 1 + 1) / 4 + 1) / 2
    assert statistics.probability_of_improvement([[math.nan, 1.0]], [[math.nan, 0.0]]).probability == (0.5 + 0 + 1 + 1) / 4


def test_its_interval_is_a_bootstrap_within_tasks() -> None:
    """The same with indices drawn one by one."""
    ours, theirs = [[1.0, 2.0, 3.0, 4.0]], [[0.0, 2.5, 2.6, 5.0]]
    generator = np.random.default_rng(9)
    drawn = []
    for _ in range(4000):
        x, y = (np.array(values[0])[generator.integers(0, 4, 4)] for values in (ours, theirs))
        drawn.append(np.mean(x[:, None] > y) + 0.5 * np.mean(x[:, None] == y))
    low, high = np.quantile(drawn, [0.025, 0.975])
    found = statistics.probability_of_improvement(ours, theirs)
    assert found.interval == pytest.approx((low, high), abs=0.07)
