"""Local errors. Oracles: cosines written by hand, heads by torch's own losses, closed forms, autograd of one layer's loss alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bpfree_local_losses.local_errors import LocalErrors, LocalErrorsConfig, LocalHead, decoder_pooling, similarity_matrix
from local_kit import batch_for, build, convolutional, dense, gradients, same
from torch import nn

from bpfree import Batch, BudgetConfig, Network, Task, TaskSpec, TrainConfig, Trainer, UsageError, new_step
from bpfree.baselines import Frozen
from bpfree.certify import certify
from bpfree.network import MLPConfig, mlp

Make = Callable[[], Network]
KINDS = [dense, convolutional]
OPTIONS: list[dict[str, Any]] = [
    *({"loss": loss} for loss in ("pred", "sim", "predsim")),
    *({"loss": loss, "bio": True} for loss in ("pred", "sim", "predsim")),
]


def head_of(rule: LocalErrors, name: str) -> LocalHead:
    head = rule.heads[name]
    assert isinstance(head, LocalHead)
    return head


# --- similarities ---------------------------------------------------------------------------------------------------------


def test_similarities_are_cosines_of_centred_rows() -> None:
    """Oracle: correlation coefficients of rows; of feature maps of the deviations over positions; few channels are taken flat."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 7, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(similarity_matrix(rows), torch.corrcoef(rows), atol=1e-7, rtol=0)
    maps = torch.randn(6, 5, 3, 4, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(similarity_matrix(maps), torch.corrcoef(maps.std((2, 3))), atol=1e-7, rtol=0)
    for flat in (maps[:, :3], maps[:, :, :1, :1]):
        torch.testing.assert_close(similarity_matrix(flat), torch.corrcoef(flat.flatten(1)), atol=1e-7, rtol=0)
    torch.testing.assert_close(similarity_matrix(maps.contiguous(memory_format=torch.channels_last)), similarity_matrix(maps))


def test_labels_are_alike_or_opposed() -> None:
    """By hand: 1 within a class, -1 / (C - 1) between classes."""
    found = similarity_matrix(torch.eye(4)[torch.tensor([0, 2, 2])])
    torch.testing.assert_close(found, torch.tensor([[1, -1 / 3, -1 / 3], [-1 / 3, 1, 1], [-1 / 3, 1, 1]]))


def test_the_similarity_loss_is_zero_at_the_centred_label() -> None:
    """Features that are the label, centred and scaled, through a map that is the identity; and nowhere near zero for other labels."""
    rule = build(LocalErrors, dense(widths=[5]), loss="sim")
    match = head_of(rule, "b1").match
    assert isinstance(match, nn.Linear)
    with torch.no_grad():
        match.weight.copy_(torch.eye(5))
    batch = batch_for(rule.network)
    features = F.one_hot(batch.targets, 5).double()
    features = 3 * (features - features.mean(1, keepdim=True))
    assert float(rule._loss("b1", features, batch).detach()) < 1e-12
    assert float(rule._loss("b1", features, Batch(batch.inputs, batch.targets.roll(1))).detach()) > 0.1


def test_a_dead_layer_has_no_infinite_gradient() -> None:
    rule = build(LocalErrors, dense(), loss="sim")
    dead = torch.zeros(11, 9, dtype=torch.float64, requires_grad=True)
    rule._loss("b1", dead, batch_for(rule.network)).backward()
    assert dead.grad is not None
    assert bool(dead.grad.isfinite().all())


# --- losses ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", KINDS)
def test_predsim_is_the_weighted_sum_of_its_parts(make: Make) -> None:
    """Oracle: torch's losses on a decoder and a map by hand, of the layer before its pooling."""
    rule = build(LocalErrors, make(), zero=False, decoder_inputs=40, beta=0.7)
    batch = batch_for(rule.network)
    block, head = rule.network.blocks["b1"], head_of(rule, "b1")
    assert head.decoder is not None
    assert head.match is not None
    features = (block[:3] if make is convolutional else block)(batch.inputs)
    pooled = F.avg_pool2d(features, (4, 2)) if features.dim() == 4 else features
    decoded = F.cross_entropy(pooled.flatten(1) @ head.decoder.weight.T + head.decoder.bias, batch.targets)
    mapped = F.conv2d(features, head.match.weight, padding=1).std((2, 3)) if features.dim() == 4 else features @ head.match.weight.T
    labels = torch.corrcoef(F.one_hot(batch.targets, 5).double())
    matched = (torch.corrcoef(mapped) - labels).square().mean()
    name, loss = next(iter(rule.losses(batch)))
    assert name == "b1"
    torch.testing.assert_close(loss, 0.3 * decoded + 0.7 * matched, atol=1e-7, rtol=1e-7)


def test_the_published_variant_without_transport() -> None:
    """Oracle: signs of projected labels by torch's loss, and a decoder whose cotangent goes through its fixed feedback."""
    rule = build(LocalErrors, dense(), loss="pred", bio=True, target_size=6)
    batch = batch_for(rule.network)
    head = head_of(rule, "b1")
    assert head.decoder is not None
    assert head.feedback is not None
    assert head.projection is not None
    with torch.no_grad():
        head.decoder.weight.normal_(generator=torch.Generator().manual_seed(3))
    features = torch.randn(11, 9, dtype=torch.float64, requires_grad=True)
    loss = rule._loss("b1", features, batch)
    signs = (F.one_hot(batch.targets, 5).double() @ head.projection.T > 0).double()
    scores = features @ head.decoder.weight.T + head.decoder.bias
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(scores, signs))
    error = (scores.sigmoid() - signs) / scores.numel()
    found = torch.autograd.grad(loss, [features, head.decoder.weight])
    torch.testing.assert_close(found[0], error @ head.feedback)
    torch.testing.assert_close(found[1], error.T @ features)
    assert head.projection.abs().max() <= 1 / math.sqrt(5)
    assert head.feedback.abs().max() <= 1 / math.sqrt(9)
    assert not {"feedback", "projection"} & set(dict(head.named_parameters()))


