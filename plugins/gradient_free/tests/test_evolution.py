"""Evolution strategies. Oracles: sums over members by hand, central differences, SNES and CMA-ES's path written out, dense noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from bpfree_gradient_free.evolution import Evolution, EvolutionConfig
from bpfree_gradient_free.perturbing import Low, draw, outputs, thin_layers, weighted
from bpfree_gradient_free.shaping import recombination, shaped
from gradient_free_kit import NETWORKS, VECTORS, batch_for, convolutional, dense, function, spec_of, weights_of
from torch import Tensor, nn

from bpfree import Batch, Network, OptimizerConfig, Stepper, TaskSpec
from bpfree.errors import UsageError


def rule_of(network: Network, spec: TaskSpec | None = None, **options: Any) -> Evolution:
    return Evolution(network, spec or spec_of(network), EvolutionConfig(**options))


def gradient(rule: Evolution, stepper: Stepper, batch: Any) -> Tensor:
    rule.zero_grad()
    rule.credit(batch, stepper.step)
    return torch.cat([p.grad.flatten() for p in rule.network.parameters() if p.grad is not None])


def members(rule: Evolution, stepper: Stepper, sizes: list[int]) -> Tensor:
    """The noise of a step by rows, chunk by chunk."""
    count = sum(p.numel() for p in rule.network.parameters())
    like = next(rule.network.parameters()).detach()
    return torch.cat(
        [like.new_empty(size, count).normal_(generator=stepper.step.generator_for(f"members {n}")) for n, size in enumerate(sizes)]
    )


def loss_at(rule: Evolution, batch: Any, weights: Tensor) -> Tensor:
    parts = weights.split([p.numel() for p in rule.network.parameters()])
    parameters = {name: part.view_as(p) for (name, p), part in zip(rule.network.named_parameters(), parts, strict=True)}
    return rule.spec.loss(torch.func.functional_call(rule.network, parameters, (batch.inputs,)), batch).detach()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("antithetic", "chunk", "sizes"), [(True, 4, [2, 2, 2]), (True, None, [6]), (False, 5, [5, 5, 2])])
def test_estimates_are_weighted_sums_of_noise(name: str, antithetic: bool, chunk: int | None, sizes: list[int]) -> None:
    """Oracle: members one after the other."""
    network = NETWORKS[name]()
    rule = rule_of(network, population=12, antithetic=antithetic, chunk=chunk, shaping="none", sigma=0.1)
    stepper, batch = Stepper(rule), batch_for(network)
    noise, theta = members(rule, stepper, sizes), weights_of(rule)
    noise = torch.cat([noise, -noise]) if antithetic else noise
    values = torch.stack([loss_at(rule, batch, theta + 0.1 * e) for e in noise])
    expected = (values - values.mean()) @ noise / 0.1 / 11
    torch.testing.assert_close(gradient(rule, stepper, batch), expected, rtol=1e-7, atol=1e-9)
    assert torch.equal(weights_of(rule), theta)


@pytest.mark.parametrize("together", [True, False])
def test_members_one_by_one_are_those_together(together: bool) -> None:
    found = []
    for way in (True, together):
        rule = rule_of(convolutional(), population=6, together=way)
        found.append(gradient(rule, Stepper(rule), batch_for(rule.network)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("rank", [1, 2])
def test_noise_inside_of_layers_is_dense_noise(name: str, rank: int) -> None:
    """Oracle: weights that are made for each member, W + sigma A B^T / sqrt(r)."""
    network = NETWORKS[name]()
    noise = draw(dict(network.named_parameters()), 3, rank, torch.Generator().manual_seed(0))
    assert any(isinstance(each, Low) for each in noise.values())
    scales = {key: torch.tensor(0.3, dtype=torch.float64) for key in noise}
    x = batch_for(network).inputs
    with torch.no_grad():
        inside = outputs(network, noise, scales, x, thin_layers(network), True)
        torch.testing.assert_close(inside, outputs(network, noise, scales, x, {}, True))
    weights = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    for each in noise.values():
        dense_noise = each.dense() if isinstance(each, Low) else each
        torch.testing.assert_close(weighted(each, weights), torch.einsum("m,m...->...", weights, dense_noise))


def test_layers_with_other_parameters_beside_them_are_given_weights() -> None:
    assert thin_layers(dense(norm="layer")) == {}
    rule = rule_of(dense(norm="layer"), rank=1, population=8)
    gradient(rule, Stepper(rule), batch_for(rule.network))
    assert all(p.grad is not None for p in rule.network.parameters())


@dataclass(frozen=True)
class Linear(TaskSpec):
    """A loss that is linear in the outputs."""

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return (outputs * torch.arange(1.0, 6.0, dtype=outputs.dtype)).sum()


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_estimates_are_unbiased_for_a_linear_function(rank: int) -> None:
    """Oracle: its gradient; the error of a mean of n falls as 1 / sqrt(n), from (d + 2) or, of rank 1, (outputs + 2)(inputs + 2)."""
    torch.manual_seed(0)
    network = Network({"readout": nn.Linear(6, 5, bias=False)}, input_shape=(6,), readout="readout").double()
    rule = rule_of(network, Linear("linear", (6,), 5, targets="none"), rank=rank, population=40_000, shaping="none", chunk=40_000)
    x = torch.linspace(-1, 1, 6, dtype=torch.float64)[None]
    found = gradient(rule, Stepper(rule), Batch(x))
    exact = (torch.arange(1.0, 6.0, dtype=torch.float64)[:, None] * x).flatten()
    assert float((found - exact).norm() / exact.norm()) < 3 * math.sqrt(7 * 8 / 20_000)
    assert float(found @ exact / exact.square().sum()) == pytest.approx(1, abs=0.03)


def test_shapes_of_losses() -> None:
    """Oracle: the definitions, on four members; what is not finite is the worst."""
    values = torch.tensor([3.0, float("nan"), 1.0, 2.0], dtype=torch.float64)
    assert shaped(values, "ranks").tolist() == pytest.approx([(2 / 3 - 0.5) / 4, 0.125, -0.125, (1 / 3 - 0.5) / 4])
    raw = [max(0.0, math.log(3) - math.log(k)) for k in (1, 2, 3, 4)]
    utilities = [each / sum(raw) - 0.25 for each in raw]
    assert shaped(values, "utilities").tolist() == pytest.approx([-utilities[place] for place in (2, 3, 0, 1)])
    assert shaped(torch.tensor([1.0, 4.0]), "none").tolist() == [-1.5, 1.5]
    weights, worth = recombination(values)
    own = [math.log(2.5) - math.log(k) for k in (1, 2)]
    own = [each / sum(own) for each in own]
    assert weights.tolist() == pytest.approx([0, 0, own[0], own[1]])
    assert worth == pytest.approx(1 / sum(each**2 for each in own))


def test_separable_deviations_are_snes() -> None:
    """Oracle: SNES of Schaul et al. 2011 in a loop of its own, on the same noise."""
    d, count = 7, 10
    network, spec, batch = function("rosenbrock", torch.linspace(-1, 1, d, dtype=torch.float64))
    rule = rule_of(network, spec, population=count, antithetic=False, step_size="separable", sigma=0.3)
    stepper = Stepper(rule)
    mean, sigma = weights_of(rule), torch.full((d,), 0.3, dtype=torch.float64)
    rate = (3 + math.log(d)) / (5 * math.sqrt(d))
    for _ in range(5):
        noise = members(rule, stepper, [count])
        order = torch.stack([loss_at(rule, batch, mean + sigma * e) for e in noise]).argsort()
        raw = torch.tensor([max(0.0, math.log(count / 2 + 1) - math.log(k)) for k in range(1, count + 1)], dtype=torch.float64)
        weights = raw / raw.sum() - 1 / count
        mean = mean + sigma * (weights @ noise[order])
        sigma = sigma * torch.exp(0.5 * rate * (weights @ (noise[order] ** 2 - 1)))
        stepper.take(batch)
        torch.testing.assert_close(weights_of(rule), mean)
        torch.testing.assert_close(rule.log_sigma.detach().exp(), sigma)


def test_the_path_of_the_mean_is_that_of_cma_es() -> None:
    """Oracle: cumulative step-size adaptation as in Hansen's tutorial (equations 43 and 44), without a covariance, on the same noise."""
    d, count = 7, 10
    network, spec, batch = function("sphere", torch.ones(d, dtype=torch.float64))
    rule = rule_of(network, spec, population=count, antithetic=False, step_size="path", sigma=0.3)
    stepper = Stepper(rule)
    mean, sigma, path = weights_of(rule), 0.3, torch.zeros(d, dtype=torch.float64)
    raw = torch.tensor([math.log(5.5) - math.log(k) for k in range(1, 6)], dtype=torch.float64)
    weights = raw / raw.sum()
    worth = float(1 / weights.square().sum())
    c = (worth + 2) / (d + worth + 5)
    damping = 1 + 2 * max(0, math.sqrt((worth - 1) / (d + 1)) - 1) + c
    for _ in range(5):
        noise = members(rule, stepper, [count])
        order = torch.stack([loss_at(rule, batch, mean + sigma * e) for e in noise]).argsort()[:5]
        move = weights @ noise[order]
        mean = mean + sigma * move
        path = (1 - c) * path + math.sqrt(c * (2 - c) * worth) * move
        sigma *= math.exp(c / damping * (float(path.norm()) / (math.sqrt(d) * (1 - 1 / (4 * d) + 1 / (21 * d * d))) - 1))
        stepper.take(batch)
        torch.testing.assert_close(weights_of(rule), mean)
        assert float(rule.get_buffer("sigma")) == pytest.approx(sigma)


