"""SoftHebb against a literal reference; accumulation; norms; phases; controls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bpfree_hebbian.softhebb import SoftHebb, SoftHebbConfig
from reference import hard_increment, patches, softhebb_increment, softhebb_step
from torch import Tensor, nn

from bpfree import Batch, Budget, Network, TaskSpec, new_step
from bpfree.training.phases import learning
from bpfree.training.updater import accumulate

DENSE = TaskSpec("flat", (12,), 3)
IMAGE = TaskSpec("image", (2, 6, 5), 3)


def dense_network() -> Network:
    blocks = {"b1": nn.Sequential(nn.Linear(12, 7, bias=False), nn.ReLU()), "readout": nn.Linear(7, 3)}
    return Network(blocks, input_shape=(12,), readout="readout").double()


def image_network() -> Network:
    blocks = {
        "b1": nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(2, 4, 3, bias=False), nn.ReLU()),
        "b2": nn.Sequential(nn.Conv2d(4, 5, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2)),
        "readout": nn.Sequential(nn.Flatten(), nn.Linear(5 * 2 * 1, 3)),
    }
    return Network(blocks, input_shape=(2, 6, 5), readout="readout").double()


def rule_of(network: Network, spec: TaskSpec, **options: Any) -> SoftHebb:
    return SoftHebb(network, spec, SoftHebbConfig(**options)).double()


def one_update(rule: SoftHebb, batch: Batch, parts: int = 1) -> dict[str, Tensor]:
    """A step of the first phase; returns the metrics."""
    step = new_step(rule)
    phase = next(iter(rule.phases(Budget(epochs=4))))
    step.phase = phase
    with learning(rule, phase):
        updater = step.apply.__self__  # type: ignore[attr-defined]
        updater.start_phase(phase)
        return accumulate(rule, batch, step, parts) if parts > 1 else rule.learn(batch, step)


def batch_of(shape: tuple[int, ...], count: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    return Batch(x, torch.randint(0, 3, (count,), generator=generator))


@pytest.mark.parametrize("anti", [True, False])
@pytest.mark.parametrize("power", [0.5, 0.2, 0.0])
def test_a_dense_step_is_the_literal_one(anti: bool, power: float) -> None:
    """Oracle: loops over examples and units, written from the paper's equations."""
    torch.manual_seed(0)
    rule = rule_of(dense_network(), DENSE, anti_hebbian=anti, t_invert=[2.0], lr=[0.03], power_lr=power, radius=2.0)
    batch = batch_of((12,))
    before = rule.layers["b1"].weight.detach().clone()
    expected = softhebb_step(softhebb_increment(list(batch.inputs), before, 2.0, anti), before, 0.03, power)
    one_update(rule, batch)
    torch.testing.assert_close(rule.layers["b1"].weight.detach(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("competition", ["soft", "hard"])
def test_a_convolutional_step_is_the_literal_one(competition: Any) -> None:
    """Oracle: the same loops over windows; the second block sees the first one's output before the update."""
    torch.manual_seed(0)
    rule = rule_of(
        image_network(), IMAGE, t_invert=[1.5, 0.7], lr=[0.05, 0.02], competition=competition, anti_hebbian=competition == "soft"
    )
    batch = batch_of((2, 6, 5), count=3)
    w1, w2 = (layer.weight.detach().clone() for layer in rule.layers.values())
    padded = F.pad(batch.inputs, (1, 1, 1, 1), mode="reflect")
    first = [window for image in padded for window in patches(image, 3)]
    second = [window for image in F.conv2d(padded, w1).relu() for window in patches(image, 3)]

    def increment(inputs: list[Tensor], weight: Tensor, t: float) -> Tensor:
        return softhebb_increment(inputs, weight, t, True) if competition == "soft" else hard_increment(inputs, weight)

    one_update(rule, batch)
    torch.testing.assert_close(
        rule.layers["b1"].weight.detach(), softhebb_step(increment(first, w1, 1.5), w1, 0.05, 0.5), rtol=1e-11, atol=1e-13
    )
    torch.testing.assert_close(
        rule.layers["b2"].weight.detach(), softhebb_step(increment(second, w2, 0.7), w2, 0.02, 0.5), rtol=1e-11, atol=1e-13
    )


@pytest.mark.parametrize(("network", "spec", "shape"), [(dense_network, DENSE, (12,)), (image_network, IMAGE, (2, 6, 5))])
def test_accumulated_batches_are_the_large_batch(network: Any, spec: TaskSpec, shape: tuple[int, ...]) -> None:
    """Oracle: the identity; 64 examples at once, and four times 16."""
    results = []
    for parts in (1, 4):
        torch.manual_seed(0)
        rule = rule_of(network(), spec)
        one_update(rule, batch_of(shape, 64), parts)
        results.append([layer.weight.detach() for layer in rule.layers.values()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
