"""Forward-forward. Oracles: the gradient in closed form, goodness by brute force over labels, and the published step written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bpfree_local_losses.forward_forward import ForwardForward, ForwardForwardConfig, unit
from bpfree_local_losses.full_gradient import full_gradients
from bpfree_local_losses.label_inputs import LabelMLPConfig, label_mlp
from bpfree_local_losses.negatives import hard_labels, hybrids, mixing_masks, wrong_labels
from goodness_kit import IMAGES, PIXELS, VECTORS, batch_of, gradients, of_block
from torch import Tensor, nn

from bpfree import Batch, BudgetConfig, Task, TaskSpec, TrainConfig, Trainer, UsageError, new_step
from bpfree.network import MLPConfig, VGGConfig, mlp, vgg

GENERATOR = torch.Generator()


def rule_of(spec: TaskSpec = VECTORS, widths: tuple[int, ...] = (7, 5, 6), label: Any = "appended", **options: Any) -> ForwardForward:
    torch.manual_seed(0)
    network = label_mlp(spec, LabelMLPConfig(widths=list(widths), label=label))
    return ForwardForward(network, spec, ForwardForwardConfig(**options)).double()


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(1, keepdim=True).sqrt() + 1e-8)


def linears(rule: ForwardForward) -> list[nn.Linear]:
    return [part for block in rule.network.blocks.values() for part in block if isinstance(part, nn.Linear)]


def negatives(rule: ForwardForward, batch: Batch) -> Tensor:
    return wrong_labels(batch.targets, rule.spec.outputs, new_step(rule).generator_for("negatives"))


def rows_by_hand(rule: ForwardForward, batch: Batch) -> Tensor:
    """Inputs of the first layer, before they are normalised: with the right label, then with the wrong one."""
    labels = rule.config.label_size * F.one_hot(torch.cat([batch.targets, negatives(rule, batch)]), rule.spec.outputs).double()
    flat = batch.inputs.flatten(1).repeat(2, 1)
    return torch.cat([flat, labels], 1) if rule.place.appended else torch.cat([labels, flat[:, rule.spec.outputs :]], 1)


@pytest.mark.parametrize("gradient", ["true", "full"])
@pytest.mark.parametrize("label", ["appended", "pixels"])
def test_the_gradient_in_closed_form(gradient: Any, label: Any) -> None:
    """dL/dW = (sigma(g - d) - t) 2 z x^T / N over the N examples, real and false; a full gradient changes nothing in it."""
    rule, batch = rule_of(PIXELS, label=label, gradient=gradient, peer=0.0), batch_of(PIXELS)
    ours = gradients(rule, batch)
    x = rms(rows_by_hand(rule, batch))
    t = torch.cat([torch.ones(9), torch.zeros(9)])
    for name, layer in zip(rule.network.hidden, linears(rule), strict=True):
        z = torch.relu(layer(x)).detach()
        slope = ((z.square().sum(1) - z.shape[1]).sigmoid() - t) / len(x)
        expected = (slope[:, None] * 2 * z).T @ x
        weight = next(value for key, value in ours.items() if f".{name}." in key and key.endswith("weight"))
        torch.testing.assert_close(weight, expected, rtol=1e-10, atol=1e-13)
        x = rms(z)


def test_the_published_step_with_peer_normalisation() -> None:
    """Oracle: loeweX/Forward-Forward's loss written out, with its activation function, two steps long."""

    class ReLUFull(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, u: Tensor) -> Tensor:
            return u.clamp(min=0)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g.clone()

    rule = rule_of(gradient="full", peer=0.3)
    means = [torch.full((layer.out_features,), 0.5, dtype=torch.float64) for layer in linears(rule)]
    for seed in (1, 2):
        batch = batch_of(VECTORS, seed=seed)
        ours = gradients(rule, batch)
        x = rms(rows_by_hand(rule, batch))
        t = torch.cat([torch.ones(9), torch.zeros(9)]).double()
        rule.zero_grad()
        for index, layer in enumerate(linears(rule)):
            z = ReLUFull.apply(layer(x))
            means[index] = means[index].detach() * 0.9 + z[:9].mean(0) * 0.1
            peer = ((means[index].mean() - means[index]) ** 2).mean()
            (F.binary_cross_entropy_with_logits((z**2).sum(1) - z.shape[1], t) + 0.3 * peer).backward()
            x = rms(z.detach())
        for name, p in rule.named_parameters():
            torch.testing.assert_close(ours[name], p.grad, rtol=1e-10, atol=1e-13)
    for name, mean in zip(rule.network.hidden, means, strict=True):
        torch.testing.assert_close(rule.get_buffer(f"activity_{name}"), mean.detach())


