"""Systems, integrators, network and task. Oracles: autograd, SciPy's integrators, orders of convergence, conserved quantities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from bpfree_sampled import integrators, layers, scores
from bpfree_sampled.network import HNNConfig, hnn
from bpfree_sampled.systems import SYSTEMS, turned
from bpfree_sampled.task import HAMILTONIAN, HamiltonianConfig, HamiltonianSpec, drawn, flow, observed
from sampled_kit import system
from scipy.integrate import solve_ivp
from torch import Tensor

from bpfree import Batch, OptimizerConfig, Stepper, TaskSpec, UsageError, installed_plugins, mlp
from bpfree.certify import task_checks

NAMES = tuple(SYSTEMS)


def states(name: str, count: int = 20, seed: int = 0) -> Tensor:
    return drawn(SYSTEMS[name].start, count, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_autograds(name: str) -> None:
    x = drawn(SYSTEMS[name].box, 50, torch.Generator().manual_seed(1)).requires_grad_()
    (expected,) = torch.autograd.grad(SYSTEMS[name].energy(x).sum(), x)
    torch.testing.assert_close(SYSTEMS[name].gradient(x.detach()), expected, rtol=1e-12, atol=1e-12)


def test_energies_are_the_published_ones() -> None:
    """By hand, in one state each; of Lotka-Volterra with (alpha, beta, gamma, delta) = (-2, -1, -1, -1)."""
    x = torch.tensor([[0.3, -0.7]], dtype=torch.float64)
    expected = {
        "pendulum": 0.245 + 1 - math.cos(0.3),
        "spring": (0.09 + 0.49) / 2,
        "lotka-volterra": -math.exp(-0.7) - 0.7 - math.exp(0.3) + 0.6,
    }
    for name, value in expected.items():
        assert float(SYSTEMS[name].energy(x)) == pytest.approx(value, rel=1e-14)
    y = torch.tensor([[0.3, -0.2, 0.5, -0.7]], dtype=torch.float64)
    kinetic = (0.25 + 0.98 + 0.7 * math.cos(0.5)) / (2 * (1 + math.sin(0.5) ** 2))
    assert float(SYSTEMS["double-pendulum"].energy(y)) == pytest.approx(kinetic - 2 * math.cos(0.3) - math.cos(0.2), rel=1e-14)
    assert float(SYSTEMS["henon-heiles"].energy(y)) == pytest.approx((0.09 + 0.04 + 0.25 + 0.49) / 2 - 0.018 + 0.008 / 3, rel=1e-14)


def scipys(name: str, begin: Tensor, time: float) -> Tensor:
    """Where trajectories are after a time, by SciPy's DOP853."""
    field = SYSTEMS[name].field

    def right(t: float, y: Any) -> Any:
        return field(torch.from_numpy(y)[None])[0].numpy()

    ends = [solve_ivp(right, (0, time), each.numpy(), method="DOP853", rtol=1e-12, atol=1e-13).y[:, -1] for each in begin]
    return torch.stack([torch.from_numpy(end) for end in ends])


@pytest.mark.parametrize("name", NAMES)
def test_integrators_come_to_where_scipy_does(name: str) -> None:
    """The error falls with the step to the power of the integrator's order."""
    begin, chosen = states(name, 3), SYSTEMS[name]
    expected = scipys(name, begin, 1.0)
    assert (flow(chosen, begin, 1.0) - expected).abs().max() < 1e-7
    orders = {integrators.implicit_midpoint: 2, integrators.integrator_of(chosen): 2} | ({integrators.euler: 1} if chosen.separable else {})
    for advance, order in orders.items():
        errors = [(integrators.rollout(chosen.field, begin, 1 / n, n, advance)[-1] - expected).norm() for n in (20, 40)]
        assert errors[0] < 0.05
        assert float(torch.log2(errors[0] / errors[1])) == pytest.approx(order, abs=0.25)


def test_symplectic_integrators_are() -> None:
    """Their Jacobian J keeps the symplectic form: J^T Omega J = Omega; that of Runge-Kutta's flow does so only in the limit."""
    name = "henon-heiles"
    field, x = SYSTEMS[name].field, states(name, 1)[0]
    omega = torch.zeros(4, 4, dtype=torch.float64)
    omega[:2, 2:], omega[2:, :2] = torch.eye(2), -torch.eye(2)

    def broken(advance: Any) -> float:
        jacobian = torch.autograd.functional.jacobian(lambda y: advance(field, y[None], 0.5)[0], x)
        return float((jacobian.T @ omega @ jacobian - omega).abs().max())

    assert max(broken(integrators.euler), broken(integrators.leapfrog), broken(integrators.implicit_midpoint)) < 1e-10
    assert broken(lambda f, y, h: y + h * f(y)) > 1e-2


