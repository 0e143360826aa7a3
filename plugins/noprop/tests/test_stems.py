"""Blocks that see the input through any model: own stems, a shared one, a frozen one; names, weights, locality."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bpfree_noprop import NoPropDT, NoPropDTConfig, noprop_network
from bpfree_noprop.backprop import NoPropBackprop
from bpfree_noprop.ct import NoPropCT, NoPropCTConfig
from bpfree_noprop.fm import NoPropFM, NoPropFMConfig
from bpfree_noprop.stem_sources import headless
from bpfree_noprop.stems import Stem, StemNetwork
from bpfree_noprop.weights import load_given
from torch import Tensor, nn

import bpfree
from bpfree.config import allowing, parse_words, resolve
from bpfree.errors import UsageError
from bpfree.network.split import split
from bpfree.step import Batch, Budget
from bpfree.tasks.task import Task, TaskSpec
from bpfree.training.stepper import new_step

T = 3
OWN = """
import torch
from torch import nn

class Own(nn.Module):
    def __init__(self, outputs, width: int = 8):
        super().__init__()
        self.body, self.head = nn.Linear(64, width), nn.Linear(width, outputs)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x.flatten(1))))
"""


class Own(nn.Module):
    """A small convnet with a classifier, a batch norm and torch's own dropout."""

    def __init__(self, outputs: int, width: int = 6) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.Dropout(0.2)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.relu(self.norm(self.conv(x))).mean((2, 3))))


