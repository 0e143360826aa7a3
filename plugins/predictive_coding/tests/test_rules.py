"""What the rules add to the relaxation: iPC's own steps, batch norm, plans and traits, networks, and whole runs on digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bpfree_predictive_coding.networks import VGGConfig, vgg
from bpfree_predictive_coding.plugin import bpfree_rules
from bpfree_predictive_coding.rules import ZIL, ErrorPC, FixedPrediction, IncrementalPC, PredictiveCoding
from pc_oracles import (
    DEVICE,
    FLAT,
    IMAGE,
    REAL,
    SOFT,
    assert_same,
    batch_of,
    by_the_book,
    credited,
    cross_entropy,
    energies,
    moved,
    network_of,
    predictions,
    rows,
    rule_of,
    squared,
    true_gradients,
)
from torch import Tensor, nn

from bpfree import Batch, Network, OptimizerConfig, Rule, Run, Step, TaskSpec, UsageError, hookimpl, new_step
from bpfree.config import parse_words, resolve
from bpfree.network import VGGConfig as CoreVGGConfig
from bpfree.network import vgg as core_vgg
from bpfree.runner import resume, run
from bpfree.training.trainer import Interrupted, Trainer

RULES = sorted(bpfree_rules())
SHORT = ["task=digits", "device=cpu", "threads=1", "network.name=mlp", "network.depth=2", "network.width=24", "tracking.enabled=false"]


def recipe_of(words: list[str]) -> Any:
    return resolve(parse_words([*SHORT, *words]))


def trainer_of(words: list[str], **options: Any) -> Trainer:
    recipe = recipe_of(words)
    task = recipe.build_task()
    return Trainer(recipe.build_rule(task.spec), task, recipe.settings, **options)


# --- incremental predictive coding ---------------------------------------------------------------------------------------


def literal_ipc(network: Network, batch: Batch, T: int, lr: float, momentum: float, optimizer: torch.optim.Optimizer, top: Any) -> None:
    """At each step autograd's gradients of one energy by states and weights; then both move. The weights' is of the mean."""
    states = [state.clone().requires_grad_() for state in predictions(network, batch.inputs)]
    inference = torch.optim.SGD(states, lr=lr, momentum=momentum)
    parameters = list(network.parameters())
    for _ in range(T):
        energy = sum(energies(network, batch.inputs, states, top))
        found = torch.autograd.grad(energy, [*states, *parameters])  # type: ignore[arg-type]
        for state, gradient in zip(states, found, strict=False):
            state.grad = gradient
        for p, gradient in zip(parameters, found[len(states) :], strict=True):
            p.grad = gradient / len(batch)
        inference.step()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("path", ["auto", "generic"])
@pytest.mark.parametrize("profile_every", [0, 1])
@pytest.mark.parametrize(("kind", "T", "momentum"), [("tanh", 1, 0.0), ("tanh", 5, 0.6), ("residual-mlp", 5, 0.6)])
def test_ipc_moves_states_and_weights_from_the_same_point(kind: str, T: int, momentum: float, profile_every: int, path: str) -> None:
    """Oracle: a literal loop with autograd, SGD with momentum and decay on the weights, over two batches. T optimiser steps for each."""
    ours, other = network_of(kind), network_of(kind)
    rule = rule_of(
        IncrementalPC, network=ours, T=T, state_lr=0.2, state_momentum=momentum, precision=0.7, profile_every=profile_every, path=path
    )
    step = new_step(rule, OptimizerConfig("sgd", lr=0.3, momentum=0.9, weight_decay=0.01))
    exact = torch.optim.SGD(other.parameters(), lr=0.3, momentum=0.9, weight_decay=0.01)
    apply, applied = step.apply, []
    step.apply = lambda *names: (applied.append(names), apply(*names))  # type: ignore[func-returns-value]
    for seed in (1, 2):
        batch = batch_of(seed=seed)
        loss = FLAT.loss(other(batch.inputs), batch).detach()
        literal_ipc(other, batch, T, 0.2, momentum, exact, cross_entropy(rows(batch), 0.7))
        metrics = rule.learn(batch, step)
        step.index += 1
        torch.testing.assert_close(metrics["loss"], loss)
        assert_same({name: p.detach() for name, p in ours.named_parameters()}, {name: p.detach() for name, p in other.named_parameters()})
    assert applied == [()] * 2 * T
    with pytest.raises(UsageError, match="learn"):
        rule.credit(batch, step)


def test_ipc_reaches_one_block_less_than_it_has_steps() -> None:
    """The weights' first gradient is taken before the states have moved. The plan names the blocks that get nothing."""
    for T in (1, 2, 3, 4):
        rule = rule_of(IncrementalPC, T=T, state_lr=0.2)
        change = moved(rule, batch_of())
        still = [
            name for name in rule.network.names if not any(bool(v.any()) for k, v in change.items() if k.startswith(f"blocks.{name}."))
        ]
        assert still == rule.network.names[: 4 - T]
        assert ("get no credit" in rule.plan()) == bool(still)
        assert f"the first {4 - T} get no credit; rule.T=4 reaches all" in rule.plan() or not still