def test_several_trajectories_are_followed_as_if_alone() -> None:
    """The official semi-implicit Euler joins q and p along the axis of trajectories, which is wrong for more than one."""
    begin, field = states("henon-heiles", 3), SYSTEMS["henon-heiles"].field
    for advance in (integrators.euler, integrators.leapfrog, integrators.implicit_midpoint):
        together = integrators.rollout(field, begin, 0.1, 5, advance)
        alone = torch.cat([integrators.rollout(field, begin[place : place + 1], 0.1, 5, advance) for place in range(3)], 1)
        torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)


def test_escaping_trajectories_have_numbers() -> None:
    found = integrators.rollout(lambda x: x * x.abs().exp(), torch.ones(1, 2), 1.0, 5, integrators.leapfrog, bound=10.0)
    assert bool(found.isfinite().all())
    assert float(found.abs().max()) == 10


# --- the network ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("widths", [[7], [7, 5, 6]])
def test_the_field_is_that_of_the_energy(widths: list[int], activation: Any) -> None:
    """By autograd of the network's own energy, and by finite differences."""
    spec = system("henon-heiles").spec
    network = hnn(spec, HNNConfig(widths=widths, activation=activation))
    x = drawn(spec.box, 9, torch.Generator().manual_seed(2)).requires_grad_()  # type: ignore[attr-defined]
    made = network(x)
    (gradient,) = torch.autograd.grad(made[:, 0].sum(), x, retain_graph=True)
    torch.testing.assert_close(made[:, 1:], turned(gradient), rtol=1e-10, atol=1e-12)
    moved = 1e-6 * torch.eye(4, dtype=torch.float64)
    x = x.detach()
    differences = torch.stack([(network(x + each)[:, 0] - network(x - each)[:, 0]) / 2e-6 for each in moved], 1)
    torch.testing.assert_close(made[:, 1:], turned(differences), rtol=1e-5, atol=1e-7)


def test_duals_of_a_layer_are_its_values_and_slopes() -> None:
    x, weight, bias = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    made = layers.first_duals(x, weight, bias, "tanh")
    torch.testing.assert_close(made[:, 0], layers.image(x, weight, bias, "tanh"))
    torch.testing.assert_close(made[:, 1:], (1 - made[:, :1].square()) * weight.T)


@pytest.mark.parametrize("rule", ["backprop", "dfa"])
def test_any_rule_trains_the_network(rule: str) -> None:
    """The loss is of derivatives by the inputs, which are ordinary outputs here: 60 steps halve it."""
    task = system("spring")
    torch.manual_seed(0)
    made = installed_plugins().get("rules", rule)(hnn(task.spec, HNNConfig(width=20)), task.spec)
    inputs, targets = task.train.batch(torch.arange(100))
    assert targets is not None
    batch, stepper = Batch(inputs, targets), Stepper(made, OptimizerConfig("adam", lr=0.02))
    before = task.spec.loss(made.network(inputs), batch).detach()
    for _ in range(60):
        stepper.take(batch)
    assert task.spec.loss(made.network(inputs), batch).detach() < before / 2


def test_a_network_without_an_energy_is_refused() -> None:
    spec = TaskSpec("other", (3,), 4)
    with pytest.raises(UsageError, match="energy and field"):
        hnn(spec)


# --- the task ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", task_checks(HAMILTONIAN, HamiltonianConfig(examples=40, test_examples=20, rollout=3)), ids=str)
def test_task(check: Any) -> None:
    check()


