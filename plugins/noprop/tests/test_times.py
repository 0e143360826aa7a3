"""Times that have something to teach: their density, what is remembered of errors, and what is learned at them.

The oracles' block answers ``(t + 1/2) A z + b`` for real targets, so that the expected squared error at each time is known in closed form,
and the loss of Eq. 9 and its gradients are integrals over t alone. (If it did not depend on t, the way between the schedule's ends would
have no gradient.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bpfree_noprop.ct import NoPropCT, NoPropCTConfig
from bpfree_noprop.noise import LearnedSchedule
from bpfree_noprop.timed import NETWORKS
from bpfree_noprop.times import BINS, EVEN, MEMORY, InformationTimes
from torch import Tensor, nn

from bpfree.options import OptimizerConfig
from bpfree.step import Batch
from bpfree.tasks.task import TaskSpec
from bpfree.training.stepper import new_step

N = 20_000


def rule_of(**options: Any) -> NoPropCT:
    torch.manual_seed(0)
    spec = TaskSpec("line", (2,), 2, "real")
    builder = NETWORKS["noprop-timed-mlp"]
    return NoPropCT(builder.build(spec, builder.Config(width=4)), spec, NoPropCTConfig(**options)).double()


class Linear(nn.Module):
    """``(t + 1/2) A z + b`` in place of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.tensor([[0.5, 0.2], [-0.1, 0.3]], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor([0.1, -0.3], dtype=torch.float64))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return (t + 0.5)[:, None] * (z @ self.A.T) + self.b


