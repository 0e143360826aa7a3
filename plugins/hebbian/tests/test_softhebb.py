"""SoftHebb against a literal reference; accumulation; norms; phases; controls."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bpfree_hebbian.networks import Activation, CNNConfig, cnn
from bpfree_hebbian.softhebb import SoftHebb, SoftHebbConfig
from reference import hard_increment, patches, softhebb_increment, softhebb_step
from torch import Tensor, nn

from bpfree import Batch, Budget, Network, Phase, Run, Split, Stepper, TaskSpec, UsageError, hookimpl
from bpfree.config import parse_words, resolve
from bpfree.training.trainer import Trainer

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
    stepper = Stepper(rule)
    with stepper.phase(next(iter(rule.phases(Budget(epochs=4))))):
        return stepper.take(batch, parts)


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
def test_without_the_division_a_step_is_the_mean_over_examples(competition: Any) -> None:
    """Oracle: the literal increment, with the rates of the units; and the metrics, each by its definition."""
    torch.manual_seed(0)
    options = {"t_invert": [2.0], "lr": [0.03], "radius": 1.0, "normalise": False, "competition": competition}
    rule, batch = rule_of(dense_network(), DENSE, **options), batch_of((12,))
    before = rule.layers["b1"].weight.detach().clone()
    before[:3] = F.normalize(before[:3], dim=1) * torch.tensor([[0.96], [1.04], [1.06]], dtype=torch.float64)
    with torch.no_grad():
        rule.layers["b1"].weight.copy_(before)
    inputs = list(batch.inputs)
    increment = softhebb_increment(inputs, before, 2.0, True) if competition == "soft" else hard_increment(inputs, before)
    norms = before.norm(dim=1)
    expected = before + 0.03 * ((norms - 1).abs() ** 0.5 + 1e-10)[:, None] * increment / len(batch)
    metrics = one_update(rule, batch)
    torch.testing.assert_close(rule.layers["b1"].weight.detach(), expected, rtol=1e-12, atol=1e-14)
    assert float(metrics["b1/active_units"]) == len((batch.inputs @ before.T).argmax(1).unique())
    near = [0.95 <= float(norm) <= 1.05 for norm in norms]
    assert near[:3] == [True, True, False]
    assert float(metrics["b1/rows_near_unit"]) == pytest.approx(sum(near) / 7)
    assert float(metrics["b1/weight_norm"]) == pytest.approx(float(norms.mean()))


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


def test_the_second_step_takes_the_rates_of_its_own_norms() -> None:
    """Fused optimisers do not tell that they wrote to a weight. Oracle: the literal step, twice."""
    torch.manual_seed(0)
    rule = rule_of(dense_network(), DENSE, t_invert=[2.0], lr=[0.5], radius=2.0)
    batch = batch_of((12,))
    expected = rule.layers["b1"].weight.detach().clone()
    for _ in range(2):
        expected = softhebb_step(softhebb_increment(list(batch.inputs), expected, 2.0, True), expected, 0.5, 0.5)
        metrics = one_update(rule, batch)
    torch.testing.assert_close(rule.layers["b1"].weight.detach(), expected, rtol=1e-11, atol=1e-13)
    assert float(metrics["b1/weight_norm"]) != pytest.approx(float(rule.layers["b1"].norms().mean()), rel=1e-3), "before, not after"


# --- what training with it does ---------------------------------------------------------------------------------------


def trained(words: list[str], observers: tuple[Any, ...] = ()) -> tuple[Run, Trainer]:
    recipe = resolve(parse_words(["rule=softhebb", "device=cpu", "threads=1", *words]))
    task = recipe.build_task()
    trainer = Trainer(recipe.build_rule(task.spec), task, recipe.settings, observers=observers)
    return trainer.fit(), trainer


def test_rows_come_to_unit_length() -> None:
    """The issue's probe: without anti-Hebbian losers and from norms near 1, at least 90 % of the rows end within 5 % of it."""
    words = ["rule.anti_hebbian=false", "rule.radius=1", "rule.t_invert=[1]", "rule.lr=[0.1]", "network.inputs=normalised"]
    run, trainer = trained([*words, "budget.epochs=30"])
    norms = trainer.rule.layers["b1"].norms()  # type: ignore[union-attr, operator]
    assert float(((norms - 1).abs() <= 0.05).float().mean()) >= 0.9
    first = run.history[0]
    assert first["rule/b1/weight_norm"] != pytest.approx(1, abs=0.002), "nothing to see: they began where they end"
    assert 1 <= first["rule/b1/active_units"] <= 16


