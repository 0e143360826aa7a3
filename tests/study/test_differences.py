"""Errors of differences. Oracles: SciPy's tests, Welch's degrees of freedom, simulation, Holm's correction by hand."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from scipy import stats

from bpfree.study.differences import Paired, gap_share, holm, judge
from bpfree.study.statistics import interval, total_error


def test_without_examples_it_is_students_paired_test() -> None:
    gains = [1.0, 2.0, 3.0, 2.5]
    found = judge({0: ("", Paired(gains))})[0]
    expected = stats.ttest_1samp(gains, 0)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.interval == pytest.approx(tuple(expected.confidence_interval()))
    assert found.sign == 1


def test_new_examples_add_their_variance() -> None:
    """s^2 / n + Var_j(d_j) / N, with the degrees of freedom of Welch's test, whose formula is the same."""
    draw = np.random.default_rng(0)
    gains, examples = [0.4, 1.0, 0.1, 0.9, 0.6], draw.normal(0.6, 20, 359)
    found = judge({0: ("", Paired(gains, examples))})[0]
    parts = statistics.variance(gains) / 5, float(examples.var(ddof=1)) / 359
    assert found.error == pytest.approx(math.sqrt(sum(parts)))
    welch = stats.ttest_ind(gains, examples - 30, equal_var=False)
    assert found.freedom == pytest.approx(welch.df)
    assert found.over_seeds == pytest.approx(math.sqrt(parts[0]))
    assert found.sign == 0


def test_equal_seeds_do_not_make_an_interval_of_no_width() -> None:
    """Three runs that are right on the same examples: the error is that of drawing others, a binomial one."""
    right = np.repeat([1.0, 0.0], [351, 8])
    low, high = interval([97.77] * 3, 100 * right)
    assert (high - low) / 2 == pytest.approx(1.97 * 100 * math.sqrt(351 / 359 * 8 / 359 / 358), rel=0.01)
    assert interval([97.77] * 3) is None


def test_equal_gains_alone_are_no_certainty() -> None:
    """Where nothing is known of single examples, three equal gains have no error; a column in which others differ has one."""
    alone = judge({0: ("", Paired([2.0] * 3))})[0]
    assert (alone.error, alone.sign, alone.why_unknown) == (None, 0, "error not known")
    beside = judge({0: ("", Paired([2.0] * 3)), 1: ("", Paired([1.0, 2.0, 3.0]))})[0]
    assert beside.error == pytest.approx(math.sqrt(0.5) / math.sqrt(3))
    assert judge({0: ("", Paired([2.0]))})[0].why_unknown == "one seed only"


def test_deviations_are_pooled_within_a_column() -> None:
    family = {
        "a": ("one", Paired([1.0, 3.0])),
        "b": ("one", Paired([0.0, 1.0, 2.0])),
        "c": ("two", Paired([5.0, 5.1])),
        "d": ("one", Paired([4.0])),
    }
    found = judge(family)
    pooled = math.sqrt((1 * 2.0 + 2 * 1.0) / 3)
    assert found["a"].error == pytest.approx(pooled / math.sqrt(2))
    assert found["d"].error == pytest.approx(pooled)  # one seed, but the column knows how much seeds differ
    assert found["c"].error == pytest.approx(statistics.stdev([5.0, 5.1]) / math.sqrt(2))
    assert found["a"].freedom == 3
    assert judge({0: ("", Paired([50.0]))})[0].error is None


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_family_of_true_nulls_is_seldom_wrong() -> None:
    """Simulation: with Holm's correction at 5 % at most about one family in twenty names a winner that is none."""
    draw = np.random.default_rng(1)
    wrong = 0
    for _ in range(400):
        family = {row: ("", Paired(list(draw.normal(0, 1, 5)))) for row in range(6)}
        wrong += any(each.sign for each in judge(family).values())
    assert wrong / 400 < 0.08


def test_the_detectable_difference_is_found_four_times_of_five() -> None:
    draw = np.random.default_rng(2)
    sizes = []
    for _ in range(300):
        family = {row: ("", Paired(list(draw.normal(0, 1, 5)))) for row in range(8)}
        sizes.append(next(iter(judge(family).values())).detectable)
    size, found = statistics.fmean(sizes), 0
    for _ in range(400):
        family = {row: ("", Paired(list(draw.normal(size if row == 0 else 0, 1, 5)))) for row in range(8)}
        found += judge(family)[0].p <= 0.05
    assert found / 400 == pytest.approx(0.8, abs=0.07)


def test_seeds_that_decide_one_point() -> None:
    """More seeds narrow the error over seeds alone; what new examples add stays."""
    found = judge({0: ("", Paired([0.0, 2.0, 1.0, -1.0, 3.0]))})[0]
    assert found.seeds is not None
    deviation = statistics.stdev([0.0, 2.0, 1.0, -1.0, 3.0])

    def smallest(n: int) -> float:
        return float(stats.t.ppf(0.975, 4) + stats.t.ppf(0.8, 4)) * deviation / math.sqrt(n)

    assert smallest(found.seeds) <= 1 < smallest(found.seeds - 1)
    few = np.random.default_rng(0).normal(0, 20, 359)
    assert judge({0: ("", Paired([0.0, 2.0, 1.0], few))})[0].seeds is None


def test_shares_of_the_gap() -> None:
    ours, floor, ceiling = [94.0, 95.0, 96.0], [90.0, 90.0, 90.0], [98.0, 98.5, 99.0]
    share, known = gap_share(ours, floor, ceiling, error=0.3, least=2.0) or (0.0, None)
    assert share == pytest.approx(5 / 8.5)
    assert known is not None
    assert known.low < share < known.high
    assert gap_share(ours, floor, [91.9] * 3, error=0.1, least=2.0) is None
    assert gap_share(ours, floor, ceiling, error=3.0, least=2.0) is None
    assert gap_share(ours[:2], floor[:2], ceiling[:2], error=0.3, least=2.0) == (pytest.approx(4.5 / 8.25), None)


def test_the_ends_of_a_share_are_where_students_test_rejects() -> None:
    """Fieller's interval by its definition: at each end r the mean of (rule - floor) - r (ceiling - floor) has p = 5 %."""
    draw = np.random.default_rng(1)
    floor = draw.normal(90, 0.5, 5)
    ours, ceiling = floor + draw.normal(4, 0.6, 5), floor + draw.normal(8, 0.8, 5)
    share, known = gap_share(list(ours), list(floor), list(ceiling), error=0.3, least=2.0) or (0.0, None)
    assert known is not None
    assert known.low < share < known.high
    for end in known:
        assert stats.ttest_1samp((ours - floor) - end * (ceiling - floor), 0).pvalue == pytest.approx(0.05)
    # a gap that three seeds do not tell from zero bounds no ratio
    assert gap_share([91, 92, 94], [90, 90, 90], [91, 93, 95], error=0.3, least=2.0) == (pytest.approx(7 / 9), None)
    # without any variance there is one value
    assert gap_share([94] * 3, [90] * 3, [98] * 3, error=0.0, least=2.0) == (0.5, (0.5, 0.5))


def test_parts_without_variance_have_no_say() -> None:
    assert total_error(4.0, 3, 0.0, math.inf) == (2.0, 3)
    assert total_error(0.0, 3, 4.0, 100) == (2.0, 100)