# --- batch norm and dropout ----------------------------------------------------------------------------------------------


def statistics(network: Network) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.named_buffers()}


@pytest.mark.parametrize(
    ("factory", "options"),
    [
        (PredictiveCoding, {"T": 6}),
        (PredictiveCoding, {"T": 6, "init": "zeros"}),
        (PredictiveCoding, {"T": 2, "nudge": "negative", "profile_every": 1}),
        (IncrementalPC, {"T": 5}),
        (FixedPrediction, {"T": 4}),
        (ErrorPC, {"T": 4}),
        (ZIL, {}),
    ],
)
def test_running_statistics_move_once_per_batch(factory: type[Rule], options: dict[str, Any]) -> None:
    """Oracle: those of one forward pass in train mode. The blocks with batch norm go the generic way."""
    network, other, batch = network_of("tanh", norm="batch"), network_of("tanh", norm="batch"), batch_of()
    rule = rule_of(factory, network=network, **options)
    assert "derivatives by autograd within the block: b1, b2, b3" in rule.plan()
    assert "closed form: readout" in rule.plan()
    step = new_step(rule, OptimizerConfig("sgd", lr=0.0))
    for count in (1, 2):
        rule.learn(batch, step)
        other(batch.inputs)
        found, exact = statistics(network), statistics(other)
        assert int(found["blocks.b2.1.num_batches_tracked"]) == count
        for name, value in exact.items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14, msg=name)


def test_batch_norm_normalises_by_the_batch_while_states_relax() -> None:
    """Oracle: by the book, in train mode. With running statistics of the batch's own it would not be the same."""
    network, batch = network_of("tanh", norm="batch"), batch_of()
    _, gradients, _ = by_the_book(network, batch.inputs, cross_entropy(rows(batch)), T=4, lr=0.1)
    assert_same(credited(rule_of(PredictiveCoding, network=network, T=4), batch), gradients)


@pytest.mark.parametrize("T", [1, 7])
def test_the_cores_vgg_with_batch_norm(T: int) -> None:
    """Oracle: by the book for the gradients, one forward pass for the statistics, however large T is."""
    made = []
    for _ in range(3):
        torch.manual_seed(0)
        made.append(core_vgg(IMAGE, CoreVGGConfig(channels=[4, 6], pool_after=[1, 2], norm="batch")).to(DEVICE, torch.float64))
    network, book, once = made
    batch = batch_of(IMAGE)
    rule = rule_of(PredictiveCoding, network=network, spec=IMAGE, T=T)
    _, gradients, _ = by_the_book(book, batch.inputs, cross_entropy(rows(batch, IMAGE)), T=T, lr=0.1)
    found = credited(rule, batch)
    assert_same({name: found.get(name, torch.zeros_like(value)) for name, value in gradients.items()}, gradients)
    once(batch.inputs)
    for name, value in statistics(once).items():
        torch.testing.assert_close(statistics(network)[name], value, rtol=1e-12, atol=1e-14, msg=name)
    assert "derivatives by autograd within the block: b1, b2" in rule.plan()


def test_z_il_with_dropout() -> None:
    """One execution of each block, so one mask. Oracle: autograd under the same random numbers."""
    network, batch = network_of("tanh", dropout=0.4), batch_of()
    torch.manual_seed(5)
    exact = true_gradients(network, lambda scores: FLAT.loss(scores, batch), batch.inputs)
    torch.manual_seed(5)
    assert_same(moved(rule_of(ZIL, network=network), batch), exact)