class Plain(nn.Module):
    """Features (N, 5, 6, 6) without randomness or statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(x))


Make = Callable[..., NoPropDT]


@pytest.fixture
def make(device: torch.device, spec: TaskSpec) -> Make:
    def make(stem: Any = Own, spec: TaskSpec = spec, rule: dict[str, Any] | None = None, **options: Any) -> NoPropDT:
        torch.manual_seed(0)
        network = noprop_network(spec, stem, **{"blocks": T, "width": 8, **options})
        return NoPropDT(network, spec, NoPropDTConfig(T=T, **(rule or {}))).to(device)

    return make


@pytest.fixture(scope="module")
def task() -> Task:
    return bpfree.load_task("digits")


def credited(rule: NoPropDT, batch: Batch) -> dict[str, Tensor]:
    rule.train()
    rule.zero_grad(set_to_none=True)
    rule.credit(batch, new_step(rule, seed=3))
    return {name: p.grad.clone() for name, p in rule.named_parameters() if p.grad is not None}


def predicted(rule: NoPropDT, inputs: Any) -> Tensor:
    rule.eval()
    with torch.no_grad():
        return rule.predict(inputs, torch.Generator().manual_seed(5))


def fitted(rule: NoPropDT, task: Task, epochs: int = 1, **settings: Any) -> bpfree.Run:
    config = bpfree.TrainConfig(budget=bpfree.BudgetConfig(epochs=epochs), device="cpu", **settings)
    return bpfree.Trainer(rule, task, config).fit()


# --- what a stem is -----------------------------------------------------------------------------------------------------


def test_a_module_of_ones_own_in_five_lines(task: Task) -> None:
    # Oracle: two passes teach it most digits; the number of blocks is said once.
    torch.manual_seed(0)
    network = noprop_network(task.spec, stem=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU()), blocks=2)
    rule = NoPropDT(network, task.spec)
    assert rule.config.T == 2
    assert fitted(rule, task, epochs=2, batch_size=32).result["test/accuracy"] > 0.7


def test_a_classifier_is_cut_off_and_nothing_else(spec: TaskSpec) -> None:
    module = Own(spec.outputs).eval()
    x = torch.randn(3, 1, 6, 6)
    cut = headless(module, "own", spec)
    torch.testing.assert_close(module.head(cut.body.eval()(x)), module(x))
    assert cut.cut == "head"
    assert isinstance(module.head, nn.Linear)  # of the module itself nothing was changed
    assert headless(Own(7), "own", spec).cut == ""  # it makes seven features, not the task's four scores


def test_features_are_means_over_places_or_flat(spec: TaskSpec) -> None:
    x = torch.randn(3, 1, 6, 6)
    body = Plain()
    torch.testing.assert_close(Stem(body, "", spec, pool="mean")(x), body(x).mean((2, 3)))
    torch.testing.assert_close(Stem(body, "", spec, pool="flatten")(x), body(x).flatten(1))
    sequence = TaskSpec("sequence", (4, 3), 2)
    assert Stem(nn.Linear(3, 9), "", sequence, pool="mean").size == 9
    resized = Stem(body, "", spec, pool="flatten", image_size=12)
    assert resized.size == 5 * 12 * 12
    means = body(x).unflatten(3, (2, 3)).unflatten(2, (2, 3)).mean((3, 5))  # of 3 x 3 places
    torch.testing.assert_close(Stem(body, "", spec, pool="flatten", places=2)(x), means.flatten(1))


def test_each_block_has_a_stem_of_its_own(make: Make, batch: Batch) -> None:
    # Oracle: another block's stem changes no gradient of a block; weights of two stems differ from the start.
    rule = make()
    before = credited(rule, batch)
    with torch.no_grad():
        for p in rule.network.blocks["t2"].stem.parameters():
            p.add_(0.1)
    after = credited(rule, batch)
    changed = {name.split(".")[2] for name in before if name.startswith("network.blocks") and not torch.equal(before[name], after[name])}
    assert changed == {"t2"}
    assert rule.traits.dependence == "independent"
    assert not torch.equal(rule.network.blocks["t1"].stem[0].body.conv.weight, rule.network.blocks["t2"].stem[0].body.conv.weight)


def test_a_maker_that_returns_the_same_module_each_time(spec: TaskSpec) -> None:
    # Oracle: no parameter is in two blocks, whether the module is plain or a network.
    for module in (Own(4), bpfree.mlp(spec)):
        network = noprop_network(spec, lambda module=module: module, blocks=2, width=8)
        members = [{id(p) for p in block.parameters()} for block in network.blocks.values()]
        assert not members[0] & members[1]


def test_a_list_has_a_stem_for_each_block(make: Make, batch: Batch) -> None:
    rule = make([Own, Plain, "mlp"], options={})
    assert [block.stem[0].size for block in rule.network.blocks.values()] == [6, 5, 128]
    assert {name.split(".")[2] for name in credited(rule, batch) if "blocks.t" in name} == {"t1", "t2", "t3"}
    assert len(noprop_network(rule.spec, [Own, Plain]).blocks) == 2
    with pytest.raises(UsageError, match="2 stems for 3 blocks"):
        make([Own, Plain])
    with pytest.raises(UsageError, match="cannot share several"):
        make([Own, Plain, Own], shared=True)


def test_dropout_of_a_stem_is_keyed(make: Make, batch: Batch) -> None:
    # Oracle: other draws of torch's global generator, which change the masks of nn.Dropout, change nothing here.
    for shared in (False, True):
        rule = make(shared=shared)
        torch.manual_seed(1)
        first = credited(rule, batch)
        torch.manual_seed(2)
        again = credited(rule, batch)
        assert all(torch.equal(first[name], again[name]) for name in first)
        frozen_masks = {name: value for name, value in first.items() if "conv" in name}
        for part in rule.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        without = credited(rule, batch)
        assert any(not torch.equal(value, without[name]) for name, value in frozen_masks.items())


def test_features_of_a_shared_stem_are_dropped_for_each_block_apart(make: Make, batch: Batch) -> None:
    # Oracle: the two masks, drawn again from the blocks' own generators, on the features by hand; none in evaluation.
    rule = make(lambda: nn.Flatten(), shared=True, frozen=True, dropout=0.5)
    seen: dict[str, Tensor] = {}
    for name, block in rule.network.blocks.items():
        block.stem[1].register_forward_hook(lambda layer, args, output, name=name: seen.update({name: args[0].detach()}))
    credited(rule, batch)
    step, x = new_step(rule, seed=3), batch.inputs.flatten(1)
    for name in rule.network.names:
        kept = torch.empty_like(x).uniform_(generator=step.generator_for(f"{name}/dropout")) >= 0.5
        torch.testing.assert_close(seen[name], 2 * kept * x)
    assert not torch.equal(seen["t1"], seen["t2"])
    predicted(rule, batch.inputs)
    assert torch.equal(seen["t1"], x)


def test_prototypes_go_through_a_stem_of_their_own(make: Make, spec: TaskSpec, batch: Batch) -> None:
    rule = make(Plain, rule={"embedding": "prototype"}, state_dim=spec.input_size, label="input")
    found = credited(rule, batch)
    assert {"network.blocks.t1.label.1.body.conv.weight", "network.blocks.t1.stem.0.body.conv.weight"} <= found.keys()
    with pytest.raises(UsageError, match="shared"):
        make(Plain, rule={"embedding": "prototype"}, state_dim=spec.input_size, label="input", shared=True)


def test_tokens(batch: Batch) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.embedding(x)

    spec = TaskSpec("words", (7,), 4, vocabulary=9)
    for shared in (False, True):
        rule = NoPropDT(noprop_network(spec, Words, blocks=T, width=8, shared=shared), spec)
        tokens = spec.example(16)
        before = copy.deepcopy(rule.state_dict())
        new = new_step(rule)
        rule.learn(Batch(tokens, batch.targets.cpu()), new)
        moved = [name for name, value in rule.state_dict().items() if not torch.equal(value, before[name])]
        assert sum("embedding" in name for name in moved) == (1 if shared else T)
        assert predicted(rule, tokens).shape == (16, 4)
    config = NoPropDTConfig(T=T)
    with pytest.raises(UsageError, match=r"network\.stem"):
        bpfree.build_network(spec=spec, **NoPropDT.network_options(spec, config))


# --- a stem that blocks share -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["loop", "stacked"])
def test_a_shared_stem_learns_from_every_block(execution: str, make: Make, batch: Batch) -> None:
    # Oracle: autograd's gradient of the sum of the blocks' losses, through one execution of the stem.
    rule = make(Plain, shared=True, rule={"execution": execution}).double()
    batch = Batch(batch.inputs.double(), batch.targets)
    stem = rule.network.stem
    found = credited(rule, batch)
    rule.zero_grad(set_to_none=True)
    step, rows = new_step(rule, seed=3), rule.rows(batch)
    features = stem(batch.inputs)
    sum(rule.block_loss(t, features, rows, step, share=1 / T) for t in range(1, T + 1)).backward()
    for name, p in rule.named_parameters():
        if "head" not in name:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-9, atol=1e-12)


def test_a_shared_stem_that_learns_is_declared(make: Make) -> None:
    rule = make(shared=True)
    assert rule.shared_groups == ("stem",)
    assert (rule.traits.dependence, rule.traits.downstream_weights, rule.traits.reverse_span) == ("all", "all", 1)
    assert {id(p) for p in rule.groups()["stem"]} == {id(p) for p in rule.network.stem.parameters()}
    assert "from each other's weights" in rule.plan()
    phases = list(make(shared=True, rule={"updates": "sequential"}).phases(Budget(epochs=1)))
    assert [phase.groups for phase in phases] == [(f"t{t}", "head", "stem") for t in (1, 2, 3)]


def test_a_frozen_stem_gets_nothing_and_couples_nothing(make: Make, batch: Batch) -> None:
    # Oracle: values and statistics; the traits of plain blocks.
    rule = make(shared=True, frozen=True)
    before = copy.deepcopy(rule.network.stem.state_dict())
    step = new_step(rule)
    rule.train()
    for step.index in range(3):
        rule.learn(batch, step)
    after = rule.network.stem.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert "stem" not in rule.groups()
    assert rule.shared_groups == ()
    assert rule.traits == make().traits
    assert "blocks stay independent" in rule.plan()


@pytest.mark.parametrize("updates", ["simultaneous", "sequential"])
def test_frozen_features_are_computed_once(updates: Any, task: Task) -> None:
    # Oracle: the number of passes through the stem does not grow with the epochs, and what is learned is what is learned without keeping.
    passes: list[int] = []
    weights = []
    for keep, epochs in ((True, 1), (True, 3), (False, 3)):
        torch.manual_seed(0)
        network = noprop_network(task.spec, Own, blocks=2, width=16, shared=True, frozen=True, keep=keep)
        rule = NoPropDT(network, task.spec, NoPropDTConfig(T=2, updates=updates))
        seen: list[int] = []
        rule.network.stem.register_forward_hook(lambda stem, args, output, seen=seen: seen.append(len(output)))
        fitted(rule, task, epochs)
        passes.append(sum(seen))
        weights.append(rule.network.blocks["t1"].stem[0].weight.detach().clone())
    assert passes[0] == passes[1] < passes[2] - 2 * len(task.train)
    torch.testing.assert_close(weights[1], weights[2], rtol=1e-2, atol=1e-3)


def test_predictions_from_features_are_those_from_inputs(make: Make, batch: Batch) -> None:
    rule = make(shared=True, frozen=True)
    scores = predicted(rule, batch.inputs)
    with torch.no_grad():
        assert torch.equal(scores, rule.read(rule.features(batch.inputs), torch.Generator()))


def test_the_papers_back_propagation_reaches_a_shared_stem(spec: TaskSpec, batch: Batch) -> None:
    rule = NoPropBackprop(noprop_network(spec, Plain, blocks=2, width=8, shared=True), spec)
    cpu = Batch(batch.inputs.cpu(), batch.targets.cpu())
    assert rule.learn(cpu, new_step(rule))["loss"] > 0
    assert predicted(rule, cpu.inputs).shape == (16, 4)


def test_the_twin_keeps_a_shared_stem(make: Make) -> None:
    rule = make(shared=True)
    rule.freeze_features()
    assert not any(p.requires_grad for p in rule.network.stem.parameters())


# --- weights and names --------------------------------------------------------------------------------------------------


def test_weights_of_a_model_fill_its_blocks(tmp_path: Path, spec: TaskSpec) -> None:
    """Of the model itself, and of the blocks that it was cut into, whose parts have other names."""
    torch.manual_seed(1)
    model, x = Own(spec.outputs).eval(), torch.randn(3, 1, 6, 6)
    torch.save({"state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}}, tmp_path / "w.pt")
    for body in (headless(Own(spec.outputs), "own", spec).body, split(Own(spec.outputs), (1, 6, 6)).without_readout()):
        load_given(body, tmp_path / "w.pt")
        torch.testing.assert_close(model.head(body.eval()(x)), model(x))
    network = noprop_network(spec, Own, blocks=2, shared=True, weights=tmp_path / "w.pt")
    assert network.stem is not None
    assert network.stem.frozen
    torch.testing.assert_close(model.head(network.stem(x)), model(x))


def test_weights_of_a_layer_that_holds_one_block(tmp_path: Path) -> None:
    """Its name lacks the block's place in the layer."""

    class Layered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layer1 = nn.Linear(3, 4), nn.Sequential(nn.Sequential(nn.Tanh(), nn.Linear(4, 4)))
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer1(self.first(x)))

    model, x = Layered(), torch.randn(5, 3)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    body = split(Layered(), (3,), at=["layer1", "head"]).without_readout()
    load_given(body, tmp_path / "w.pt")
    torch.testing.assert_close(model.head(body(x)), model(x))


