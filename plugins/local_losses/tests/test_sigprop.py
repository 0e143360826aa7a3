"""Signal propagation. Oracles: heads whose weights are the class rows, the losses over all example rows, linear classifiers, autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bpfree_local_losses.sigprop import Sigprop, SigpropConfig, likeness
from bpfree_local_losses.similarity import loss_of_rows, positives
from local_kit import batch_for, build, convolutional, dense, gradients, same
from torch import Tensor, nn

from bpfree import Batch, BpfreeError, BudgetConfig, Network, Rule, Task, TaskSpec, TrainConfig, Trainer, UsageError, new_step
from bpfree.certify import certify
from bpfree.network import MLPConfig, mlp

KINDS = [pytest.param(dense, id="dense"), pytest.param(lambda: convolutional(pool_after=[]), id="convolutional")]
LOSSES = [{"loss": "max-all"}, {"loss": "max-all", "normalise": True}, {"loss": "max-rand"}, {"loss": "top-k", "k": 2}]
Make = Callable[[], Network]


def losses(rule: Sigprop, batch: Batch) -> list[Tensor]:
    return [loss for _, loss in rule.losses(batch)]


def streams(rule: Sigprop, batch: Batch, labels: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Data and signal behind each block, and the signal that the block got, written out for blocks without poolings."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    x, t = batch.inputs, labels
    for name in rule.network.hidden:
        block, below = rule.network.blocks[name], t.detach()
        h, t = block(x), block(below) if found else rule.signal(labels)
        found.append((h, t, below))
        x = h.detach()
    return found


def dots(left: Tensor, right: Tensor) -> Tensor:
    """The mean over positions of dot products over channels, as the authors write it."""
    return (left.flatten(2).permute(2, 0, 1) @ right.flatten(2).permute(2, 1, 0)).mean(0) if left.dim() > 2 else left @ right.T


# --- losses ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", KINDS)
def test_label_direct_is_a_cross_entropy_head_of_class_rows(make: Make) -> None:
    """Its value, and the gradient (softmax(h T') - onehot) T / N at the layer's output."""
    rule = build(Sigprop, make(), loss="label-direct", scale="none")
    batch = batch_for(rule.network)
    onehot = F.one_hot(batch.targets, 5).double()
    for loss, (h, t, _) in zip(losses(rule, batch), streams(rule, batch, torch.eye(5).double()), strict=True):
        rows = t.detach().flatten(1) / math.prod(t.shape[2:])
        scores = h.flatten(1) @ rows.T
        torch.testing.assert_close(loss, F.cross_entropy(scores, batch.targets))
        ours = loss_of_rows(likeness(h, t, "none"), onehot, torch.ones(5).double(), normalise=False)
        closed = (scores.softmax(1) - onehot) @ rows / len(batch)
        torch.testing.assert_close(torch.autograd.grad(ours, h)[0].flatten(1), closed)


@pytest.mark.parametrize("options", LOSSES, ids=str)
@pytest.mark.parametrize("make", [dense, convolutional])
def test_class_rows_give_the_loss_of_example_rows(make: Make, options: dict[str, Any]) -> None:
    """The same value, and the same gradient of every parameter, the generator's too; with poolings behind some layers."""
    made = {}
    for rows in ("classes", "examples"):
        rule = build(Sigprop, make(), rows=rows, **options)
        batch = batch_for(rule.network)
        made[rows] = torch.stack(losses(rule, batch)).detach(), gradients(rule, batch)
    torch.testing.assert_close(made["classes"][0], made["examples"][0])
    same(made["classes"][1], made["examples"][1])
    assert bool(made["classes"][1]["signal.linear.weight"].any())


@pytest.mark.parametrize("options", LOSSES, ids=str)
@pytest.mark.parametrize("make", KINDS)
def test_losses_are_those_of_the_official_code(make: Make, options: dict[str, Any]) -> None:
    """Oracle: their definitions over all example rows: soft targets K = max K, the first of them, or the k largest."""
    rule = build(Sigprop, make(), scale="none", **options)
    batch = batch_for(rule.network)
    for loss, (h, t, below) in zip(losses(rule, batch), streams(rule, batch, F.one_hot(batch.targets, 5).double()), strict=True):
        scores, likeliest = dots(h, t), dots(below, below).detach().round(decimals=9)
        if options["loss"] == "max-rand":
            expected = F.cross_entropy(scores, likeliest.argmax(1))
        else:
            most = likeliest == likeliest.amax(1, keepdim=True)
            if options["loss"] == "top-k":
                most = torch.zeros_like(most).scatter_(1, likeliest.topk(2).indices, value=True)
            each = (most * -F.log_softmax(scores, 1)).sum(1)
            expected = (each / most.sum(1)).mean() if "normalise" in options else each.mean()
        torch.testing.assert_close(loss, expected)


def test_max_all_where_a_class_is_most_like_itself() -> None:
    """Oracle: n_y [CE(h T' + log n_c, y) + log n_y], with n_c examples of class c in the batch, over those that are there."""
    rule = build(Sigprop, dense(), scale="none")
    batch = batch_for(rule.network)
    counts = torch.bincount(batch.targets, minlength=5).double()
    assert counts.min() == 0
    h, t, _ = streams(rule, batch, torch.eye(5).double())[0]
    each = F.cross_entropy(h @ t.T + counts.log(), batch.targets, reduction="none")
    own = counts[batch.targets]
    torch.testing.assert_close(losses(rule, batch)[0], (own * (each + own.log())).mean())


def test_positives_of_few_rows() -> None:
    """By hand: the second class is more like the first than like itself, the third is missing, and two of three positives go to ties."""
    likeness = torch.tensor([[3.0, 2.0, 9.0, 1.0], [4.0, 1.0, 9.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 0.0, 2.0]])
    counts = torch.tensor([2.0, 4.0, 0.0, 3.0])
    assert positives("max-all", likeness, counts, 1)[[0, 1, 3]].tolist() == [[2, 0, 0, 0], [2, 0, 0, 0], [0, 4, 0, 3]]
    assert positives("max-rand", likeness, counts, 1)[[0, 1, 3]].tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]]
    assert positives("top-k", likeness, counts, 3)[[0, 1, 3]].tolist() == [[2, 1, 0, 0], [2, 1, 0, 0], [0, 3, 0, 0]]
    assert positives("top-k", likeness, counts, 99)[[0, 1]].tolist() == [[2, 4, 0, 3]] * 2
    assert positives("label-direct", likeness, counts, 1).tolist() == torch.eye(4).tolist()