def test_what_no_instance_takes_is_refused_before_one_is_built() -> None:
    """Since traits and optimiser are known from the options."""
    with pytest.raises(UsageError, match=r"\(own-steps\), so gradients cannot be accumulated"):
        resolve(parse_words(["rule=ipc", "accumulate=2"]))
    with pytest.raises(UsageError, match="unknown option of adam 'momentum'"):
        resolve(parse_words(["rule=predictive-coding", "optimizer.momentum=0.9"]))
    assert resolve(parse_words(["rule=predictive-coding", "accumulate=2"]))


# --- plans, traits, networks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "options", "said", "unsaid"),
    [
        (PredictiveCoding, {"T": 1}, "the first 2 get no credit; rule.T=3 reaches all", ""),
        (PredictiveCoding, {"T": 2}, "the first 1 get no credit", ""),
        (PredictiveCoding, {"T": 3, "state_lr": 0.25}, "3 steps at rate 0.25 over 3 hidden blocks", "get no credit"),
        (FixedPrediction, {"T": 2}, "the first 1 get no credit", ""),
        (FixedPrediction, {}, "20 steps at rate 0.1", "get no credit"),
        (ErrorPC, {"T": 1}, "1 steps at rate 0.1", "get no credit"),
        (ZIL, {"precision": 0.5}, "cross-entropy energy with precision 0.5", "get no credit"),
        (ZIL, {}, "rate 1, from the forward pass", "steps at rate"),
        (PredictiveCoding, {"output": "squared"}, "output: squared energy", ""),
        (PredictiveCoding, {}, "derivatives in closed form: b1, b2, b3, readout", "autograd"),
        (PredictiveCoding, {"path": "generic"}, "derivatives in closed form: none", ""),
    ],
)
def test_the_plan(factory: type[Rule], options: dict[str, Any], said: str, unsaid: str) -> None:
    plan = rule_of(factory, **options).plan()
    assert said in plan
    assert not unsaid or unsaid not in plan


def test_the_plan_is_true() -> None:
    """Blocks that it says get no credit do not, the others do."""
    for T in (1, 2, 3):
        for factory in (PredictiveCoding, FixedPrediction):
            found = credited(rule_of(factory, T=T), batch_of())
            assert {name.split(".")[1] for name in found} == {"b1", "b2", "b3", "readout"} - {f"b{index + 1}" for index in range(3 - T)}
    assert len(credited(rule_of(ErrorPC, T=1), batch_of())) == 8


def test_the_output_follows_the_task() -> None:
    assert rule_of(PredictiveCoding).output_kind == "cross-entropy"
    assert rule_of(PredictiveCoding, spec=REAL).output_kind == "squared"
    assert rule_of(PredictiveCoding, spec=REAL, output="cross-entropy").output_kind == "cross-entropy"


@pytest.mark.parametrize("name", RULES)
def test_how_far_weights_above_matter(name: str) -> None:
    """The declared span of weight transport is what finite changes show: block l's update against block m's weights, values kept."""
    factory, depth = bpfree_rules()[name], 5
    options = {} if name == "z-il" else {"T": 2}
    network, batch = network_of("tanh", depth=depth, width=6), batch_of(count=4)
    rule = rule_of(factory, network=network, **options)
    declared = rule.traits.downstream_weights
    reach = depth if declared == "all" else int(declared)
    before = moved(rule, batch, OptimizerConfig("sgd", lr=1e-3))
    spans = set()
    for above in range(1, depth + 1):
        turned = network_of("tanh", depth=depth, width=6)
        _turn(turned, above, batch)
        with torch.no_grad():
            torch.testing.assert_close(turned(batch.inputs), network(batch.inputs), rtol=1e-9, atol=1e-9)
        after = moved(rule_of(factory, network=turned, **options), batch, OptimizerConfig("sgd", lr=1e-3))
        for block in range(above):
            key = f"blocks.{network.names[block]}.{'0.' if block < depth else ''}weight"
            if float((after[key] - before[key]).norm()) > 1e-7 * float(before[key].norm()) + 1e-18:
                spans.add(above - block)
    assert max(spans) == reach