def test_weights_that_do_not_fit_are_refused(tmp_path: Path, spec: TaskSpec) -> None:
    colours = nn.Sequential(nn.Conv2d(3, 5, 3))
    torch.save(colours.state_dict(), tmp_path / "w.pt")
    grey = nn.Sequential(nn.Conv2d(1, 5, 3))
    load_given(grey, tmp_path / "w.pt")
    torch.testing.assert_close(grey[0].weight, colours[0].weight.sum(1, keepdim=True))
    with pytest.raises(UsageError, match="no weights for 1"):
        load_given(nn.Sequential(nn.Conv2d(3, 5, 3), nn.Linear(5, 5)), tmp_path / "w.pt")
    with pytest.raises(UsageError, match="shape"):
        load_given(nn.Sequential(nn.Conv2d(3, 4, 3)), tmp_path / "w.pt")
    (tmp_path / "bad.pt").write_bytes(b"no weights")
    with pytest.raises(UsageError, match="read safely"):
        load_given(grey, tmp_path / "bad.pt")
    with pytest.raises(UsageError, match="no such file"):
        noprop_network(spec, Own, weights=tmp_path / "none.pt")


def test_training_refuses_weights_that_are_missing_and_loading_does_not(tmp_path: Path, task: Task) -> None:
    words = ["rule=noprop-dt", "rule.T=1", "network=noprop", "network.stem=mlp", "network.weights=gone.pt"]
    rule = resolve(parse_words(words)).build_rule(task.spec)
    with pytest.raises(UsageError, match="no such file"):
        rule.prepare(task.train, torch.Generator())