@pytest.mark.parametrize(
    ("shape", "limit", "kernel", "inputs"),
    [
        ((8, 32, 32), 8192, (1, 1), 8192),
        ((8, 32, 32), 4096, (2, 1), 4096),  # rows first
        ((8, 32, 32), 2048, (2, 2), 2048),
        ((8, 32, 32), 2047, (4, 2), 1024),
        ((8, 7, 7), 128, (2, 2), 128),  # 7 in windows of 2 makes 4, padded
        ((8, 14, 14), 128, (4, 4), 128),
        ((8, 28, 28), 128, (8, 8), 128),
        ((8, 3, 3), 32, (2, 2), 32),
        ((5,), 1, (1, 1), 5),
    ],
)
def test_decoders_pool_until_their_inputs_are_few(shape: tuple[int, ...], limit: int, kernel: tuple[int, int], inputs: int) -> None:
    """By hand, after the loop in the authors' code: sizes over windows, rounded up."""
    assert decoder_pooling(torch.Size(shape), limit)[0] == kernel
    head = LocalHead(torch.Size(shape), 3, LocalErrorsConfig(loss="pred", decoder_inputs=limit))
    assert head.decoder is not None
    assert head.decoder.in_features == inputs
    assert head.scores(torch.ones(2, *shape)).shape == (2, 3)


def test_decoders_and_readout_begin_at_zero() -> None:
    rule = build(LocalErrors, convolutional())
    weights = [head_of(rule, name).decoder.weight for name in rule.network.hidden]  # type: ignore[union-attr]
    assert not any(bool(weight.any()) for weight in [*weights, rule.network.blocks["readout"][1].weight])
    other = build(LocalErrors, convolutional(), zero=False)
    assert bool(head_of(other, "b1").decoder.weight.any())  # type: ignore[union-attr]
    assert bool(other.network.blocks["readout"][1].weight.any())


def test_losses_see_a_layer_before_its_dropout() -> None:
    """Oracle: the same layer without dropout has the same loss; behind it, by ``place=output``, another."""
    found = {}
    for key, (dropout, place) in {"none": (0.0, "activation"), "before": (0.5, "activation"), "behind": (0.5, "output")}.items():
        rule = build(LocalErrors, dense(dropout=dropout), place=place)
        found[key] = next(iter(rule.losses(batch_for(rule.network))))[1]
    assert torch.equal(found["none"], found["before"])
    assert not torch.allclose(found["none"], found["behind"])