def _turn(network: Network, index: int, batch: Batch) -> None:
    """Change a block's weights where its inputs have no component: its outputs on this batch stay."""
    with torch.no_grad():
        x = batch.inputs
        for name in network.names[:index]:
            x = network.blocks[name](x)
        layer: Any = network.blocks[network.names[index]]
        layer = layer[0] if isinstance(layer, nn.Sequential) else layer
        rows_of = torch.cat([x, torch.ones_like(x[:, :1])], 1)  # four examples leave a direction of six units and a bias
        null = torch.linalg.svd(rows_of)[2][-1]
        size = torch.randn(len(layer.weight), 1, dtype=x.dtype, device=x.device)
        layer.weight += size * null[:-1]
        layer.bias += size[:, 0] * null[-1]


def test_images_of_pc_vgg() -> None:
    """Shapes of the published networks; what is too small or no image is refused."""
    spec = TaskSpec("cifar", (3, 32, 32), 10)
    shapes = {name: tuple(shape) for name, shape in vgg(spec, VGGConfig(scale=1 / 32)).shapes.items()}
    assert shapes == {"b1": (4, 16, 16), "b2": (8, 8, 8), "b3": (16, 4, 4), "b4": (16, 2, 2), "readout": (10,)}
    network = vgg(spec, VGGConfig("vgg7", scale=1 / 32, activation="tanh"))
    shapes = {name: tuple(shape) for name, shape in network.shapes.items()}
    assert shapes == {
        "b1": (4, 16, 16),
        "b2": (4, 16, 16),
        "b3": (8, 8, 8),
        "b4": (8, 6, 6),
        "b5": (16, 3, 3),
        "b6": (16, 1, 1),
        "readout": (10,),
    }
    assert [type(layer).__name__ for layer in network.blocks["b1"]] == ["Conv2d", "Tanh", "MaxPool2d"]
    assert [type(layer).__name__ for layer in network.blocks["b2"]] == ["Conv2d", "Tanh"]
    with pytest.raises(UsageError, match="too small for vgg7"):
        vgg(TaskSpec("small", (1, 16, 16), 10), VGGConfig("vgg7"))
    with pytest.raises(UsageError, match="needs images"):
        vgg(FLAT)


def test_the_network_that_rules_take() -> None:
    config = PredictiveCoding.Config
    image, grey = TaskSpec("image", (3, 32, 32), 10), TaskSpec("grey", (1, 28, 28), 10)
    assert PredictiveCoding.network_options(image, config())["name"] == "pc-vgg"
    assert PredictiveCoding.network_options(grey, config()) == {"name": "mlp"}
    assert PredictiveCoding.network_options(image, config(scaling="mupc")) == {"name": "residual-mlp"}
    assert ZIL.network_options(FLAT, ZIL.Config())["name"] == "mlp"


def test_the_residual_network() -> None:
    """Nonlinearities in front of maps, shortcuts around all but the first and the last."""
    network = network_of("residual-mlp", IMAGE, depth=4, width=5)
    x = batch_of(IMAGE).inputs
    first, second, third, last = (
        next(m for m in network.blocks[name].modules() if isinstance(m, nn.Linear)) for name in ("b1", "b2", "b3", "readout")
    )
    h = first(x.flatten(1))
    h = h + second(h.tanh())
    h = h + third(h.tanh())
    torch.testing.assert_close(network(x), last(h.tanh()))
    plain = network_of("residual-mlp", IMAGE, depth=4, width=5, skip=False)
    assert len(list(plain.named_parameters())) == len(list(network.named_parameters())) == 8
    assert len(network_of("residual-mlp", depth=2).names) == 2


# --- whole runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_every_rule_learns_digits_and_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Well above chance after two epochs. Oracle for the run that was stopped in its second epoch: the one that was not."""
    words = [f"rule={name}", "budget.epochs=2", "batch_size=100", *(["optimizer.lr=0.005"] if name != "ipc" else [])]
    whole = trainer_of(words)
    result = whole.fit().result
    assert result["test/accuracy"] > 0.3

    class Stop:
        @hookimpl
        def step_end(self, run: Run, step: Step) -> None:
            if step.index == 20:
                stopped.stop()

    stopped = trainer_of(words, observers=[Stop()], folder=tmp_path)
    with pytest.raises(Interrupted):
        stopped.fit()
    resumed = trainer_of(words, folder=tmp_path)
    assert resumed.fit(tmp_path / "checkpoints" / "last.pt").result["test/loss"] == result["test/loss"]
    for key, value in whole.rule.state_dict().items():
        assert torch.equal(value, resumed.rule.state_dict()[key]), key