@pytest.mark.parametrize("options", [{"step_size": "separable"}, {"step_size": "path"}], ids=str)
def test_the_sphere_is_solved(options: dict[str, Any]) -> None:
    network, spec, batch = function("sphere", torch.ones(10, dtype=torch.float64))
    rule = rule_of(network, spec, population=20, antithetic=False, sigma=0.3, **options)
    stepper = Stepper(rule)
    torch.manual_seed(0)
    for _ in range(250):
        stepper.take(batch)
    assert float(weights_of(rule).square().sum()) < 1e-6


def test_frozen_blocks_stay() -> None:
    rule = rule_of(dense(), population=8, step_size="separable")
    rule.freeze_features()
    before = [p.clone() for p in rule.network.parameters()]
    Stepper(rule).take(batch_for(rule.network))
    assert [torch.equal(a, b) for a, b in zip(before, rule.network.parameters(), strict=True)] == [True] * 4 + [False] * 2


def test_accumulated_steps_are_means_over_their_parts() -> None:
    """Oracle: each part's own estimate; several processes sum these in the same way."""
    rule = rule_of(dense(), population=8, shaping="none")
    stepper, batch = Stepper(rule, OptimizerConfig("sgd", lr=1.0)), batch_for(rule.network)
    halves = [
        Batch(batch.inputs[part], (batch.targets if batch.targets is not None else torch.empty(0))[part])
        for part in (slice(0, 6), slice(6, 12))
    ]
    expected = torch.zeros_like(weights_of(rule))
    for stepper.step.part, half in enumerate(halves):
        expected += gradient(rule, stepper, half) / 2
    stepper.step.part = 0
    rule.zero_grad()
    before = weights_of(rule)
    stepper.take(batch, parts=2)
    torch.testing.assert_close(before - weights_of(rule), expected)


@pytest.mark.parametrize(
    ("options", "word"), [({"population": 7}, "population=7"), ({"rank": 1, "step_size": "separable"}, "rank=1")], ids=str
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        rule_of(dense(), VECTORS, **options)