def test_features_are_learned_without_labels_and_without_reverse_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: other labels, the same features; a reverse-mode call in the features phase would raise."""
    kept = []
    backward = torch.autograd.backward
    phases: list[str] = []

    class Watch:
        @hookimpl
        def phase_start(self, run: Run, phase: Phase) -> None:
            phases.append(phase.name)

    def watched(*arguments: Any, **options: Any) -> None:
        assert phases[-1] == "readout"
        backward(*arguments, **options)

    monkeypatch.setattr(torch.autograd, "backward", watched)
    recipe = resolve(parse_words(["rule=softhebb", "device=cpu", "threads=1", "budget.epochs=4"]))
    task = recipe.build_task()
    for targets in (task.train.targets, task.train.targets.flip(0)):
        other = dataclasses.replace(task, train=Split(task.train.inputs, targets))
        rule = recipe.build_rule(task.spec)
        Trainer(rule, other, recipe.settings, observers=[Watch()]).fit()
        kept.append((rule.layers["b1"].weight.detach(), rule.network.blocks["readout"][-1].weight.detach()))
    assert phases == ["features", "readout"] * 2
    assert torch.equal(kept[0][0], kept[1][0])
    assert not torch.equal(kept[0][1], kept[1][1])


def test_it_beats_its_twin_on_digits() -> None:
    """The claim of the README, in short: 3 seeds, 16 units."""
    gains = []
    for seed in range(3):
        pair = [trained(["budget.epochs=30", f"seed={seed}", *more])[0].result["test/accuracy"] for more in ([], ["twin=true"])]
        gains.append(pair[0] - pair[1])
    assert min(gains) > 0.03


@pytest.mark.parametrize("order", ["simultaneous", "successive"])
@pytest.mark.parametrize("frozen", [False, True])
def test_phases(order: str, frozen: bool) -> None:
    torch.manual_seed(0)
    rule = rule_of(image_network(), IMAGE, order=order, feature_epochs=2)
    measured = rule_of(image_network(), IMAGE, order=order)
    if frozen:
        rule.freeze_features()
        measured.freeze_features()
    phases = list(rule.phases(Budget(epochs=10)))
    *features, readout = phases
    stages = {"simultaneous": [("b1", "b2")], "successive": [("b1",), ("b2",)]}[order]
    assert [phase.groups for phase in features] == ([] if frozen else stages)
    assert all(phase.epochs == 2 and not phase.evaluate for phase in features)
    assert readout.epochs == 10 - 2 * len(stages), "a twin's readout takes as long as the rule's"
    assert readout.on_features
    assert readout.groups == ("readout",)
    seconds = list(measured.phases(Budget(seconds=8.0)))
    assert sum(phase.seconds or 0 for phase in seconds) == pytest.approx(8.0)
    forwards = list(measured.phases(Budget(forwards=800)))
    assert [phase.forwards for phase in forwards] == pytest.approx([100 * (phase.seconds or 0) for phase in seconds])
    assert all(phase.seconds is phase.epochs is None for phase in forwards)
    operations = list(measured.phases(Budget(operations=8e6)))
    assert [phase.groups for phase in operations] == [phase.groups for phase in phases]
    shares = [(phase.operations or 0) / 8e6 for phase in operations]
    assert shares == pytest.approx([1.0] if frozen else [0.5 / len(stages)] * len(stages) + [0.5]), "a twin has the whole budget"
    assert all(phase.seconds is phase.epochs is phase.forwards is None for phase in operations)
    with pytest.raises(UsageError, match="none is left for the readout"):
        rule.phases(Budget(epochs=2 * len(stages)))


def test_successive_blocks_learn_one_after_the_other() -> None:
    moved: list[set[str]] = []
    before: dict[str, Tensor] = {}
    trainers: list[Trainer] = []

    class Watch:
        @hookimpl
        def phase_end(self, run: Run, phase: Phase) -> None:
            now = {name: layer.weight.detach().clone() for name, layer in trainers[0].rule.layers.items()}  # type: ignore[union-attr, operator]
            moved.append({name for name, value in now.items() if not torch.equal(value, before[name])})
            before.update(now)

    recipe = resolve(parse_words(["rule=softhebb", "device=cpu", "budget.epochs=4", "rule.order=successive", "network.widths=[16,12]"]))
    task = recipe.build_task()
    rule = recipe.build_rule(task.spec)
    trainers.append(Trainer(rule, task, recipe.settings, observers=[Watch()]))
    before.update({name: layer.weight.detach().clone() for name, layer in rule.layers.items()})  # type: ignore[union-attr, operator]
    trainers[0].fit()
    assert moved == [{"b1"}, {"b2"}, set()]


def test_a_twins_batch_norms_take_their_statistics_from_the_data() -> None:
    """Oracle: mean and variance of the inputs of each block, computed from all chosen examples at once."""
    words = ["network.widths=[16,12]", "network.norm=batch", "network.inputs=normalised", "device=cpu"]
    recipe = resolve(parse_words(["rule=softhebb", *words]))
    task = recipe.build_task()
    rule = recipe.build_rule(task.spec)
    rule.prepare(task.train, torch.Generator().manual_seed(0))
    assert not any(norm.num_batches_tracked for norm in rule.modules() if isinstance(norm, nn.BatchNorm1d)), "only a twin needs it"
    rule.freeze_features()
    start = {name: layer.weight.detach().clone() for name, layer in rule.layers.items()}  # type: ignore[union-attr, operator]
    rule.prepare(task.train, torch.Generator().manual_seed(0))  # fewer examples than it takes: all of them
    x = task.spec.normalise(task.train.inputs)
    norms = [part for part in rule.modules() if isinstance(part, nn.BatchNorm1d)]
    assert [norm.momentum for norm in norms] == [0.1] * 3
    torch.testing.assert_close(norms[0].running_mean, x.flatten(1).mean(0), rtol=1e-3, atol=2e-2)
    rule.eval()
    with torch.no_grad():
        middle = rule.network.blocks["b1"](x)
    torch.testing.assert_close(norms[1].running_mean, middle.mean(0), rtol=1e-2, atol=2e-2)
    torch.testing.assert_close(norms[1].running_var, middle.var(0), rtol=5e-2, atol=2e-2)
    assert all(torch.equal(layer.weight, start[name]) for name, layer in rule.layers.items())  # type: ignore[union-attr, operator]


# --- networks, presets, refusals --------------------------------------------------------------------------------------


def test_published_networks() -> None:
    """Oracle: the sizes of the papers' layers, counted by hand."""
    with torch.device("meta"):
        cifar = cnn(TaskSpec("c", (3, 32, 32), 10), CNNConfig())
        stl = cnn(TaskSpec("s", (3, 96, 96), 10), CNNConfig(preset="stl10"))
    assert [tuple(shape) for shape in cifar.shapes.values()] == [(96, 16, 16), (384, 8, 8), (1536, 4, 4), (10,)]
    assert sum(p.numel() for p in cifar.parameters()) == 96 * 75 + 384 * 96 * 9 + 1536 * 384 * 9 + 10 * 24576 + 10
    assert [shape[0] for shape in stl.shapes.values()] == [96, 384, 1536, 6144, 10]