@pytest.mark.parametrize("name", RULES)
def test_twins_keep_their_features(name: str) -> None:
    """Oracle: the weights before; the readout alone moves, also with batch norm."""
    trainer = trainer_of([f"rule={name}", "budget.epochs=1", "twin=true", "network.norm=batch"])
    before = {key: p.detach().clone() for key, p in trainer.rule.network.named_parameters()}
    trainer.fit()
    moved = {key for key, p in trainer.rule.network.named_parameters() if not torch.equal(p, before[key])}
    assert moved == {"blocks.readout.weight", "blocks.readout.bias"}


@pytest.mark.parametrize("name", RULES)
def test_alignment_with_back_propagation(name: str) -> None:
    """Exact for z-il, finite for all; measuring it leaves the run as it is. Oracle: the run without it."""
    words = [f"rule={name}", "budget.epochs=1"]
    watched, plain = trainer_of([*words, "alignment.every=5"]), trainer_of(words)
    history = watched.fit().history[-1]
    found = {key: value for key, value in history.items() if key.startswith("alignment/") and key.endswith("/cosine")}
    assert {key.split("/")[1] for key in found} >= {"readout", "b2"}
    assert all(abs(value) <= 1 + 1e-5 for value in found.values())
    if name == "z-il":
        assert found == pytest.approx(dict.fromkeys(found, 1.0), abs=1e-5)
        assert history["alignment/b1/norm_ratio"] == pytest.approx(1, abs=1e-4)
    plain.fit()
    for key, value in plain.rule.state_dict().items():
        assert torch.equal(value, watched.rule.state_dict()[key]), key


@pytest.mark.parametrize("name", RULES)
def test_half_precision_learns_nearly_the_same(name: str) -> None:
    """Oracle: single precision; the direction of each update."""
    recipe, made = recipe_of([f"rule={name}"]), []
    task = recipe.build_task()
    batch = Batch(task.spec.normalise(task.train.inputs[:200]), task.train.targets[:200])
    for precise in (True, False):
        rule = recipe.build_rule(task.spec)
        rule.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            made.append(moved(rule, batch, OptimizerConfig("sgd", lr=0.05)))  # ipc steps far at larger rates
    for key, value in made[0].items():
        assert made[1][key].dtype == torch.float32
        assert float(torch.cosine_similarity(value.flatten(), made[1][key].flatten(), 0)) > 0.95, key


@pytest.mark.parametrize("name", RULES)
def test_without_hidden_blocks_it_is_the_linear_classifier(name: str) -> None:
    """Oracle: the gradient of the readout by autograd (iPC: T steps of it)."""
    network, batch, other = network_of("tanh", depth=0), batch_of(), network_of("tanh", depth=0)
    options = {} if name == "z-il" else {"T": 3, "profile_every": 1}
    rule = rule_of(bpfree_rules()[name], network=network, **options)
    change = moved(rule, batch)
    exact = torch.optim.SGD(other.parameters(), lr=1.0)
    before = {key: p.detach().clone() for key, p in other.named_parameters()}
    for _ in range(3 if name == "ipc" else 1):
        exact.zero_grad()
        FLAT.loss(other(batch.inputs), batch).backward()
        exact.step()
    assert_same(change, {key: before[key] - p.detach() for key, p in other.named_parameters()})


@pytest.mark.parametrize("name", RULES)
def test_blocks_without_parameters(name: str) -> None:
    """They have a state but nothing to learn. Oracle for z-il and fixed-prediction: back-propagation; for all, that the rest moves."""
    torch.manual_seed(0)
    blocks = {"b1": nn.Linear(6, 5), "b2": nn.Tanh(), "b3": nn.Linear(5, 5), "b4": nn.Softplus(), "readout": nn.Linear(5, 3)}
    network, batch = Network(blocks, input_shape=(6,), readout="readout").to(DEVICE, torch.float64), batch_of()
    options = {} if name == "z-il" else {"T": 5, "state_lr": 1.0 if name == "fixed-prediction" else 0.1}
    change = moved(rule_of(bpfree_rules()[name], network=network, **options), batch, OptimizerConfig("sgd", lr=1.0))
    exact = true_gradients(network, lambda scores: FLAT.loss(scores, batch), batch.inputs)
    if name in ("z-il", "fixed-prediction"):
        assert_same(change, exact)
    assert all(bool(value.any()) for value in change.values())


