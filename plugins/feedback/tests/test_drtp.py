"""Direct random target projection. Oracles: its update in closed form, and autograd of its objective."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bpfree_feedback.drtp import DirectRandomTargetProjection, DRTPConfig
from torch import Tensor

from bpfree import Batch, Network, TaskSpec, new_step
from bpfree.network import MLPConfig, VGGConfig, mlp, vgg

FLAT = TaskSpec("flat", (12,), 4)
IMAGE = TaskSpec("image", (2, 16, 16), 4)


def batch_of(spec: TaskSpec, count: int = 9) -> Batch:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, *spec.input_shape, generator=generator, dtype=torch.float64)
    targets = spec.example_targets(count, generator)
    assert targets is not None
    return Batch(inputs, targets if spec.targets == "classes" else targets.double())


def rule_of(spec: TaskSpec = FLAT, network: Network | None = None, **options: Any) -> DirectRandomTargetProjection:
    torch.manual_seed(0)
    network = network or mlp(spec, MLPConfig(widths=[8, 6], activation="tanh"))
    return DirectRandomTargetProjection(network.double(), spec, DRTPConfig(**options)).double()


def credited(rule: DirectRandomTargetProjection, batch: Batch) -> dict[str, Tensor]:
    rule.zero_grad()
    rule.credit(batch, new_step(rule))
    return {name: p.grad.clone() for name, p in rule.network.blocks.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["classes", "multilabel", "real"])
def test_the_update_in_closed_form(kind: Any) -> None:
    """grad W_l = ((y D_l) (1 - h^2))^T h_below / N, and the readout's own gradient."""
    spec = TaskSpec("flat", (12,), 4, targets=kind)
    rule, batch = rule_of(spec), batch_of(spec)
    ours, rows = credited(rule, batch), spec.target_rows(batch, torch.float64)
    below = batch.inputs
    for name in rule.network.hidden:
        h = torch.tanh(rule.network.blocks[name][0](below))
        delta = (rows @ rule.get_buffer(f"feedback_{name}")) * (1 - h**2) / len(batch)
        torch.testing.assert_close(ours[f"{name}.0.weight"], (delta.T @ below).detach())
        torch.testing.assert_close(ours[f"{name}.0.bias"], delta.sum(0).detach())
        below = h
    error = spec.error(rule.network.blocks["readout"](below), batch)
    torch.testing.assert_close(ours["readout.weight"], (error.T @ below).detach())


@pytest.mark.parametrize("options", [{}, {"place": "output"}, {"readout": "bce"}])
def test_it_descends_its_objective_exactly(options: dict[str, Any]) -> None:
    """Convolutions with batch norm and poolings. Oracle: autograd; and targets are projected in front of the pooling, or behind it."""
    network = vgg(IMAGE, VGGConfig(channels=[3, 4], pool_after=[1, 2], activation="tanh", norm="batch"))
    rule, batch = rule_of(IMAGE, network, **options), batch_of(IMAGE)
    assert rule.get_buffer("feedback_b2").shape == ((4, 4, 4, 4) if options.get("place") == "output" else (4, 4, 8, 8))
    ours = credited(rule, batch)
    rule.zero_grad()
    rule.objective(batch, new_step(rule)).backward()
    assert len(ours) == 10
    for name, parameter in rule.network.blocks.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad)


def test_feedback_weights_are_he_uniform() -> None:
    """Up to sqrt(6 / units), as torch's initialisation of the published shape makes them; times the scale."""
    torch.manual_seed(0)
    rule = DirectRandomTargetProjection(mlp(FLAT, MLPConfig(widths=[600])), FLAT, DRTPConfig(scale=2.0))
    published = torch.nn.init.kaiming_uniform_(torch.empty(4, 600))
    ours = rule.get_buffer("feedback_b1")
    assert float(ours.abs().max()) == pytest.approx(2 * float(published.abs().max()), rel=0.01)
    assert float(ours.std()) == pytest.approx(2 * float(published.std()), rel=0.05)


def test_hidden_updates_need_nothing_above() -> None:
    """Oracle: the same network with other blocks above; only the classes of the examples count."""
    batch, made = batch_of(FLAT), []
    for seed in (1, 2):
        rule = rule_of()
        with torch.no_grad():
            rule.network.blocks["b2"][0].weight.normal_(generator=torch.Generator().manual_seed(seed))
            rule.network.blocks["readout"].weight.zero_()
        made.append(credited(rule, batch)["b1.0.weight"])
    assert torch.equal(*made)


def test_the_readout_may_learn_from_the_published_loss() -> None:
    """Oracle: autograd of torch's binary cross-entropy, its mean over examples and classes."""
    rule, batch = rule_of(readout="bce"), batch_of(FLAT)
    ours = credited(rule, batch)
    rule.zero_grad()
    F.binary_cross_entropy(rule.network(batch.inputs).sigmoid(), F.one_hot(batch.targets, 4).double()).backward()
    torch.testing.assert_close(ours["readout.weight"], rule.network.blocks["readout"].weight.grad)


def test_hidden_blocks_have_a_rate_of_their_own() -> None:
    assert rule_of(hidden_lr=0.5).group_options() == {"b1": {"lr": 0.5}, "b2": {"lr": 0.5}}
    assert rule_of().group_options() == {}
