"""Where feedback weights come from. Oracles: contraction by a known factor, Stein's identity, moments of distributions, signs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bpfree_feedback.kolen_pollack import KolenPollack
from bpfree_feedback.signs import SignSymmetry, SignSymmetryConfig, deviation
from bpfree_feedback.weight_mirror import UNITS, WeightMirror, WeightMirrorConfig, correlation
from feedback_kit import IMAGES, VECTORS, batch_for, convolutional, dense
from torch import Tensor, nn

from bpfree import Batch, OptimizerConfig, Stepper
from bpfree.network.initialisation import INITIALISATIONS
from bpfree.training.updater import ClipConfig

SGD = OptimizerConfig("sgd", lr=0.1, momentum=0.0, weight_decay=0.2)


# --- sign-symmetry ----------------------------------------------------------------------------------------------------


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("magnitude", ["uniform", "fresh", "fixed"])
def test_only_signs_are_seen(magnitude: str) -> None:
    rule = SignSymmetry(dense(), VECTORS, SignSymmetryConfig(magnitude=magnitude))
    before = rule.backward_weights(generator)
    weight = rule.network.get_parameter(rule.layers["b2.0"])
    with torch.no_grad():
        weight.mul_(3 * torch.rand_like(weight) + 0.1)
    assert all(torch.equal(value, before[name]) for name, value in rule.backward_weights(generator).items())
    with torch.no_grad():
        weight.neg_()
    after = rule.backward_weights(generator)
    assert torch.equal(after["b2.0"], -before["b2.0"])
    assert torch.equal(after["readout"], before["readout"])
    assert all(torch.equal(value.sign(), rule.network.get_parameter(rule.layers[name]).sign()) for name, value in after.items())


@pytest.mark.parametrize("magnitude", ["uniform", "fresh", "fixed"])
def test_a_step_has_the_same_sizes_in_all_its_parts(magnitude: str) -> None:
    """Oracle: the step from the whole batch."""
    moved = []
    for parts in (1, 3):
        torch.manual_seed(0)
        rule = SignSymmetry(dense(), VECTORS, SignSymmetryConfig(magnitude=magnitude)).double()
        batch = batch_for(rule.network, 9)
        Stepper(rule, SGD).take(Batch(batch.inputs.double(), batch.targets), parts=parts)
        moved.append(torch.cat([parameter.detach().flatten() for parameter in rule.parameters()]))
    torch.testing.assert_close(moved[1], moved[0], rtol=0, atol=1e-12)


def test_sizes_are_one_or_new_or_kept() -> None:
    made = {name: SignSymmetry(dense(), VECTORS, SignSymmetryConfig(magnitude=name)) for name in ("uniform", "fresh", "fixed")}
    stepper = Stepper(made["fresh"])
    seen = {
        name: [rule.backward_weights(lambda: stepper.step.generator_for("feedback"))["readout"].abs() for stepper.step.index in (0, 0, 1)]
        for name, rule in made.items()
    }
    assert len(seen["uniform"][0].unique()) == 1
    assert float(seen["uniform"][0][0, 0]) == pytest.approx((2 / 12) ** 0.5)
    assert all(torch.equal(value, seen["fixed"][0]) for value in seen["fixed"])
    first, again, later = seen["fresh"]
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert not list(made["uniform"].feedback.buffers())


@pytest.mark.parametrize("init", ["torch", *INITIALISATIONS])
def test_all_sizes_have_the_second_moment_of_the_initialisation(init: str) -> None:
    weight = torch.empty(240, 60, 3, 3)
    if init == "torch":
        nn.init.kaiming_uniform_(weight, a=5**0.5)
    else:
        INITIALISATIONS[init](weight)
    assert deviation(weight, init) == pytest.approx(float(weight.std()), rel=0.02)  # type: ignore[arg-type]


@pytest.mark.parametrize(("init", "kurtosis"), [("xavier-uniform", 1.8), ("xavier-normal", 3.0)])
def test_new_sizes_are_of_the_distribution_that_is_named(init: str, kurtosis: float) -> None:
    """Oracle: fourth over squared second moment, 9/5 of a uniform and 3 of a normal distribution."""
    network = nn.Sequential(nn.Linear(6, 400), nn.Tanh(), nn.Linear(400, 300), nn.Tanh(), nn.Linear(300, 5))
    rule = SignSymmetry(network, VECTORS, SignSymmetryConfig(magnitude="fresh", init=init))  # type: ignore[arg-type]
    name = next(iter(rule.layers))
    sizes = rule.backward_weights(generator)[name].double()
    assert float(sizes.square().mean()) == pytest.approx(2 / 700, rel=0.02)
    assert float((sizes**4).mean() / sizes.square().mean() ** 2) == pytest.approx(kurtosis, rel=0.03)


# --- Kolen-Pollack ----------------------------------------------------------------------------------------------------


def shrinkage(optimizer: OptimizerConfig, steps: int = 5, clip: ClipConfig | None = None) -> list[float]:
    """Return the factor by which the readout's weights and feedback approach each other, step by step."""
    rule = KolenPollack(dense(), VECTORS)
    stepper = Stepper(rule, optimizer, clip=clip)
    factors = []
    weight, feedback = rule.feedback_pairs()["b2.2"]
    start = weight.detach().clone()
    for index in range(steps):
        before = (weight - feedback).detach().clone()
        stepper.take(batch_for(rule.network, seed=index))
        after = (weight - feedback).detach()
        factors.append(float(after.norm() / before.norm()))
        assert torch.allclose(after / after.norm(), before / before.norm()) or optimizer.momentum
    assert not torch.allclose(weight, start, atol=1e-3)
    return factors