# --- credit -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("make", KINDS)
def test_no_gradient_crosses_a_layer(make: Make, options: dict[str, Any]) -> None:
    """Oracle: the gradient of each layer's loss alone, which reaches its block and its head; new weights above change nothing below."""
    rule = build(LocalErrors, make(), zero=False, **options)
    batch = batch_for(rule.network)
    ours = gradients(rule, batch)
    for name, loss in rule.losses(batch):
        rule.zero_grad()
        loss.backward()
        alone = {key: p.grad for key, p in rule.named_parameters() if p.grad is not None}
        assert alone
        assert all(key.startswith((f"network.blocks.{name}.", f"heads.{name}.")) for key in alone)
        for key, gradient in alone.items():
            torch.testing.assert_close(ours[key], gradient)
    assert set(ours) == {name for name, _ in rule.named_parameters()}
    with torch.no_grad():
        for parameter in rule.network.blocks["b3"].parameters():
            parameter.add_(torch.randn_like(parameter))
    moved = gradients(rule, batch)
    assert all(torch.equal(moved[key], ours[key]) for key in ours if "b3" not in key and "readout" not in key)


def test_it_descends_its_objective_exactly() -> None:
    """Oracle: one backward pass of the sum of all losses; ``same`` compares gradients by name."""
    rule = build(LocalErrors, convolutional(norm="batch"))
    batch = batch_for(rule.network)
    ours = gradients(rule, batch)
    rule.zero_grad()
    rule.objective(batch, new_step(rule)).backward()
    same(ours, {name: p.grad for name, p in rule.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("kind", ["soft", "multilabel"])
def test_other_targets(kind: Any) -> None:
    """Oracle: the sum of the parts, with rows of targets in place of labels."""
    spec = TaskSpec("flat", (12,), 5, targets=kind)
    torch.manual_seed(0)
    rule = LocalErrors(mlp(spec, MLPConfig(widths=[8])), spec)
    batch = Batch(torch.randn(7, 12), spec.example_targets(7, torch.Generator().manual_seed(1)))
    features, head = torch.rand(7, 8), head_of(rule, "b1")
    expected = 0.01 * spec.loss(head.scores(features), batch)
    expected = expected + 0.99 * F.mse_loss(similarity_matrix(head.compared(features)), similarity_matrix(batch.targets.float()))
    torch.testing.assert_close(rule._loss("b1", features, batch), expected)


# --- prediction -------------------------------------------------------------------------------------------------------------


def test_decoders_predict_by_layer() -> None:
    rule = build(LocalErrors, convolutional(), zero=False).eval()
    inputs = batch_for(rule.network).inputs
    found = rule.alternatives(inputs, torch.Generator())
    features = rule.network.blocks["b1"][:3](inputs)
    torch.testing.assert_close(found["b1"], head_of(rule, "b1").decoder(features.flatten(1)))  # type: ignore[misc]
    assert list(found) == ["b1", "b2", "b3"]
    assert build(LocalErrors, dense(), loss="sim").alternatives(inputs, torch.Generator()) == {}


def test_what_it_cannot_use_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot learn from targets"):
        LocalErrors(dense(), TaskSpec("flat", (12,), 5, targets="real"))


def test_it_learns_features(digits: Task) -> None:
    """Oracle: frozen layers with a trained readout in the same budget, ten points below."""

    def trained(kind: Any) -> dict[str, Any]:
        torch.manual_seed(0)
        rule = kind(mlp(digits.spec, MLPConfig(depth=2, width=64, norm="batch")), digits.spec)
        config = TrainConfig(budget=BudgetConfig(epochs=5), optimizer={"lr": 0.002}, device="cpu", batch_size=64)
        return Trainer(rule, digits, config).fit().result

    assert trained(LocalErrors)["test/accuracy"] > max(0.92, trained(Frozen)["test/accuracy"] + 0.1)


@pytest.mark.slow
def test_its_credit_is_local() -> None:
    """Oracle: the certificate's interventions: downstream weights 0, reverse span 1."""
    traits = ["dependence", "downstream-weights", "reverse-span", "supervision", "passes"]
    assert certify("local-errors", only=[f"trait-{name}" for name in traits]).passed