def test_the_full_gradient_reaches_silent_units_through_the_peer_loss_alone() -> None:
    silent = {}
    for gradient in ("true", "full"):
        rule = rule_of(gradient=gradient)
        with torch.no_grad():
            linears(rule)[0].bias[3] = -100
        silent[gradient] = gradients(rule, batch_of(VECTORS))["network.blocks.b1.1.weight"][3]
    assert not silent["true"].any()
    assert silent["full"].abs().min() > 0
    block = nn.Sequential(nn.ReLU(inplace=True))
    x = torch.randn(5, requires_grad=True)
    with full_gradients(block):
        block(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(5))
    assert "forward" not in vars(block[0])


@pytest.mark.parametrize("form", ["sum", "mean"])
@pytest.mark.parametrize("label", ["appended", "pixels"])
def test_goodness_predicts_as_brute_force_over_labels_does(form: Any, label: Any) -> None:
    rule, batch = rule_of(PIXELS, label=label, goodness=form).eval(), batch_of(PIXELS)
    expected = torch.zeros(9, 4, dtype=torch.float64)
    for place in range(9):
        for candidate in range(4):
            flat, row = batch.inputs[place].flatten(), 3 * torch.eye(4, dtype=torch.float64)[candidate]
            x = torch.cat([flat, row]) if label == "appended" else torch.cat([row, flat[4:]])
            for index, layer in enumerate(linears(rule)):
                z = torch.relu(layer(rms(x[None])))
                if index:  # from the second layer on
                    expected[place, candidate] += (z.square().sum() if form == "sum" else z.square().mean()).detach()
                x = z[0]
    ours = rule.predict(batch.inputs, GENERATOR)
    shift = (ours - expected).flatten()  # the thresholds, which are the same for all
    torch.testing.assert_close(shift, shift[:1].expand_as(shift))
    assert torch.equal(ours.argmax(1), expected.argmax(1))


def test_nothing_that_stands_in_the_place_of_the_label_reaches_a_prediction() -> None:
    """A true label that was left in the pixels is overwritten, and an input that brings one is refused."""
    for options in ({}, {"prediction": "readout"}):
        rule, batch = rule_of(PIXELS, label="pixels", **options).eval(), batch_of(PIXELS)
        if rule.classifier is not None:
            nn.init.normal_(rule.classifier.weight)
        cheating = batch.inputs.flatten(1).clone()
        cheating[:, :4] = 100 * F.one_hot(batch.targets, 4)
        for method in (rule.predict, rule.alternatives):
            ours, theirs = method(batch.inputs, GENERATOR), method(cheating.view_as(batch.inputs), GENERATOR)
            pairs = [(ours, theirs)] if isinstance(ours, Tensor) else [(ours[name], theirs[name]) for name in ours]
            assert all(torch.equal(one, other) for one, other in pairs)
    rule, batch = rule_of().eval(), batch_of(VECTORS)
    with pytest.raises(UsageError, match="inputs of shape \\(10,\\)"):
        rule.predict(torch.cat([batch.inputs, F.one_hot(batch.targets, 4)], 1), GENERATOR)
    with pytest.raises(UsageError, match="predicts from inputs alone"):
        rule.predict(batch, GENERATOR)
    with pytest.raises(Exception, match="training alone"):
        rule.credit(batch, new_step(rule))


