"""Predictive distributions. Oracles: closed forms of the normal distribution, all pairs of draws, the share of draws that are covered."""

from __future__ import annotations

import math

import pytest
import torch

from bpfree import Batch, TaskSpec, UsageError
from bpfree.tasks.intervals import central, crps, gaussian_crps, quantile
from bpfree.tasks.metrics import BUILT_IN

DRAWS = torch.Generator().manual_seed(0)


def test_the_score_of_draws_is_that_of_all_pairs() -> None:
    drawn, targets = torch.randn(7, 5, 2, generator=DRAWS), torch.randn(5, 2, generator=DRAWS)
    between = sum((drawn[i] - drawn[j]).abs() for i in range(7) for j in range(7)) / (7 * 6)
    torch.testing.assert_close(crps(drawn, targets), (drawn - targets).abs().mean(0) - between / 2)
    torch.testing.assert_close(crps(drawn[:1], targets), (drawn[0] - targets).abs())


@pytest.mark.parametrize("count", [2, 5, 50])
def test_the_score_of_draws_is_unbiased(count: int) -> None:
    # Oracle: the closed form for a normal distribution, Gneiting and Raftery 2007.
    drawn = 3 + 2 * torch.randn(count, 200_000 // count, generator=DRAWS, dtype=torch.float64)
    for target in (-1.0, 3.0, 4.5):
        y = torch.full((drawn.shape[1],), target, dtype=torch.float64)
        assert abs(float(crps(drawn, y).mean() - gaussian_crps(y * 0 + 3, 2.0, y).mean())) < 0.03


def test_the_normal_score_has_its_closed_form() -> None:
    # Oracle: the integral of (F(x) - 1{x >= y})^2 by quadrature; at the mean it is deviation (sqrt(2) - 1) / sqrt(pi).
    x = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    for target in (-3.0, 0.5, 2.0):
        below = torch.special.ndtr((x - 0.5) / 1.7)
        integral = torch.trapezoid((below - (x >= target).double()).square(), x)
        found = gaussian_crps(torch.tensor(0.5, dtype=torch.float64), 1.7, torch.tensor(target))
        torch.testing.assert_close(found, integral, rtol=1e-3, atol=1e-4)
    at_mean = gaussian_crps(torch.zeros(1, dtype=torch.float64), 2.0, torch.zeros(1))
    assert float(at_mean) == pytest.approx(2 * (math.sqrt(2) - 1) / math.sqrt(math.pi))


@pytest.mark.parametrize(("count", "level"), [(19, 0.9), (99, 0.9), (99, 0.5), (30, 0.8)])
def test_an_interval_of_few_draws_has_its_level(count: int, level: float) -> None:
    # Oracle: a further draw is as any other, of a distribution that is not symmetric.
    drawn = torch.empty(count + 1, 40_000).exponential_(generator=DRAWS)
    low, high = central(drawn[:-1], level)
    share = float(((low <= drawn[-1]) & (drawn[-1] <= high)).float().mean())
    assert abs(share - level) < 4 * math.sqrt(level * (1 - level) / 40_000)


def test_quantiles_are_draws_by_rank() -> None:
    drawn = torch.tensor([3.0, 1.0, 4.0, 2.0])
    assert [float(quantile(drawn, share)) for share in (0.2, 0.5, 0.7, 0.01, 0.99)] == pytest.approx([1.0, 2.5, 3.5, 1.0, 4.0])


def test_levels_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match=r"18 draws have no interval of 90 %") as caught:
        central(torch.rand(18, 3), 0.9)
    assert caught.value.fix == "take 19 or more"
    with pytest.raises(UsageError, match="no probability"):
        central(torch.rand(99, 3), 90)


def test_metrics_of_draws_are_means_over_batches() -> None:
    spec = TaskSpec("t", (1,), 2, "real")
    drawn, targets = torch.randn(99, 30, 2, generator=DRAWS), torch.randn(30, 2, generator=DRAWS)
    low, high = central(drawn, 0.9)
    expected = {
        "crps": crps(drawn, targets).mean(),
        "coverage-90": ((low <= targets) & (targets <= high)).float().mean(),
        "interval-width-90": (high - low).mean(),
    }
    for name, value in expected.items():
        begin = BUILT_IN[name].begin
        assert begin is not None
        assert BUILT_IN[name].of_samples
        of_split = begin(spec, lambda inputs: inputs)
        for part in (slice(0, 11), slice(11, 30)):
            of_split.add(drawn[:, part], Batch(torch.zeros(len(targets[part]), 1), targets[part]))
        assert of_split.value() == pytest.approx(float(value), rel=1e-5)