@pytest.fixture
def toy() -> Callable[..., tuple[NoPropCT, Linear, Batch]]:
    """A rule whose block is linear, with a schedule away from its start, and a profile of errors that is far from the truth."""

    def make(times: str) -> tuple[NoPropCT, Linear, Batch]:
        rule, block = rule_of(times=times, eta=0.7), Linear()
        rule.logits = lambda inputs, z, t, step: block(z, t)  # type: ignore[method-assign,assignment]
        with torch.no_grad():
            for parameter in rule.noise.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
            if rule.chosen is not None:
                rule.chosen.errors.copy_(torch.logspace(1, -1.5, BINS))
        targets = torch.tensor([[1.0, 0.5], [-0.4, 0.2]], dtype=torch.float64).repeat(N // 2, 1)
        return rule, block, Batch(torch.zeros(N, 2, dtype=torch.float64), targets)

    return make


def expected_error(block: Linear, batch: Batch, gamma: Tensor, t: Tensor) -> Tensor:
    """``E |(t + 1/2) A z + b - u|^2`` at times (K,): squared bias and the variance that the noise makes."""
    u, gain = batch.targets[:2], t + 0.5
    abar = torch.sigmoid(-gamma)
    bias = (gain * abar.sqrt())[:, None, None] * (u @ block.A.T) + block.b - u
    return bias.pow(2).sum(2).mean(1) + gain**2 * (1 - abar) * block.A.pow(2).sum()


def gradients(value: Tensor, block: Linear, rule: NoPropCT) -> list[Tensor]:
    return list(torch.autograd.grad(value, [block.A, block.b, rule.noise.raw_in, rule.noise.bias, rule.noise.raw_out]))


def quadrature(rule: NoPropCT, block: Linear, batch: Batch) -> Tensor:
    """Eq. 9's term of the block, by the midpoint rule."""
    t = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    gamma, slope = rule.noise(t)
    return 0.35 * (-slope * torch.exp(-gamma) * expected_error(block, batch, gamma, t)).mean()


def drawn(rule: NoPropCT, block: Linear, batch: Batch, rounds: int = 8) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return losses of several batches, and means and standard errors of their gradients."""
    step, values, found = new_step(rule, OptimizerConfig(), seed=1), [], []
    for step.index in range(rounds):
        loss = rule.objective(batch, step)
        values.append(loss.detach())
        found.append(gradients(loss, block, rule))
    stacked = [torch.stack(each) for each in zip(*found, strict=True)]
    return torch.stack(values), [each.mean(0) for each in stacked], [each.std(0) / math.sqrt(rounds) for each in stacked]


# --- what is learned ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", ["uniform", "importance"])
def test_loss_and_gradients_are_those_of_equation_9(times: str, toy: Callable[..., Any]) -> None:
    # Oracle: quadrature over t of the closed form, and its gradients with respect to block and schedule.
    rule, block, batch = toy(times)
    wanted = quadrature(rule, block, batch)
    values, means, errors = drawn(rule, block, batch)
    assert abs(float(values.mean() - wanted.detach())) < 0.01 * float(wanted.detach())
    for mean, error, exact in zip(means, errors, gradients(wanted, block, rule), strict=True):
        assert bool(((mean - exact).abs() < 6 * error + 1e-3 * exact.norm()).all())
        assert float((mean - exact).norm()) < (0.3 if times == "uniform" else 0.1) * float(exact.norm())


def test_with_equal_weights_the_schedule_still_learns_from_equation_9(toy: Callable[..., Any]) -> None:
    # Oracles: the schedule's gradient by quadrature of Eq. 9; the block's by quadrature of the error over the density that is drawn from.
    rule, block, batch = toy("information")
    eq9 = gradients(quadrature(rule, block, batch), block, rule)
    t = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    density = rule.chosen.masses(rule.noise).repeat_interleave(20_000 // BINS) * BINS
    loss = 0.35 * (density * expected_error(block, batch, rule.noise(t)[0].detach(), t)).mean()
    values, means, _ = drawn(rule, block, batch)
    assert abs(float(values.mean() - loss.detach())) < 0.01 * float(loss.detach())
    of_block = torch.autograd.grad(loss, [block.A, block.b])
    for mean, exact in zip(means, [*of_block, *eq9[2:]], strict=True):
        assert float((mean - exact).norm()) < 0.1 * float(exact.norm())
    ratios = torch.cat([g.flatten() for g in of_block]) / torch.cat([g.flatten() for g in eq9[:2]])
    assert float(ratios.std() / ratios.mean()) > 0.05  # and they are not in proportion


def test_losses_are_less_noisy(toy: Callable[..., Any]) -> None:
    # Oracle: the deviation of the loss of batches of 64, where the profile is the true one.
    deviations = {}
    for times in ("uniform", "importance"):
        rule, block, batch = toy(times)
        if rule.chosen is not None:
            centres = (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS
            rule.chosen.errors.copy_(expected_error(block, batch, rule.noise(centres)[0], centres).detach())
        small = Batch(batch.inputs[:64], batch.targets[:64])
        deviations[times] = float(drawn(rule, block, small, rounds=200)[0].std())
    assert deviations["importance"] < 0.5 * deviations["uniform"]


# --- which times are drawn ----------------------------------------------------------------------------------------------


@pytest.fixture
def chosen() -> tuple[InformationTimes, LearnedSchedule]:
    torch.manual_seed(0)
    made = InformationTimes().double()
    made.errors.copy_(torch.rand(BINS) + 0.05)
    return made, LearnedSchedule(-4.0, 5.0).double()


def test_bins_weigh_what_can_be_learned_in_them(chosen: tuple[InformationTimes, LearnedSchedule]) -> None:
    # Oracle: differences of exp(-gamma) at the edges, times the mean error; a tenth is uniform.
    made, schedule = chosen
    snr = torch.exp(-schedule(torch.arange(BINS + 1, dtype=torch.float64) / BINS)[0])
    information = (snr[1:] - snr[:-1]) * made.errors
    torch.testing.assert_close(made.masses(schedule), (0.9 * information / information.sum() + 0.1 / BINS).detach())
    assert EVEN == 0.1


@pytest.mark.parametrize("count", [100, 5000])
def test_times_are_drawn_with_the_density_that_is_returned(count: int, chosen: tuple[InformationTimes, LearnedSchedule]) -> None:
    # Oracles: shares of the bins; within a batch evenly spread, so that no bin is off by more than one draw; each time in its bin.
    made, schedule = chosen
    masses, generator, bins = made.masses(schedule), torch.Generator().manual_seed(0), []
    for _ in range(20_000 // count + 1):
        t, density = made.draw(count, schedule, generator)
        assert bool(((t >= 0) & (t <= 1)).all())
        bins.append((t * BINS).long().clamp_max(BINS - 1))
        torch.testing.assert_close(density, masses[bins[-1]] * BINS)
    shares = torch.cat(bins).bincount(minlength=BINS) / sum(map(len, bins))
    assert float((shares - masses).abs().max()) < 0.01
    if count == 5000:
        single = bins[0].bincount(minlength=BINS)
        assert bool(((single - 5000 * masses).abs() <= 1 + 1e-6).all())


def test_every_example_of_a_batch_may_get_any_time(chosen: tuple[InformationTimes, LearnedSchedule]) -> None:
    # Oracle: over draws, the first example's times have the mean of the density, whose bins are uniform inside.
    made, schedule = chosen
    generator = torch.Generator().manual_seed(0)
    first = torch.stack([made.draw(64, schedule, generator)[0][0] for _ in range(4000)])
    centres = (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS
    assert abs(float(first.mean() - (made.masses(schedule) * centres).sum())) < 4 * float(first.std()) / math.sqrt(4000)


def test_errors_are_remembered_and_forgotten(chosen: tuple[InformationTimes, LearnedSchedule]) -> None:
    # Oracle: the exponential sum written out, one example after the other; their order within a batch does not count much.
    made = InformationTimes().double()
    assert torch.equal(made.profile, torch.ones(BINS, dtype=torch.float64))
    made.note(torch.tensor([0.0, 0.5 / BINS, 1.0]), torch.tensor([0.2, 0.4, 0.5]))
    torch.testing.assert_close(made.profile[0].item(), (MEMORY**2 + 0.6) / (MEMORY**2 + 2))
    torch.testing.assert_close(made.profile[-1].item(), (MEMORY + 0.5) / (MEMORY + 1))
    assert torch.equal(made.profile[1:-1], torch.ones(BINS - 2, dtype=torch.float64))
    for _ in range(100):
        made.note(torch.full((100,), 0.3), torch.full((100,), 0.01))
    torch.testing.assert_close(made.profile[int(0.3 * BINS)].item(), 0.01, rtol=1e-3, atol=0)


# --- in a run -----------------------------------------------------------------------------------------------------------


def test_only_training_notes_errors(toy: Callable[..., Any]) -> None:
    # Oracle: the objective, which diagnostics ask for, changes no buffer; a step changes them.
    rule, _, batch = toy("information")
    small, step = Batch(batch.inputs[:64], batch.targets[:64]), new_step(rule)
    before = rule.chosen.errors.clone()
    rule.objective(small, step)
    assert torch.equal(rule.chosen.errors, before)
    rule.credit(small, step)
    assert not torch.equal(rule.chosen.errors, before)


def test_the_profile_is_saved(toy: Callable[..., Any]) -> None:
    rule, _, batch = toy("information")
    rule.credit(Batch(batch.inputs[:64], batch.targets[:64]), new_step(rule))
    again = rule_of(times="information")
    again.load_state_dict(rule.state_dict())
    assert torch.equal(again.chosen.profile, rule.chosen.profile)
    assert rule_of(times="uniform").chosen is None