# --- the signal's stream ----------------------------------------------------------------------------------------------------


def test_rows_of_a_class_are_equal_unless_something_is_dropped() -> None:
    """Oracle: the rows of two examples of a class, in every layer; with dropout they differ from the second layer on."""
    for dropout in (0.0, 0.4):
        rule = build(Sigprop, dense(dropout=dropout), rows="examples")
        batch = batch_for(rule.network)
        first, second = (batch.targets == batch.targets.mode().values).nonzero()[:2, 0].tolist()
        signals = [at for at, _ in rule._stream(F.one_hot(batch.targets, 5).double())]
        equal = [torch.equal(rows[first], rows[second]) for rows in signals]
        assert equal == ([True] * 3 if not dropout else [True, False, False])


def test_class_rows_are_taken_where_they_change_nothing() -> None:
    assert build(Sigprop, dense()).by_class
    assert not build(Sigprop, dense(dropout=0.1)).by_class
    assert not build(Sigprop, dense(norm="batch")).by_class
    assert build(Sigprop, dense(norm="batch"), loss="label-direct").by_class
    assert build(Sigprop, dense(norm="batch"), rows="classes").by_class


def test_similarities_are_measured_before_poolings() -> None:
    """As in the official code, whose poolings are layers of their own; the signal that goes on is pooled like the data."""
    rule = build(Sigprop, convolutional())
    assert {name: tuple(rows.shape) for name, rows in rule.class_rows().items()} == {
        "b1": (5, 4, 8, 8),
        "b2": (5, 6, 4, 4),
        "b3": (5, 6, 4, 4),
    }
    assert "b1 (before its pooling)" in rule.plan()
    assert "b2 (" not in rule.plan()
    (at, out), *_ = rule._stream(torch.eye(5).double())
    assert torch.equal(F.max_pool2d(at, 2), out)


@pytest.mark.parametrize("rows", ["classes", "examples"])
def test_streams_share_no_statistics(rows: str) -> None:
    """Oracle: running statistics of a pass of the data alone; other labels give the same ones, and the data's features too."""
    kept = []
    for shift in (0, 1):
        rule = build(Sigprop, convolutional(norm="batch"), rows=rows)
        batch = batch_for(rule.network)
        rule.credit(Batch(batch.inputs, (batch.targets + shift) % 5), new_step(rule))
        kept.append({name: buffer.clone() for name, buffer in rule.network.named_buffers()})
    plain = convolutional(norm="batch").train()
    plain(batch.inputs)
    for found in kept:
        for name, buffer in plain.named_buffers():
            if not name.startswith("blocks.readout"):
                assert torch.equal(found[name], buffer), name