def test_a_stem_in_a_file_and_one_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: Task) -> None:
    """Code is executed where it is named, recorded with its hash, and loaded again; the run of another rule is a frozen stem."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    common = ["rule=noprop-dt", "rule.T=2", "network=noprop", "network.options={width: 5}"]
    leaves = parse_words([*common, "network.stem=[own.py:Own, own.py:Own]"])
    with pytest.raises(UsageError, match="only if the command line names it"):
        resolve(leaves)
    recipe = resolve(leaves, allowing(leaves))
    stems = recipe.to_dict()["network"]["stem"]
    assert all(stem.startswith(f"{tmp_path}/own.py@") for stem in stems)
    assert str(tmp_path) not in str(recipe.flat())  # which identifies a study's cell, with the hash
    assert recipe.flat()["network.stem"] == [stem.removeprefix(f"{tmp_path}/") for stem in stems]
    assert [file.path.name for file in recipe.code_files()] == ["own.py"]
    torch.manual_seed(0)
    rule = recipe.build_rule(task.spec)
    assert [block.stem[0].size for block in rule.network.blocks.values()] == [5, 5]
    again = resolve(recipe.to_dict(), recipe.registry)
    assert again.options["network"].stem == recipe.options["network"].stem
    folder = tmp_path / "runs" / "first"
    config = bpfree.TrainConfig(budget=bpfree.BudgetConfig(epochs=1), device="cpu")
    bpfree.Trainer(rule, task, config, folder=folder, recipe=recipe).fit()
    with pytest.raises(UsageError, match="only if the command line names it"):
        bpfree.load(folder)
    saved = bpfree.load(folder, allow_code=["own.py"])
    x = task.spec.normalise(task.test.inputs)
    torch.testing.assert_close(predicted(saved.rule, x), predicted(rule, x))
    leaves = parse_words(["rule=noprop-dt", "rule.T=2", "network=noprop", "network.stem=run:first", "network.shared=true"])
    second = resolve(leaves, allowing(files=["own.py"])).build_rule(task.spec)
    assert second.network.stem.frozen
    with torch.no_grad():
        torch.testing.assert_close(second.network.stem(x), saved.rule.features(x))


def test_a_run_on_inputs_that_were_normalised_otherwise(tmp_path: Path, task: Task) -> None:
    # Oracle: the trained network on raw inputs, normalised as it was trained.
    words = parse_words(["rule=backprop", "network=mlp", "network.depth=1"])
    recipe = resolve(words)
    rule = recipe.build_rule(task.spec)
    config = bpfree.TrainConfig(budget=bpfree.BudgetConfig(epochs=1), device="cpu")
    bpfree.Trainer(rule, task, config, folder=tmp_path / "run", recipe=recipe).fit()
    other = replace(task.spec, mean=(0.3,), std=(0.7,))
    stem = noprop_network(other, f"run:{tmp_path / 'run'}", blocks=2, shared=True).stem
    raw = task.test.inputs[:9]
    with torch.no_grad():
        wanted = rule.eval().network.features(task.spec.normalise(raw))
        torch.testing.assert_close(stem(other.normalise(raw)), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="inputs of shape"):
        noprop_network(replace(task.spec, input_shape=(1, 9, 9)), f"run:{tmp_path / 'run'}")


@pytest.mark.parametrize(("kind", "config"), [(NoPropCT, NoPropCTConfig), (NoPropFM, NoPropFMConfig)])
def test_continuous_time_takes_any_module(kind: Any, config: Any, spec: TaskSpec, batch: Batch) -> None:
    """Oracle: the block's stem learns, or is frozen; the rule is what it is on its own networks."""
    batch = Batch(batch.inputs.cpu(), batch.targets.cpu())
    for frozen in (None, True):
        network = bpfree.build_network("noprop-timed", spec, stem=Own, width=8, frozen=frozen)
        rule = kind(network, spec, config(steps=2))
        before = copy.deepcopy(network.blocks["block"].stem[0].state_dict())
        rule.train()
        step = new_step(rule)
        for step.index in range(2):
            rule.learn(batch, step)
        after = network.blocks["block"].stem[0].state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before) == bool(frozen)
        assert predicted(rule, batch.inputs).shape == (16, 4)
        assert "Own without head" in rule.plan()
        assert rule.traits.dependence == "independent"
    with pytest.raises(UsageError, match="one stem"):
        bpfree.build_network("noprop-timed", spec, stem=["mlp", "mlp"])
    with pytest.raises(UsageError, match="noprop-timed"):
        kind(bpfree.mlp(spec), spec)


