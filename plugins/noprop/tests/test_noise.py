"""The learned schedule, and the ways from noise to label. Oracles: finite differences, closed forms for constant and Gaussian estimates."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from bpfree_noprop.noise import Estimate, LearnedSchedule, denoise, noised
from torch import Tensor

from bpfree.errors import UsageError

U = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)


@pytest.fixture
def schedule() -> Iterator[LearnedSchedule]:
    """Away from its start, in double precision."""
    torch.manual_seed(0)
    made = LearnedSchedule(-3.0, 4.0).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return made


def ends(schedule: LearnedSchedule) -> tuple[Tensor, Tensor]:
    """abar(0) and abar(1)."""
    gamma, _ = schedule(torch.tensor([0.0, 1.0], dtype=torch.float64))
    first, last = torch.sigmoid(-gamma).detach().unbind()
    return first, last


def constant(z: Tensor, index: int) -> Tensor:
    return U.expand_as(z)


# --- the schedule ---------------------------------------------------------------------------------------------------


def test_it_starts_where_it_is_told() -> None:
    made = LearnedSchedule(-5.0, 5.0)
    torch.testing.assert_close(made(torch.tensor([0.0, 0.5, 1.0]))[0], torch.tensor([5.0, 0.0, -5.0]), atol=1e-4, rtol=0)


def test_gamma_falls_whatever_is_learned() -> None:
    # Oracle: positive weights; the parameters are anything.
    for seed in range(20):
        torch.manual_seed(seed)
        made = LearnedSchedule(-1.0, 1.0).double()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.copy_(3 * torch.randn_like(parameter))
        gamma, slope = made(torch.linspace(0, 1, 101, dtype=torch.float64))
        assert bool((gamma.diff() < 0).all())
        assert bool((slope < 0).all())
        first, last = ends(made)
        torch.testing.assert_close(first, torch.sigmoid(-(made.gamma_0 + torch.nn.functional.softplus(made.raw_distance))).detach())
        torch.testing.assert_close(last, torch.sigmoid(-made.gamma_0).detach())


def test_the_slope_is_the_derivative(schedule: LearnedSchedule) -> None:
    # Oracle: central differences; of the slope's gradient with respect to the parameters: gradcheck.
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    _, slope = schedule(t)
    with torch.no_grad():
        wanted = (schedule(t + 1e-5)[0] - schedule(t - 1e-5)[0]) / 2e-5
    torch.testing.assert_close(slope.detach(), wanted, rtol=1e-7, atol=1e-8)

    parameters = dict(schedule.named_parameters())

    def of_parameters(*values: Tensor) -> Tensor:
        with torch.no_grad():
            for parameter, value in zip(parameters.values(), values, strict=True):
                parameter.copy_(value)
        return schedule(t)[1].sum()

    origin = [p.detach().clone() for p in parameters.values()]
    loss = of_parameters(*origin)
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for index, gradient in enumerate(found):
        bump = torch.zeros_like(origin[index])
        bump.view(-1)[0] = 1e-6
        moved = [value + bump if k == index else value for k, value in enumerate(origin)]
        back = [value - bump if k == index else value for k, value in enumerate(origin)]
        wanted = (of_parameters(*moved) - of_parameters(*back)) / 2e-6
        torch.testing.assert_close(torch.zeros_like(wanted) if gradient is None else gradient.view(-1)[0], wanted, rtol=1e-5, atol=1e-8)


def test_ends_are_those_of_the_whole(schedule: LearnedSchedule) -> None:
    # Oracle: gamma at 0 and 1, and its gradients, through the network.
    gamma, _ = schedule(torch.tensor([0.0, 1.0], dtype=torch.float64))
    parameters = list(schedule.parameters())
    for through, direct in zip(gamma, schedule.at_ends(), strict=True):
        torch.testing.assert_close(direct, through)
        wanted, found = (torch.autograd.grad(x, parameters, retain_graph=True, allow_unused=True) for x in (through, direct))
        for a, b in zip(wanted, found, strict=True):
            torch.testing.assert_close(torch.zeros_like(a) if b is None else b, a)


def test_autocast_rounds_nothing(device: torch.device) -> None:
    # Oracle: bit by bit what there is without it.
    made, t = LearnedSchedule(-3.0, 5.0).to(device), torch.rand(50, device=device)
    plain = made(t)
    with torch.autocast(device.type, torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(made(t), plain, strict=True))


def test_noise_that_does_not_fall_is_refused() -> None:
    for gamma_1 in (-3.0, -4.0):
        with pytest.raises(UsageError, match=r"gamma_1 above gamma_0"):
            LearnedSchedule(-3.0, gamma_1)


@pytest.mark.parametrize("gamma", [-200.0, -20.0, 0.0, 20.0, 200.0])
def test_noised_labels_at_any_level(gamma: float) -> None:
    # Oracle: Eq. 6 in double precision, where sigmoid(20) is not 1; gradients are finite even where a share is 0.
    level, u = torch.tensor(gamma, requires_grad=True), U.float()
    z = noised(u, level, torch.Generator().manual_seed(0))
    exact = torch.tensor(gamma, dtype=torch.float64)
    eps = torch.randn(3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(z, (torch.sigmoid(-exact).sqrt() * u + torch.sigmoid(exact).sqrt() * eps).float())
    z.sum().backward()
    assert level.grad is not None
    assert bool(torch.isfinite(level.grad))


# --- deterministic inference ----------------------------------------------------------------------------------------


def run(
    schedule: LearnedSchedule, z: Tensor, estimate: Estimate, steps: int, stepper: str, generator: torch.Generator | None = None
) -> Tensor:
    with torch.no_grad():
        return denoise(z, schedule, estimate, steps=steps, stepper=stepper, generator=generator)


def flow_end(schedule: LearnedSchedule, z: Tensor) -> Tensor:
    """Closed form for a constant estimate: ``(z - sqrt(abar) u) / sqrt(1 - abar)`` does not change."""
    first, last = ends(schedule)
    return last.sqrt() * U + ((1 - last) / (1 - first)).sqrt() * (z - first.sqrt() * U)


def test_exact_steps_are_exact_for_a_constant_estimate(schedule: LearnedSchedule) -> None:
    z = torch.randn(4, 3, dtype=torch.float64)
    for steps in (1, 7):
        torch.testing.assert_close(run(schedule, z, constant, steps, "exact"), flow_end(schedule, z))


@pytest.mark.parametrize(("gamma_0", "gamma_1"), [(-60.0, -50.0), (50.0, 60.0), (-60.0, 60.0)])
def test_exact_steps_where_abar_is_0_or_1(gamma_0: float, gamma_1: float) -> None:
    # Oracle: the closed form in logarithms: |z - u| falls, and z grows, by exp of half the change of gamma; many steps are one.
    made, z = LearnedSchedule(gamma_0, gamma_1).double(), torch.randn(4, 3, dtype=torch.float64)
    first, last = gamma_1, gamma_0
    signals = [torch.sigmoid(torch.tensor(-g, dtype=torch.float64)).sqrt() for g in (first, last)]
    noises = [torch.sigmoid(torch.tensor(g, dtype=torch.float64)).sqrt() for g in (first, last)]
    wanted = signals[1] * U + noises[1] / noises[0] * (z - signals[0] * U)
    for steps in (1, 7):
        torch.testing.assert_close(run(made, z, constant, steps, "exact"), wanted, rtol=1e-6, atol=1e-12)
        noisy = run(made, z, constant, steps, "exact", torch.Generator().manual_seed(0))
        assert bool(torch.isfinite(noisy).all())
        if gamma_1 == -50:  # next to no noise: Eq. 3 keeps exp(-10) of the distance
            torch.testing.assert_close(noisy, U + math.exp(-10) * (z - U), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("stepper", ["exact", "euler", "heun"])
def test_a_schedule_with_flat_stretches(stepper: str) -> None:
    # Oracle: states stay real: where gamma stands still, rounding must not make it rise, nor the noise imaginary.
    made = LearnedSchedule(-3.0, 5.0)
    with torch.no_grad():
        made.raw_in.fill_(300.0)
        made.bias.fill_(-150.0)
        made.raw_out.copy_(torch.rand(64))
    end = run(made, torch.randn(4, 3), lambda z, index: U.float().expand_as(z), 1000, stepper, torch.Generator().manual_seed(0))
    assert end.dtype is torch.float32
    assert stepper != "exact" or bool((end - U).abs().max() < 1)


def gaussian(schedule: LearnedSchedule, variance: float, steps: int) -> Estimate:
    """The best estimate of labels N(0, variance): E[u | z_t]."""
    abar = torch.sigmoid(-schedule(torch.linspace(0, 1, steps + 1, dtype=torch.float64))[0]).detach()
    gain = abar.sqrt() * variance / (abar * variance + 1 - abar)

    def estimate(z: Tensor, index: int) -> Tensor:
        return gain[index] * z

    return estimate


@pytest.mark.parametrize(("stepper", "order"), [("euler", 1), ("heun", 2), ("exact", 1)])
def test_steppers_converge_with_their_order(stepper: str, order: int, schedule: LearnedSchedule) -> None:
    # Oracle: along the flow z(t) keeps its quantile, so it scales with sqrt(abar s^2 + 1 - abar). Halved steps: errors fall by 2^order.
    first, last = ends(schedule)
    z, s2 = torch.ones(1, 1, dtype=torch.float64), 2.5
    wanted = ((last * s2 + 1 - last) / (first * s2 + 1 - first)).sqrt()
    errors = [float((run(schedule, z, gaussian(schedule, s2, steps), steps, stepper) - wanted).abs()) for steps in (400, 800)]
    assert errors[0] < 0.02
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)


# --- with noise -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stepper", ["exact", "euler", "heun"])
def test_the_diffusion_ends_in_the_posterior(stepper: str, schedule: LearnedSchedule) -> None:
    # Oracle: Eq. 6 at t = 1 for a constant estimate, from a start that is distributed as Eq. 6 says at t = 0.
    first, last = ends(schedule)
    generator = torch.Generator().manual_seed(1)
    z = first.sqrt() * U + (1 - first).sqrt() * torch.randn(20000, 3, generator=generator, dtype=torch.float64)
    end = run(schedule, z, constant, 200, stepper, generator)
    torch.testing.assert_close(end.mean(0), last.sqrt() * U, atol=0.02, rtol=0.01)
    torch.testing.assert_close(end.var(0), (1 - last).expand(3), atol=0.0, rtol=0.08 if stepper == "euler" else 0.05)


@pytest.mark.parametrize("stepper", ["exact", "euler", "heun"])
def test_the_diffusion_of_gaussian_labels(stepper: str, schedule: LearnedSchedule) -> None:
    # Oracle: the marginal variance abar s^2 + 1 - abar, whatever the path; here the estimate depends on state and time.
    first, last = ends(schedule)
    generator = torch.Generator().manual_seed(2)
    s2 = 4.0
    z = (first * s2 + 1 - first).sqrt() * torch.randn(20000, 1, generator=generator, dtype=torch.float64)
    end = run(schedule, z, gaussian(schedule, s2, 200), 200, stepper, generator)
    torch.testing.assert_close(end.var(0), (last * s2 + 1 - last).expand(1), atol=0.0, rtol=0.05)


def test_one_exact_step_with_noise_is_equation_3(schedule: LearnedSchedule) -> None:
    # Oracle: the coefficients of Eq. 3 from the ends' abar, with the same draw.
    first, last = ends(schedule)
    alpha = first / last
    z = torch.randn(5, 3, dtype=torch.float64)
    eps = torch.randn(5, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    a, b = last.sqrt() * (1 - alpha) / (1 - first), alpha.sqrt() * (1 - last) / (1 - first)
    wanted = a * U + b * z + ((1 - last) * (1 - alpha) / (1 - first)).sqrt() * eps
    torch.testing.assert_close(run(schedule, z, constant, 1, "exact", torch.Generator().manual_seed(3)), wanted)
