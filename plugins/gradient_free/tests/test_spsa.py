"""Simultaneous perturbation. Oracles: (g . z) z by hand, moments of the estimators, MeZO's published step, central differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bpfree_gradient_free import spsa
from bpfree_gradient_free.spsa import SPSA, SPSAConfig
from gradient_free_kit import NETWORKS, batch_for, convolutional, dense, function, spec_of, weights_of
from torch import Tensor

from bpfree import Network, OptimizerConfig, Stepper

D = 20


def rule_of(network: Network, **options: Any) -> SPSA:
    return SPSA(network, spec_of(network), SPSAConfig(**options))


def gradient(rule: SPSA, stepper: Stepper, batch: Any) -> Tensor:
    rule.zero_grad()
    rule.credit(batch, stepper.step)
    return torch.cat([p.grad.flatten() for p in rule.network.parameters() if p.grad is not None])


def directions(rule: SPSA, stepper: Stepper, count: int) -> list[Tensor]:
    """What the rule draws in this step, as vectors of all weights."""
    size = sum(p.numel() for p in rule.network.parameters())
    like = next(rule.network.parameters()).detach()
    return [rule._drawn(size, like, stepper.step.generator_for(f"direction {index}")) for index in range(count)]


def back_propagated(network: Network, batch: Any) -> Tensor:
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(spec_of(network).loss(network(batch.inputs), batch), list(network.parameters()))]
    )


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
@pytest.mark.parametrize("name", NETWORKS)
def test_estimates_are_slopes_times_directions(name: str, noise: Any) -> None:
    """Oracle: mean of (g . z) z with the gradient by back-propagation."""
    network = NETWORKS[name]()
    rule, batch = rule_of(network, noise=noise, directions=3, epsilon=1e-6, in_place=False), batch_for(network)
    stepper = Stepper(rule)
    exact = back_propagated(network, batch)
    expected = torch.stack([(exact @ z) * z for z in directions(rule, stepper, 3)]).mean(0)
    torch.testing.assert_close(gradient(rule, stepper, batch), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("noise", "factor"), [("gaussian", D + 2), ("rademacher", D)])
def test_moments_of_one_direction(noise: Any, factor: int) -> None:
    """Oracle: E g z z^T g = g, E |(g . z) z|^2 = (d + 2) |g|^2 for gaussian noise, exactly d |g|^2 on average for signs."""
    rule = rule_of(dense(), noise=noise)
    g = torch.linspace(-1, 2, D, dtype=torch.float64)
    z = rule._drawn(40_000 * D, g, torch.Generator().manual_seed(0)).view(-1, D)
    estimates = (z @ g)[:, None] * z
    error = estimates.mean(0) - g
    assert float(error.norm()) < 3 * float((factor * g.square().sum() / len(z)).sqrt())
    assert float(estimates.square().sum(1).mean() / g.square().sum()) == pytest.approx(factor, rel=0.03)


@pytest.mark.parametrize("count", [1, 4, 16])
def test_second_moment_of_several_directions(count: int) -> None:
    """Oracle: 1 + (d + 1) / K of gaussian directions on a linear function, through the rule itself."""
    g = torch.linspace(-1, 2, D, dtype=torch.float64)
    network, spec, batch = function("linear", torch.zeros(D, dtype=torch.float64), g)
    rule = SPSA(network, spec, SPSAConfig(noise="gaussian", directions=count, in_place=False))
    stepper = Stepper(rule)
    found = []
    for stepper.step.index in range(1200 // count):
        found.append(gradient(rule, stepper, batch).square().sum() / g.square().sum())
    expected = 1 + (D + 1) / count
    spread = torch.stack(found).std() / len(found) ** 0.5
    assert abs(float(torch.stack(found).mean()) - expected) < 3 * float(spread)
    assert float(spread) < 0.12 * expected


def test_a_step_is_mezos() -> None:
    """Oracle: Algorithm 1 of MeZO on the same noise: perturb, evaluate, perturb back, evaluate, restore, descend; decay of matrices."""
    network = dense()
    rule, batch = rule_of(network, directions=1, noise="gaussian", decay=0.1), batch_for(network)
    stepper = Stepper(rule, OptimizerConfig("sgd", lr=0.01))
    start = weights_of(rule)
    (z,) = directions(rule, stepper, 1)
    matrix = torch.cat([p.new_full((p.numel(),), float(p.dim() > 1)) for p in network.parameters()])
    theta = start * (1 - 0.01 * 0.1 * matrix)

    def loss(weights: Tensor) -> Tensor:
        torch.nn.utils.vector_to_parameters(weights, network.parameters())
        return spec_of(network).loss(network(batch.inputs), batch).detach()

    slope = (loss(theta + 1e-3 * z) - loss(theta - 1e-3 * z)) / 2e-3
    torch.nn.utils.vector_to_parameters(start.clone(), network.parameters())
    stepper.take(batch)
    torch.testing.assert_close(weights_of(rule), theta - 0.01 * slope * z, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_restored_within_rounding(dtype: torch.dtype) -> None:
    """Oracle: the weights before, at rate 0; three additions round by half a unit of the last place each."""
    network = dense().to(dtype)
    rule = rule_of(network, directions=5)
    before = weights_of(rule)
    Stepper(rule, OptimizerConfig("sgd", lr=0.0)).take(batch_for(network))
    change = (weights_of(rule) - before).abs()
    assert float(change.max()) <= 5 * 3 * torch.finfo(dtype).eps * float(before.abs().max() + 2e-3)
    assert float(change.max()) > 0  # in place, so not bit for bit


def test_with_an_optimiser_weights_are_restored_exactly() -> None:
    network = dense()
    rule = rule_of(network, in_place=False)
    before = weights_of(rule)
    gradient(rule, Stepper(rule), batch_for(network))
    assert torch.equal(weights_of(rule), before)


def test_in_place_and_by_an_optimiser_are_one_step() -> None:
    found = []
    for in_place in (True, False):
        rule = rule_of(convolutional().to(memory_format=torch.channels_last), in_place=in_place, directions=3)
        Stepper(rule, OptimizerConfig("sgd", lr=0.1)).take(batch_for(rule.network))
        found.append(weights_of(rule))
    torch.testing.assert_close(*found)


def test_noise_is_drawn_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: no piece is longer than a slice, and each direction is the same every time that it is drawn."""
    monkeypatch.setattr(spsa, "SLICE", 10)
    network = dense()
    rule = rule_of(network, directions=2)
    pieces = spsa._pieces(list(network.parameters()))
    assert max(sum(sizes) for sizes, _ in pieces) == 10
    assert sum(sum(sizes) for sizes, _ in pieces) == sum(p.numel() for p in network.parameters())
    before, step = weights_of(rule), Stepper(rule).step
    with torch.no_grad():
        rule._along(pieces, step, 1, 0.5)
        assert not torch.allclose(weights_of(rule), before, atol=0.1)
        rule._along(pieces, step, 1, -0.5)
    torch.testing.assert_close(weights_of(rule), before)