def test_refusals_lead_to_stems(spec: TaskSpec) -> None:
    for network in (Own(4), bpfree.mlp(spec)):
        with pytest.raises(UsageError, match=r"noprop_network\(spec, stem=YourModule"):
            NoPropDT(network, spec)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="cannot take an input of shape"):
        noprop_network(spec, lambda: nn.Linear(3, 3))
    with pytest.raises(UsageError, match="overwrites its input"):
        noprop_network(spec, lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Flatten()))
    with pytest.raises(UsageError, match="no chain"):
        noprop_network(spec, "noprop-mlp")
    with pytest.raises(UsageError, match="unknown network"):
        noprop_network(spec, "none-such")


def test_a_torchvision_stem_is_the_model_without_its_classifier() -> None:
    torchvision = pytest.importorskip("torchvision")
    spec = TaskSpec("colours", (3, 16, 16), 5)
    torch.manual_seed(0)
    network = noprop_network(spec, "torchvision:resnet18", blocks=1, options={"options": {"width_per_group": 64}})
    stem = network.blocks["t1"].stem[0]
    assert stem.size == 512
    assert isinstance(network, StemNetwork)
    model = torchvision.models.resnet18(num_classes=5)
    assert sum(p.numel() for p in stem.parameters()) == sum(
        p.numel() for name, p in model.named_parameters() if not name.startswith("fc")
    ) - 64 * 3 * (49 - 9)  # images below 64 pixels begin with a smaller convolution
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert F.relu(stem.eval()(x)).shape == (2, 512)