def test_weights_and_feedback_meet_by_the_factor_of_decay() -> None:
    assert shrinkage(SGD) == pytest.approx([1 - 0.1 * 0.2] * 5, rel=1e-9)


def test_so_they_do_where_decay_is_apart_from_the_gradient() -> None:
    assert shrinkage(OptimizerConfig("adamw", lr=0.01, weight_decay=2.0)) == pytest.approx([1 - 0.01 * 2] * 5, rel=1e-6)


def test_with_momentum_the_decay_is_remembered() -> None:
    """Oracle: the recurrence v <- 0.9 v + 0.1 d, d <- d - 0.1 v of their difference d, by hand."""
    factors = shrinkage(OptimizerConfig("sgd", lr=0.1, momentum=0.9, weight_decay=0.1))
    difference, velocity, expected = 1.0, 0.0, []
    for _ in range(5):
        velocity = 0.9 * velocity + 0.1 * difference
        expected.append((difference - 0.1 * velocity) / difference)
        difference -= 0.1 * velocity
    assert factors == pytest.approx(expected, rel=1e-9)
    assert expected[:4] == pytest.approx([0.99, 0.981, 0.972, 0.964], abs=2e-3)


@pytest.mark.parametrize("scope", ["group", "global"])
def test_clipping_keeps_the_factor(scope: str) -> None:
    """Both are clipped by one factor, because they are in one group."""
    assert shrinkage(SGD, clip=ClipConfig(norm=1e-2, scope=scope)) == pytest.approx([0.98] * 5, rel=1e-9)  # type: ignore[arg-type]


def test_feedback_is_in_the_group_of_its_block() -> None:
    rule = KolenPollack(dense(), VECTORS)
    groups = rule.groups()
    assert list(groups) == ["b1", "b2", "readout"]
    assert [len(members) for members in groups.values()] == [2, 6, 3]
    assert sum(map(len, groups.values())) == len(list(rule.parameters()))
    assert rule.group_options() == {}


def test_accumulated_gradients_are_copied_whole() -> None:
    """Oracle: the step from the whole batch."""
    found = []
    for parts in (1, 3):
        rule = KolenPollack(dense(), VECTORS)
        Stepper(rule, SGD).take(batch_for(rule.network, 9), parts=parts)
        found.append([value.detach() for pair in rule.feedback_pairs().values() for value in pair])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_in_the_twin_hidden_feedback_stays() -> None:
    rule = KolenPollack(dense(), VECTORS)
    rule.freeze_features()
    before = {name: rule.feedback[name].detach().clone() for name in rule.layers}
    Stepper(rule, SGD).take(batch_for(rule.network))
    assert [name for name in rule.layers if not torch.equal(before[name], rule.feedback[name])] == ["readout"]