def test_no_gradient_crosses_a_layer() -> None:
    """Oracle: gradients of a block when the next one has other weights."""
    one, other = rule_of(), rule_of()
    with torch.no_grad():
        linears(other)[1].weight.normal_()
    first, second = gradients(one, batch_of(VECTORS)), gradients(other, batch_of(VECTORS))
    assert all(torch.equal(a, b) for a, b in zip(of_block(first, "b1"), of_block(second, "b1"), strict=True))
    assert not torch.equal(of_block(first, "b2")[0], of_block(second, "b2")[0])


@pytest.mark.parametrize(
    "options", [{}, {"prediction": "readout"}, {"negatives": "hard"}, {"negatives": "unsupervised", "prediction": "readout"}]
)
def test_credit_is_the_gradient_of_the_objective(options: dict[str, Any]) -> None:
    rule, batch = rule_of(**options), batch_of(VECTORS)
    if rule.classifier is not None:
        nn.init.normal_(rule.classifier.weight)
    before = {name: value.clone() for name, value in rule.named_buffers()}
    step = new_step(rule)
    parameters = list(rule.parameters())
    expected = torch.autograd.grad(rule.objective(batch, step), parameters)
    assert all(torch.equal(before[name], value) for name, value in rule.named_buffers())
    rule.credit(batch, step)
    for p, value in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, value)


def test_the_readout_reads_normalised_layers_of_a_neutral_image() -> None:
    rule, batch = rule_of(PIXELS, label="pixels", prediction="readout"), batch_of(PIXELS)
    assert not rule.classifier.weight.any()
    flat = batch.inputs.flatten(1).clone()
    flat[:, :4] = 3 / 4
    layers = linears(rule)
    first = rms(torch.relu(layers[0](rms(flat))))
    second = rms(torch.relu(layers[1](first)))
    expected = torch.cat([second, rms(torch.relu(layers[2](second)))], 1)
    torch.testing.assert_close(rule.features(batch.inputs), expected)
    grad = gradients(rule, batch)["classifier.weight"]
    error = torch.full((9, 4), 0.25, dtype=torch.float64) - F.one_hot(batch.targets, 4)
    torch.testing.assert_close(grad, (error.T @ expected / 9).detach())
    assert rule.group_options() == {}
    assert rule_of(prediction="readout", readout_lr=0.1, readout_decay=0.0).group_options() == {
        "classifier": {"lr": 0.1, "weight_decay": 0.0}
    }


def test_one_layer_is_read_where_there_is_one() -> None:
    rule = rule_of(widths=(5,))
    assert rule.read_layers == ["b1"]
    assert rule.predict(batch_of(VECTORS).inputs, GENERATOR).shape == (9, 4)
    assert rule_of(first=1).read_layers == ["b1", "b2", "b3"]


# --- negatives ----------------------------------------------------------------------------------------------------------


def test_wrong_labels_are_wrong_and_uniform() -> None:
    """Oracle: counts of 30,000 draws, within five deviations of a binomial."""
    targets = torch.zeros(30_000, dtype=torch.long)
    counts = wrong_labels(targets, 4, torch.Generator().manual_seed(0)).bincount(minlength=4)
    assert counts[0] == 0
    assert (counts[1:] - 10_000).abs().max() < 5 * math.sqrt(30_000 * 2 / 9)


def test_hard_labels_follow_the_classifier() -> None:
    """Oracle: the softmax over the wrong classes, within five deviations."""
    scores = torch.tensor([[3.0, 1.0, 0.0, -1.0]])
    counts = hard_labels(torch.zeros(30_000, dtype=torch.long), scores.expand(30_000, 4), torch.Generator().manual_seed(0)).bincount(
        minlength=4
    )
    expected = 30_000 * scores[0, 1:].softmax(0)
    assert counts[0] == 0
    assert torch.all((counts[1:] - expected).abs() < 5 * expected.sqrt())