def test_soft_targets_keep_their_precision_under_autocast() -> None:
    """Oracle: the batch's targets, bit for bit."""
    rule, batch = rule_of(PredictiveCoding, spec=SOFT), batch_of(SOFT)
    rule.float()
    single = Batch(batch.inputs.float(), batch.targets.float())  # type: ignore[union-attr]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        relaxation, _ = rule.relax(single, new_step(rule))
    assert relaxation.scores.dtype == torch.bfloat16
    assert torch.equal(relaxation.output.target, single.targets)


def test_a_network_without_readout_is_refused() -> None:
    network = Network({"b1": nn.Linear(6, 3)}, input_shape=(6,))
    for factory in bpfree_rules().values():
        with pytest.raises(UsageError, match="readout"):
            factory(network, FLAT)


def test_real_targets_of_a_run() -> None:
    """Squared errors fall on a linear task, whichever rule."""
    torch.manual_seed(0)
    truth = torch.randn(6, 3, dtype=torch.float64)
    x = torch.randn(64, 6, dtype=torch.float64)
    batch = Batch(x.to(DEVICE), (x @ truth).to(DEVICE))
    for name, factory in bpfree_rules().items():
        rule = rule_of(factory, spec=REAL)
        step = new_step(rule, OptimizerConfig("adam", lr=0.02))
        losses = []
        for _ in range(20):
            losses.append(float(rule.learn(batch, step)["loss"]))
            step.index += 1
        torch.testing.assert_close(losses[0], float(squared(rows(batch, REAL))(network_of("tanh", REAL)(batch.inputs)).detach()) / 64)
        assert losses[-1] < 0.8 * losses[0], name


def test_a_run_from_the_command_lines_recipe(tmp_path: Path) -> None:
    """The plan, the energies and their plot lie in the run's folder, also after it continued for longer."""
    words = ["rule=predictive-coding", "rule.T=3", "rule.profile_every=10", "budget.epochs=1", f"output={tmp_path}"]
    made = run(recipe_of(words), quiet=True)
    assert made.folder is not None
    assert "over 2 hidden blocks" in (made.folder / "plan.txt").read_text()
    for expected in (["1"], ["1", "2"]):
        content = json.loads((made.folder / "relaxation.json").read_text())
        assert content["blocks"] == ["b1", "b2", "readout"]
        assert list(content["energy"]) == expected
        for table in content["energy"].values():
            assert [len(row) for row in table] == [3] * 4
            assert table[0][:2] == [0, 0]
            assert table[0][2] > 0
            assert all(value > 0 for value in table[3])
        assert {"relaxation.json", "plots/relaxation.svg"} <= made.artifacts.keys()
        assert all(path.stat().st_size > 100 for path in made.artifacts.values())
        metrics = made.history[-1]
        assert 0 < metrics["rule/equilibrium_distance"] < 1.5
        assert {"rule/b1/energy", "rule/b2/energy", "rule/readout/energy", "rule/loss"} <= metrics.keys()
        assert not list(made.folder.glob("*.partial"))
        if expected == ["1"]:
            made = resume(str(made.folder), changes=parse_words(["budget.epochs=2"]), quiet=True)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("rule.beta=0.5", "rule.beta=0.5 does nothing with rule.nudge=none"),
        ("rule.beta_ramp=0.5", "rule.beta_ramp=0.5 does nothing with rule.nudge=none"),
        ("rule.nudge=positive rule.beta=1 rule.beta_ramp=0.5", "rule.beta_ramp=0.5 does nothing with rule.beta=1.0"),
    ],
)
def test_an_option_that_another_makes_meaningless_is_refused(words: str, reason: str) -> None:
    """Oracle: where the rule's code branches, written out by hand."""
    with pytest.raises(UsageError) as caught:
        resolve(parse_words(["rule=predictive-coding", *words.split()]))
    assert reason in str(caught.value)
