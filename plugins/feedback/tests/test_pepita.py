"""PEPITA. Oracles: the published step written out, and direct feedback alignment on a linear network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bpfree_feedback.pepita import PEPITA, PEPITAConfig
from torch import Tensor, nn

from bpfree import Batch, Network, TaskSpec, new_step
from bpfree.network import MLPConfig, VGGConfig, mlp, vgg

FLAT = TaskSpec("flat", (12,), 4)
IMAGE = TaskSpec("image", (2, 16, 16), 4)


def batch_of(spec: TaskSpec = FLAT, count: int = 9) -> Batch:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, *spec.input_shape, generator=generator, dtype=torch.float64)
    return Batch(inputs, torch.randint(spec.outputs, (count,), generator=generator))


def rule_of(network: Network | None = None, spec: TaskSpec = FLAT, **options: Any) -> PEPITA:
    torch.manual_seed(0)
    return PEPITA((network or mlp(spec, MLPConfig(widths=[8, 6]))).double(), spec, PEPITAConfig(**options)).double()


def credited(rule: PEPITA, batch: Batch) -> dict[str, Tensor]:
    rule.zero_grad()
    rule.credit(batch, new_step(rule))
    return {name: p.grad.clone() for name, p in rule.network.blocks.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("presynaptic", ["modulated", "standard"])
def test_the_published_step(presynaptic: Any) -> None:
    """Notebook of the authors: two passes, differences of activities, the second pass's error at the readout."""
    rule, batch = rule_of(scale=2.0, presynaptic=presynaptic), batch_of()
    ours, count = credited(rule, batch), len(batch)
    sites = [rule.network.blocks["b1"][0], rule.network.blocks["b2"][0], rule.network.blocks["readout"]]

    def run(x: Tensor) -> list[Tensor]:
        h1 = torch.relu(sites[0](x))
        h2 = torch.relu(sites[1](h1))
        return [x, h1, h2, sites[2](h2).softmax(1)]

    y = F.one_hot(batch.targets, 4)
    first = run(batch.inputs)
    second = run(batch.inputs + (first[3] - y) @ rule.get_buffer("projection"))
    taken = second if presynaptic == "modulated" else first
    expected = [(first[n + 1] - second[n + 1]).T @ taken[n] / count for n in range(2)] + [(second[3] - y).T @ taken[2] / count]
    for name, value in zip(("b1.0", "b2.0", "readout"), expected, strict=True):
        torch.testing.assert_close(ours[f"{name}.weight"], value.detach())


def test_on_a_linear_layer_it_is_direct_feedback_alignment() -> None:
    """grad W_1 is DFA's with D = -(W_1 B)^T at the modulated input x + B e; at x itself, or with the other sign, it is not."""
    rule, batch = rule_of(mlp(FLAT, MLPConfig(widths=[7], activation="identity")), scale=2.0), batch_of()
    ours = credited(rule, batch)["b1.0.weight"]
    error = (rule.network(batch.inputs).softmax(1) - F.one_hot(batch.targets, 4)).detach()
    projection, weight = rule.get_buffer("projection"), rule.network.blocks["b1"][0].weight.detach()
    feedback = -(weight @ projection.T).T

    def dfa(x: Tensor) -> Tensor:
        return (error @ feedback).T @ x / len(batch)

    modulated = batch.inputs + error @ projection
    torch.testing.assert_close(ours, dfa(modulated), rtol=1e-12, atol=1e-15)
    assert float((ours - dfa(batch.inputs)).norm() / ours.norm()) > 0.05
    assert float((ours + dfa(modulated)).norm() / ours.norm()) == pytest.approx(2)


def test_both_passes_drop_the_same_units() -> None:
    """A unit that is dropped does not change, so it learns nothing; the run's generator is moved as by one pass."""
    rule, batch = rule_of(mlp(FLAT, MLPConfig(widths=[400], dropout=0.5))), batch_of(count=1)
    torch.manual_seed(3)
    ours = credited(rule, batch)["b1.0.weight"]
    after = torch.rand(1)
    torch.manual_seed(3)
    mask = nn.Dropout(0.5)(torch.ones(1, 400, dtype=torch.float64))[0]
    assert torch.equal(after, torch.rand(1))
    assert torch.all(ours[mask == 0] == 0)
    assert 0.3 < float((ours[mask > 0].abs().sum(1) > 0).double().mean()) < 0.7  # those that are active


def test_convolutions_learn_from_changes_before_the_pooling() -> None:
    """Oracle: autograd of the product of the changes with the second pass's pre-activation, which is linear in the kernels."""
    rule, batch = rule_of(vgg(IMAGE, VGGConfig(channels=[3], pool_after=[1], norm="none")), IMAGE, scale=2.0), batch_of(IMAGE)
    ours = credited(rule, batch)
    conv = rule.network.blocks["b1"][0]
    error = (rule.network(batch.inputs).softmax(1) - F.one_hot(batch.targets, 4)).detach()
    modulated = batch.inputs + (error @ rule.get_buffer("projection")).view_as(batch.inputs)
    change = (torch.relu(conv(batch.inputs)) - torch.relu(conv(modulated))).detach() / len(batch)
    expected = torch.autograd.grad((change * conv(modulated)).sum(), conv.weight)[0]
    torch.testing.assert_close(ours["b1.0.weight"], expected)


def test_the_second_pass_leaves_running_statistics_alone() -> None:
    """Oracle: one pass of the network in training."""
    network = mlp(FLAT, MLPConfig(widths=[8], norm="batch"))
    rule, batch = rule_of(network), batch_of()
    credited(rule, batch)
    ours = {name: value.clone() for name, value in network.named_buffers()}
    again = rule_of(mlp(FLAT, MLPConfig(widths=[8], norm="batch")))
    again.network.load_state_dict(
        {**network.state_dict(), **{name: torch.zeros_like(v) + (v.dim() > 0 and "var" in name) for name, v in ours.items()}}
    )
    again.network(batch.inputs)
    for name, value in again.network.named_buffers():
        torch.testing.assert_close(ours[name], value)


def test_projections_are_he_uniform() -> None:
    rule = PEPITA(mlp(TaskSpec("wide", (2000,), 4), MLPConfig(widths=[3])), TaskSpec("wide", (2000,), 4))
    assert float(rule.get_buffer("projection").abs().max()) == pytest.approx(0.05 * (6 / 2000) ** 0.5, rel=0.01)