def test_masks_have_regions_and_hybrids_are_made_of_both_images() -> None:
    """Blurring makes neighbours agree: of random bits half do."""
    agree = {}
    for blurs in (0, 6):
        mask = mixing_masks(50, (1, 16, 16), blurs, torch.Generator().manual_seed(0))
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        agree[blurs] = float((mask[..., 1:] == mask[..., :-1]).float().mean())
    assert agree[0] == pytest.approx(0.5, abs=0.02)
    assert agree[6] > 0.8
    inputs = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 8, 8).contiguous()
    mixed = hybrids(inputs, 2, torch.Generator().manual_seed(1))
    assert torch.equal(mixed[:, 0], mixed[:, 2])  # channels share a mask
    kinds = [set(image.unique().tolist()) for image in mixed]
    assert all(own in kind and len(kind) == 2 for own, kind in enumerate(kinds))
    assert torch.equal(hybrids(inputs[:1], 2, GENERATOR), inputs[:1])
    assert set(hybrids(torch.ones(4, 6), 2, GENERATOR).unique().tolist()) == {1.0}


def test_without_labels_nothing_but_the_readout_depends_on_them() -> None:
    rule = rule_of(negatives="unsupervised", prediction="readout")
    batch = batch_of(VECTORS)
    other = Batch(batch.inputs, (batch.targets + 1) % 4)
    first = gradients(rule, batch)
    rule = rule_of(negatives="unsupervised", prediction="readout")
    second = gradients(rule, other)
    differing = {name for name in first if not torch.equal(first[name], second[name])}
    assert differing == {"classifier.weight"}
    with pytest.raises(UsageError, match="no goodness for each label"):
        rule_of(negatives="unsupervised")


# --- networks, and a run ------------------------------------------------------------------------------------------------


def test_labels_find_a_place_in_any_chain() -> None:
    torch.manual_seed(0)
    batch = batch_of(IMAGES)
    rule = ForwardForward(vgg(IMAGES, VGGConfig(channels=[3, 4], pool_after=[2], norm="none")), IMAGES).double()
    assert not rule.place.appended
    assert set(gradients(rule, batch)) == {f"network.blocks.b{n}.0.{p}" for n in (1, 2) for p in ("weight", "bias")}
    assert unit(batch.inputs).square().mean((1, 2, 3)).tolist() == pytest.approx([1] * 9)
    appended = ForwardForward(label_mlp(IMAGES), IMAGES)
    assert appended.network.blocks["b1"][1].in_features == IMAGES.input_size + 4
    assert appended.pictures(3) == {}  # two channels are no picture
    assert rule_of(PIXELS).pictures(3)["b1"].shape == (3, 1, 5, 5)
    assert rule_of(PIXELS, label="pixels").pictures(3)["b2"].shape == (3, 1, 5, 5)
    large = TaskSpec("large", (1, 28, 28), 10)
    assert label_mlp(large).blocks["b1"][1].in_features == 784
    assert appended.network(batch.inputs.float()).shape == (9, 500)  # other rules take the network as it is
    with pytest.raises(UsageError, match="leave nothing of inputs of 4"):
        ForwardForward(mlp(TaskSpec("small", (4,), 4), MLPConfig(depth=2)), TaskSpec("small", (4,), 4))


def test_it_learns_and_its_twin_is_at_chance(digits: Task) -> None:
    """Digits, 4 epochs, judged by goodness: far above chance (a tenth), where a twin whose layers never move is."""

    def accuracy(twin: bool) -> float:
        torch.manual_seed(0)
        rule = ForwardForward(label_mlp(digits.spec, LabelMLPConfig(widths=[64, 64])), digits.spec)
        if twin:
            rule.freeze_features()
        settings = TrainConfig(budget=BudgetConfig(epochs=4), batch_size=32, device="cpu", evaluation={"every": 4})
        return float(Trainer(rule, digits, settings).fit().result["test/accuracy"])

    assert accuracy(twin=False) > 0.6
    assert accuracy(twin=True) < 0.2