def test_the_mnist_preset_is_the_published_one() -> None:
    recipe = resolve(parse_words(["rule=softhebb", "rule.preset=mnist", "task=digits"]))
    network, options = recipe.options["network"], recipe.options["rule"]
    assert (network.widths, network.activation, network.power, network.inputs) == ([2000], "softmax", 5.0, "pixels")
    rule = recipe.build_rule(recipe.spec())
    assert isinstance(rule, SoftHebb)
    assert not rule.anti_hebbian
    assert options.anti_hebbian is None
    assert (rule.power_lr, rule.t_invert, rule.group_options()) == (0.2, {"b1": 12.0}, {"b1": {"lr": 0.045}})
    weight = rule.layers["b1"].weight.detach()
    assert float(weight.min()) >= 0
    assert float(weight.flatten(1).norm(dim=1).mean()) == pytest.approx(35, rel=0.02)


@pytest.mark.parametrize("power", [0.5, 1.0, 1.4])
@pytest.mark.parametrize("kind", ["triangle", "relu", "softmax", "identity"])
def test_activations_and_their_derivatives(kind: Any, power: float) -> None:
    """Oracle: the formulas; the derivative by autograd's numerical check, and none that is no number at zero."""
    u = torch.randn(4, 5, 3, dtype=torch.float64)
    made = Activation(kind, power)(u)
    centred = u - u.mean(1, keepdim=True)
    expected = {
        "triangle": centred.clamp_min(0) ** power,
        "relu": u.clamp_min(0) ** power,
        "softmax": (power * u).exp() / (power * u).exp().sum(1, keepdim=True),
        "identity": u,
    }[kind]
    torch.testing.assert_close(made, expected)
    assert torch.autograd.gradcheck(Activation(kind, power), u.requires_grad_())
    zero = torch.zeros(2, 3, requires_grad=True)
    Activation(kind, power)(zero).sum().backward()
    assert bool(torch.isfinite(zero.grad).all())