# --- credit -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", KINDS)
def test_no_gradient_crosses_a_layer(make: Make) -> None:
    """Oracle: the gradient of each layer's own loss alone; new weights above change nothing below."""
    rule = build(Sigprop, make())
    batch = batch_for(rule.network)
    ours = gradients(rule, batch)
    for name, loss in rule.losses(batch):
        rule.zero_grad()
        loss.backward()
        alone = {key: p.grad for key, p in rule.named_parameters() if p.grad is not None}
        block = f"network.blocks.{name}."
        assert all(key.startswith((block, "signal.") if name == "b1" else block) for key in alone)
        for key, gradient in alone.items():
            torch.testing.assert_close(ours[key], gradient)
    with torch.no_grad():
        for parameter in rule.network.blocks["b3"].parameters():
            parameter.add_(torch.randn_like(parameter))
    moved = gradients(rule, batch)
    assert all(torch.equal(moved[key], ours[key]) for key in ours if "b3" not in key)


def test_it_descends_its_objective_exactly() -> None:
    rule = build(Sigprop, convolutional(), prediction="readout")
    batch = batch_for(rule.network)
    ours = gradients(rule, batch)
    rule.zero_grad()
    rule.objective(batch, new_step(rule)).backward()
    same(ours, {name: p.grad for name, p in rule.named_parameters() if p.grad is not None})
    assert "network.blocks.readout.1.weight" in ours


def test_a_fixed_generator_does_not_learn() -> None:
    rule = build(Sigprop, dense(), signal="fixed")
    found = gradients(rule, batch_for(rule.network))
    assert not any(name.startswith("signal") for name in found)
    assert bool(found["network.blocks.b1.0.weight"].any())


# --- prediction -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [*KINDS, pytest.param(lambda: convolutional(norm="batch"), id="batch norm")])
def test_similarity_predicts_as_a_linear_classifier(make: Make) -> None:
    """Oracle: ``nn.Linear`` on the last layer with the signals of the classes as rows; the same whatever is beside an example."""
    rule = build(Sigprop, make()).eval()
    batch = batch_for(rule.network)
    generator = torch.Generator()
    with torch.no_grad():
        scores = rule.predict(batch.inputs, generator)
        rows = rule.class_rows()["b3"]
        last = rule.network.blocks["b3"][:3] if rule.network.shapes["b3"][-2:] == (2, 2) else rule.network.blocks["b3"]
        features = last(rule.network.blocks["b2"](rule.network.blocks["b1"](batch.inputs)))
        classifier = nn.Linear(rows[0].numel(), 5, bias=False).double()
        classifier.weight.copy_(rows.flatten(1) / math.prod(rows.shape[2:]) / math.sqrt(rows.shape[1]))
        torch.testing.assert_close(scores, classifier(features.flatten(1)))
        torch.testing.assert_close(rule.predict(batch.inputs[:1], generator), scores[:1])
        torch.testing.assert_close(rule.alternatives(batch.inputs, generator)["b3"], scores)
    assert not any(part.training for part in rule.modules())


def test_a_label_is_refused_in_predictions() -> None:
    rule = build(Sigprop, dense())
    batch = batch_for(rule.network)
    for labelled in (batch, (batch.inputs, batch.targets)):
        with pytest.raises(UsageError, match="predicts from inputs alone"):
            rule.predict(labelled, torch.Generator())
    with pytest.raises(BpfreeError, match="has none"):
        rule.credit(Batch(batch.inputs), new_step(rule))
    with pytest.raises(BpfreeError, match="in training alone"):
        rule.eval().credit(batch, new_step(rule))


def test_what_it_cannot_use_is_refused() -> None:
    with pytest.raises(UsageError, match="no block but the readout"):
        build(Sigprop, dense(widths=[], depth=0))
    with pytest.raises(UsageError, match="cannot learn from targets"):
        Sigprop(dense(), TaskSpec("flat", (12,), 5, targets="real"))


def test_it_learns_and_its_twin_does_not(digits: Task) -> None:
    """Similarity alone, without a trained classifier; the twin, whose signals meet untrained layers, is near chance."""

    def trained(rule: Rule, epochs: int) -> float:
        config = TrainConfig(budget=BudgetConfig(epochs=epochs), optimizer={"lr": 0.002}, device="cpu", batch_size=64)
        return float(Trainer(rule, digits, config).fit().result["test/accuracy"])

    def made() -> Sigprop:
        torch.manual_seed(0)
        return Sigprop(mlp(digits.spec, MLPConfig(depth=2, norm="layer")), digits.spec, SigpropConfig())

    twin = made()
    twin.freeze_features()
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    with torch.no_grad():
        split = digits.test
        scores = twin.eval().predict(digits.spec.normalise(split.inputs), torch.Generator())
    assert float((scores.argmax(1) == split.targets).float().mean()) < 0.35
    assert trained(made(), 5) > 0.9


@pytest.mark.slow
def test_its_credit_is_local() -> None:
    """Oracle: the certificate's interventions: downstream weights 0, reverse span 1, labels unseen in predictions."""
    checks = [
        "trait-dependence",
        "trait-downstream-weights",
        "trait-reverse-span",
        "trait-passes",
        "labels-unseen",
        "prediction-per-example",
    ]
    assert certify("sigprop", only=checks).passed
