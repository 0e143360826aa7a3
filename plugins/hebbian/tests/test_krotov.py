"""Krotov and Hopfield's rule against a literal loop; the fixed point of the winners' norms; accumulation; the phase's rate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bpfree_hebbian.krotov import KrotovHopfield, KrotovHopfieldConfig
from reference import patches, updates
from torch import Tensor, nn

from bpfree import Batch, Network, TaskSpec, UsageError, new_step

FLAT = TaskSpec("flat", (12,), 3)
IMAGE = TaskSpec("image", (2, 6, 5), 3)


def dense_network() -> Network:
    blocks = {"b1": nn.Linear(12, 7, bias=False), "readout": nn.Linear(7, 3)}
    return Network(blocks, input_shape=(12,), readout="readout").double()


def image_network() -> Network:
    blocks = {
        "b1": nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(2, 5, 3, bias=False), nn.ReLU()),
        "readout": nn.Sequential(nn.Flatten(), nn.Linear(5 * 6 * 5, 3)),
    }
    return Network(blocks, input_shape=(2, 6, 5), readout="readout").double()


def rule_of(network: Network, spec: TaskSpec, **options: Any) -> KrotovHopfield:
    torch.manual_seed(0)
    return KrotovHopfield(network, spec, KrotovHopfieldConfig(**options)).double()


def batch_of(shape: tuple[int, ...], count: int) -> Batch:
    x = torch.randn(count, *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return Batch(x, torch.zeros(count, dtype=torch.long))


def literal_step(inputs: list[Tensor], weight: Tensor, lr: float, *, p: float, rank: int, delta: float) -> Tensor:
    """One update, one input and one unit at a time (Krotov and Hopfield 2019, Eq. 3, 9, 10)."""
    total = torch.zeros_like(weight)
    for x in inputs:
        currents = [float((row.sign() * row.abs() ** (p - 1) * x).sum()) for row in weight]
        order = sorted(range(len(weight)), key=lambda k, currents=currents: -currents[k])
        for k, g in ((order[0], 1.0), (order[rank - 1], -delta)):
            total[k] += g * (x - currents[k] * weight[k])
    return weight + lr * total / total.abs().max()


@pytest.mark.parametrize(("p", "rank", "delta"), [(2.0, 2, 0.4), (3.0, 4, 0.4), (2.0, 7, 0.1)])
def test_a_dense_step_is_the_literal_one(p: float, rank: int, delta: float) -> None:
    rule, batch = rule_of(dense_network(), FLAT, p=p, rank=rank, delta=delta, lr=[0.03]), batch_of((12,), 6)
    before = rule.layers["b1"].weight.detach().clone()
    updates(rule, [batch])
    expected = literal_step(list(batch.inputs), before, 0.03, p=p, rank=rank, delta=delta)
    torch.testing.assert_close(rule.layers["b1"].weight.detach(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("p", "rank"), [(2.0, 2), (3.0, 3)])
def test_a_convolutional_step_is_the_literal_one_at_each_position(p: float, rank: int) -> None:
    rule, batch = rule_of(image_network(), IMAGE, p=p, rank=rank, delta=0.4, lr=[0.03]), batch_of((2, 6, 5), 3)
    before = rule.layers["b1"].weight.detach().clone()
    padded = F.pad(batch.inputs, (1, 1, 1, 1), mode="reflect")
    windows = [window for image in padded for window in patches(image, 3)]
    updates(rule, [batch])
    expected = literal_step(windows, before, 0.03, p=p, rank=rank, delta=0.4)
    torch.testing.assert_close(rule.layers["b1"].weight.detach(), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("network", "spec", "shape"), [(dense_network, FLAT, (12,)), (image_network, IMAGE, (2, 6, 5))])
def test_accumulated_batches_are_the_large_batch(network: Any, spec: TaskSpec, shape: tuple[int, ...]) -> None:
    """Oracle: the identity; 64 examples at once, and four times 16, divided by the largest entry once."""
    results = []
    for parts in (1, 4):
        rule = rule_of(network(), spec, p=3.0)
        updates(rule, [batch_of(shape, 64)], parts)
        results.append(rule.layers["b1"].weight.detach())
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("p", [2.0, 3.0])
def test_winners_of_non_negative_data_get_unit_p_norm(p: float) -> None:
    """Oracle: d/dt |w|_p^p = p g I (1 - |w|_p^p), whose stable point is 1 where the currents are positive."""
    rule = rule_of(dense_network(), FLAT, p=p, delta=0.0, lr=[0.1])
    generator = torch.Generator().manual_seed(1)
    prototypes = torch.rand(3, 12, generator=generator, dtype=torch.float64)
    x = prototypes[torch.randint(3, (600 * 20,), generator=generator)]
    x = (x + 0.1 * torch.randn(x.shape, generator=generator, dtype=torch.float64)).clamp_min(0)
    updates(rule, [Batch(part, torch.zeros(20, dtype=torch.long)) for part in x.split(20)])
    weight = rule.layers["b1"].weight.detach()
    wins = (x @ (weight.sign() * weight.abs() ** (p - 1)).T).argmax(1).bincount(minlength=7)
    winners = wins > 0.05 * len(x)
    lengths = torch.linalg.vector_norm(weight[winners], p, dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=0.01)


def test_the_rate_falls_linearly_and_weights_begin_at_unit_variance() -> None:
    rule = rule_of(dense_network(), FLAT, lr=[0.02])
    assert float(rule.layers["b1"].weight.detach().std()) == pytest.approx(1, abs=0.2)
    assert float(rule_of(dense_network(), FLAT, radius=0.1).layers["b1"].norms().mean()) == pytest.approx(0.1, abs=0.05)
    assert updates(rule, [batch_of((12,), 4)] * 4) == pytest.approx([0.02, 0.015, 0.01, 0.005])


def test_the_metrics_name_winners_and_p_norms() -> None:
    """Oracle: their definitions."""
    rule, batch = rule_of(dense_network(), FLAT, p=3.0), batch_of((12,), 6)
    w = rule.layers["b1"].weight.detach()
    metrics = rule.credit(batch, new_step(rule))
    assert float(metrics["b1/p_norm"]) == pytest.approx(float((w.abs() ** 3).sum(1).pow(1 / 3).mean()))
    assert float(metrics["b1/active_units"]) == len((batch.inputs @ (w.sign() * w**2).T).argmax(1).unique())


def test_a_rank_that_no_unit_has_is_refused() -> None:
    with pytest.raises(UsageError, match="7 units, so none of rank 8"):
        rule_of(dense_network(), FLAT, rank=8)