# --- weight mirrors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [50, 800])
def test_a_correlation_errs_by_the_root_of_inputs_over_draws(draws: int) -> None:
    """Oracle: the variance of y_i x_j is |W_i|^2 + W_ij^2, so the relative error is sqrt((inputs + 1) / draws)."""
    torch.manual_seed(0)
    layer = nn.Linear(40, 200, bias=False)
    noise, weight = torch.Generator().manual_seed(1), layer.weight.detach()
    errors = [(correlation(layer, draws, noise).detach() - weight).norm() / weight.norm() for _ in range(20)]
    assert float(torch.stack(errors).square().mean()) == pytest.approx(41 / draws, rel=0.08)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: nn.Linear(12, 8),
    "strided": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "grouped, reflected": lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2, padding_mode="reflect"),
    "dilated, same": lambda: nn.Conv2d(3, 4, (3, 2), padding="same", dilation=2),
    "circular, one axis": lambda: nn.Conv1d(4, 5, 3, padding=2, stride=3, padding_mode="circular"),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("units", "slope"), [("linear", 1.0), ("relu", 0.5)])
def test_responses_to_noise_say_what_the_weights_are(kind: str, units: str, slope: float) -> None:
    """Oracle: Stein's identity, E[f(W x) x^T] = E[f'] W: slope 1 of linear units, 1/2 of rectified ones without bias."""
    torch.manual_seed(0)
    layer: nn.Module = LAYERS[kind]()
    if layer.bias is not None and units == "relu":
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    weight: Tensor = layer.weight.detach()  # type: ignore[assignment,operator]
    found = correlation(layer, 60_000, torch.Generator().manual_seed(1), noise=0.7, units=UNITS[units]).detach()
    assert found.shape == weight.shape
    cosine = float((found * weight).sum() / found.norm() / weight.norm())
    assert cosine > 0.995
    assert float(found.norm() / weight.norm()) == pytest.approx(slope, rel=0.03)


@pytest.mark.parametrize(("decay", "ratio"), [(1.0, 1.0), (0.5, 2.0)])
def test_a_mirror_tends_to_the_weights_over_the_decay(decay: float, ratio: float) -> None:
    """For fixed weights. The direction alone would not tell a decay that matches the growth from one that does not."""
    rule = WeightMirror(convolutional(), IMAGES, WeightMirrorConfig(mirror_decay=decay, mirror_rate=0.05))
    noise = torch.Generator().manual_seed(0)
    for _ in range(150):
        rule.mirror(400, lambda name: noise)
    for name, (weight, feedback) in rule.feedback_pairs().items():
        cosine = float((weight * feedback).sum() / weight.norm() / feedback.norm())
        assert cosine > 0.98, name
        assert float(feedback.norm() / weight.norm()) == pytest.approx(ratio, rel=0.1), name


def test_without_decay_a_mirror_grows() -> None:
    """Oracle: what is drawn, and the sum of the correlations: 30 steps at rate 0.1 add three times the weights."""
    rule = WeightMirror(dense(), VECTORS, WeightMirrorConfig(mirror_decay=0.0))
    before = {name: rule.feedback[name].clone() for name in rule.layers}
    noise = torch.Generator().manual_seed(0)
    for _ in range(30):
        rule.mirror(5000, lambda name: noise)
    for name, (weight, feedback) in rule.feedback_pairs().items():
        torch.testing.assert_close(feedback, before[name] + 3 * weight.detach(), rtol=0, atol=0.08)


def test_the_mirror_runs_before_training_and_once_in_each_step() -> None:
    rule = WeightMirror(dense(), VECTORS, WeightMirrorConfig(mirror_first=3))
    counts: list[int] = []
    mirror = rule.mirror
    rule.mirror = lambda draws, noise: (counts.append(draws), mirror(draws, noise))[1]  # type: ignore[method-assign]
    rule.prepare(batch_for(rule.network), torch.Generator())  # type: ignore[arg-type]
    stepper = Stepper(rule, SGD)
    stepper.take(batch_for(rule.network, 8))
    stepper.take(batch_for(rule.network, 8), parts=2)
    assert counts == [64, 64, 64, 8, 4]


def test_the_mirror_does_not_disturb_the_gradient() -> None:
    """Oracle: credit with the mirror's rate at almost nothing, of the same feedback."""
    found = []
    for rate in (1e-12, 0.5):
        rule = WeightMirror(dense(), VECTORS, WeightMirrorConfig(mirror_rate=rate))
        batch: Batch = batch_for(rule.network)
        rule.credit(batch, Stepper(rule).step)
        found.append([p.grad.clone() for p in rule.network.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