@pytest.mark.parametrize("name", NAMES)
def test_states_are_in_the_box_and_targets_are_exact(name: str) -> None:
    task = system(name, validation_examples=10)
    spec, train = task.spec, task.train
    assert isinstance(spec, HamiltonianSpec)
    assert train.targets is not None
    low, high = torch.tensor(spec.box, dtype=torch.float64).view(-1, 2).unbind(1)
    assert bool(((low <= train.inputs) & (train.inputs <= high)).all())  # type: ignore[attr-defined]
    torch.testing.assert_close(train.targets[:, 0], SYSTEMS[name].energy(train.inputs))  # type: ignore[attr-defined]
    assert train.targets.dtype == torch.float64
    assert task.validation is not None
    assert not torch.equal(task.validation.batch(torch.arange(5))[0], task.test.batch(torch.arange(5))[0])


def test_differences_become_derivatives() -> None:
    """Of the midpoint with the square of the step; at (q of the second, p of the first) in proportion to it."""
    chosen, x = SYSTEMS["pendulum"], states("pendulum")
    for observe, order in (("midpoints", 2), ("euler", 1)):
        errors = []
        for step in (0.1, 0.05):
            split = observed(chosen, x, observe, step)  # type: ignore[arg-type]
            assert split.targets is not None
            errors.append(float((split.targets[:, 1:] - chosen.field(split.inputs)).norm()))
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def test_the_energy_of_euler_steps_is_corrected() -> None:
    """The energy whose field is that of the differences is H - h/2 H_q H_p up to the second order: corrected, it is H."""
    chosen, h = SYSTEMS["pendulum"], 0.01
    x = states("pendulum", 200)
    spec = system(observe="euler", step=h).spec
    assert isinstance(spec, HamiltonianSpec)

    def modified(y: Tensor) -> Tensor:
        by_q, by_p = chosen.gradient(y).unbind(1)
        return chosen.energy(y) - h / 2 * by_q * by_p

    y = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(modified(y).sum(), y)
    split = observed(chosen, x, "euler", h)
    assert split.targets is not None
    y = split.inputs.clone().requires_grad_()
    (there,) = torch.autograd.grad(modified(y).sum(), y)
    assert (turned(there) - split.targets[:, 1:]).abs().max() < 1e-4 < (chosen.field(split.inputs) - split.targets[:, 1:]).abs().max()
    outputs = torch.cat([modified(x)[:, None], turned(gradient)], 1)
    assert (spec.corrected(outputs) - chosen.energy(x)).abs().max() < 1e-4 < (modified(x) - chosen.energy(x)).abs().max()


def test_boxes_and_constants_are_checked() -> None:
    with pytest.raises(UsageError, match="4 numbers, or 2"):
        system(box=[1.0, 2.0, 3.0])
    with pytest.raises(UsageError, match="taken as they are"):
        HamiltonianSpec("x", (2,), 3, "real", mean=(1.0,), output_shape=(3,), box=(-1, 1, -1, 1))
    assert system("henon-heiles", box=[-2, 2]).spec.box == (-2.0, 2.0) * 4  # type: ignore[attr-defined]


def test_metrics_of_known_outputs() -> None:
    """An energy that is too large by a constant is right; a field that is too large by a tenth has an error of a tenth."""
    task = system("pendulum", rollout=20)
    spec = task.spec
    inputs, targets = task.test.batch(torch.arange(50))
    assert targets is not None

    def predict(x: Tensor) -> Tensor:
        return torch.cat([SYSTEMS["pendulum"].energy(x)[:, None] + 7, 1.1 * SYSTEMS["pendulum"].field(x)], 1)

    found = {}
    for metric in spec.metrics():
        assert metric.begin is not None
        accumulator = metric.begin(spec, predict)
        for part in torch.arange(50).split(20):
            accumulator.add(predict(inputs[part]), Batch(inputs[part], targets[part]))
        found[metric.name] = accumulator.value()
    assert found["energy_error"] < 1e-14
    assert found["field_error"] == pytest.approx(0.1, rel=1e-10)
    learned, true = scores.trajectories(spec, predict, inputs)
    # with a field that is larger by a tenth, time runs faster by a tenth
    faster = integrators.rollout(SYSTEMS["pendulum"].field, true[0], 0.055, 20)
    torch.testing.assert_close(learned, faster, rtol=1e-9, atol=1e-11)
    assert found["rollout_error"] == pytest.approx(float((faster - true)[1:].norm() / true[1:].norm()), rel=1e-6)
    assert 0 < found["energy_drift"] < 1e-3


def test_other_networks_may_learn_the_field_alone() -> None:
    spec = system("spring").spec
    assert mlp(spec)(torch.zeros(2, 2)).shape == (2, 3)