def test_refusals() -> None:
    two = nn.Sequential(nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 7))
    with pytest.raises(UsageError, match="one linear map per hidden block, 'b1' has 2"):
        SoftHebb(Network({"b1": two, "readout": nn.Linear(7, 3)}, input_shape=(12,), readout="readout"), DENSE)
    with pytest.raises(UsageError, match="nothing to learn"):
        SoftHebb(Network({"readout": nn.Linear(12, 3)}, input_shape=(12,), readout="readout"), DENSE)
    with pytest.raises(UsageError, match="odd width"):
        cnn(IMAGE, CNNConfig(channels=[4], kernels=[2], pools=["none"]))
    with pytest.raises(UsageError, match="no such pooling"):
        cnn(IMAGE, CNNConfig(channels=[4], kernels=[3], pools=["max2"]))
    with pytest.raises(UsageError, match="needs images"):
        cnn(DENSE)


def test_biases_stay_zero_and_activations_in_place_do_no_harm() -> None:
    """Oracle: the same network without them."""
    results = []
    for bias, inplace in ((True, True), (False, False)):
        torch.manual_seed(0)
        blocks = {"b1": nn.Sequential(nn.Linear(12, 7, bias=bias), nn.ReLU(inplace=inplace)), "readout": nn.Linear(7, 3)}
        network = Network(blocks, input_shape=(12,), readout="readout").double()
        torch.manual_seed(1)
        rule = rule_of(network, DENSE)
        one_update(rule, batch_of((12,)))
        results.append(rule.layers["b1"].weight.detach())
        if bias:
            assert not rule.layers["b1"].linear.bias.any()
    assert torch.equal(*results)


def test_the_plan_says_what_each_layer_does() -> None:
    recipe = resolve(parse_words(["rule=softhebb", "rule.preset=cifar", "network.widths=[16,12]", "network=hebbian-mlp", "task=digits"]))
    rule = recipe.build_rule(recipe.spec())
    lines = rule.plan().splitlines()
    assert lines[0] == "features, without labels (together, in updates of 10 examples):"
    assert lines[1] == "  b1: 16 units of 64 inputs; rate 0.08; inverse temperature 1, losers unlearn; |norm - 1|^0.5"
    assert lines[2] == "  b2: 12 units of 16 inputs; rate 0.005; inverse temperature 0.65, losers unlearn; |norm - 1|^0.5"
    assert lines[3] == "readout, with labels: on 12 features, computed once and kept; halved seven times"
    rule.freeze_features()
    assert "never" in rule.plan().splitlines()[0]


def test_the_rate_reported_is_that_of_the_units() -> None:
    """Oracle: the formula, on norms of 1.25 and 2."""
    rule = rule_of(dense_network(), DENSE, lr=[0.2], power_lr=0.5)
    weight = rule.layers["b1"].weight
    with torch.no_grad():
        weight.div_(weight.norm(dim=1, keepdim=True)).mul_(torch.tensor([1.25] * 3 + [2.0] * 4, dtype=torch.float64)[:, None])
    metrics = one_update(rule, batch_of((12,)))
    assert float(metrics["b1/rate"]) == pytest.approx(0.2 * (3 * 0.5 + 4 * 1.0) / 7)