@pytest.mark.parametrize("name", NETWORKS)
def test_coordinates_are_derivatives(name: str) -> None:
    """Oracle: back-propagation at all coordinates, which single evaluations find to the order of epsilon."""
    network = NETWORKS[name]()
    count = sum(p.numel() for p in network.parameters())
    rule, batch = rule_of(network, noise="coordinates", directions=count, epsilon=1e-6, in_place=False), batch_for(network)
    before = weights_of(rule)
    torch.testing.assert_close(gradient(rule, Stepper(rule), batch), back_propagated(network, batch), rtol=1e-4, atol=1e-5)
    assert torch.equal(weights_of(rule), before)


def test_a_few_coordinates_move() -> None:
    network = dense()
    rule = rule_of(network, noise="coordinates", directions=9)
    before = weights_of(rule)
    stepper = Stepper(rule, OptimizerConfig("sgd", lr=1.0))
    stepper.take(batch_for(network))
    first = weights_of(rule) != before
    assert int(first.sum()) == 9
    before = weights_of(rule)
    stepper.take(batch_for(network))
    assert not torch.equal(weights_of(rule) != before, first)
    assert rule.traits.passes == 10


def test_frozen_blocks_stay() -> None:
    rule = rule_of(dense())
    rule.freeze_features()
    before = [p.clone() for p in rule.network.parameters()]
    Stepper(rule).take(batch_for(rule.network))
    assert [torch.equal(a, b) for a, b in zip(before, rule.network.parameters(), strict=True)] == [True] * 4 + [False] * 2


def test_running_statistics_follow_the_batch_once() -> None:
    """Oracle: one pass in training, and nothing after it."""
    network = dense(norm="batch", widths=[7])
    rule, batch = rule_of(network, directions=1), batch_for(network)
    other = dense(norm="batch", widths=[7])
    other.load_state_dict(network.state_dict())
    other.train()(batch.inputs)
    Stepper(rule, OptimizerConfig("sgd", lr=0.0)).take(batch)
    for mine, theirs in zip(network.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert rule.traits.passes == 3
