"""Plugins that are written for interface 1. Oracles: their twins in the words of interface 2, and the table in docs/from-1-to-2.md."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

import bpfree
from bpfree import Network, OptimizerConfig, Rule, Traits, always, interface_v1
from bpfree.baselines import DFA, Backprop
from bpfree.cli.main import cli
from bpfree.config import parse_words, resolve
from bpfree.network import MLPConfig, mlp
from bpfree.plugins import Plugins
from bpfree.tasks.digits import DIGITS

OLD = '''
"""A small plugin as others may have written it for interface 1."""

from dataclasses import dataclass, replace
from typing import Any

import bpfree
import torch
from bpfree import OptimizerConfig, Traits
from torch import nn

bpfree_api = 1


@dataclass
class Config:
    passes: int = bpfree.option(2, "forward passes per step", ge=1)
    embedding: bool = bpfree.option(True, "add a shared embedding to what the heads see")


class Local(bpfree.Streamed):
    traits = Traits("upstream", downstream_weights=0, reverse_span=1)
    optimizer_keys = ("lr", "momentum")


class Noisy(Local):
    Config = Config
    card = bpfree.Card("local heads, with noise in quick predictions", equation="loss_l = L(V_l (h_l + s), y)")
    own_network = True
    draws = 3

    @property
    def traits(self):
        return replace(super().traits, passes=super().traits.passes + self.config.passes - 1)

    @property
    def optimizer(self):
        return OptimizerConfig("sgd", lr=0.1 / len(self.heads), momentum=0.5)

    @property
    def shared_groups(self):
        return ("embed",) if self.config.embedding else ()

    def __init__(self, network, spec, config=None):
        super().__init__(network, spec, config)
        shapes = self.network.shapes
        self.heads = nn.ModuleDict({name: nn.Linear(shapes[name].numel(), spec.outputs) for name in self.network.hidden})
        self.embed = nn.Embedding(1, 1)

    def local_loss(self, trace, batch, step):
        if step.here is not None and trace.name not in step.here:
            return None
        outputs = trace.output.flatten(1)
        for _ in range(self.config.passes - 1):
            outputs = outputs + 0 * self.network.blocks[trace.name](trace.input).flatten(1)
        shift = self.embed.weight if self.config.embedding else 0
        return self.spec.loss(self.heads[trace.name](outputs + shift), batch)

    def predict(self, inputs, generator):
        scores = self.network(inputs)
        return scores if self.final else scores + torch.randn(scores.shape, generator=generator, device=scores.device)

    def alternatives(self, inputs, generator):
        with self.in_passing():
            return {"quick": self.predict(inputs, generator)}


@bpfree.hookimpl
def bpfree_rules():
    return {"noisy": Noisy}
'''

TABLE = {
    "bpfree_api = 1": "bpfree_api = 2",
    'traits = Traits("upstream", downstream_weights=0, reverse_span=1)': (
        'traits_of = bpfree.always(Traits("upstream", downstream_weights=0, reverse_span=1))'
    ),
    'optimizer_keys = ("lr", "momentum")': 'optimizer_keys_of = bpfree.always(("lr", "momentum"))',
    "own_network": "brings_network",
    "draws = 3": "draws_of = bpfree.always(3)",
    """    @property
    def traits(self):
        return replace(super().traits, passes=super().traits.passes + self.config.passes - 1)
""": """    @classmethod
    def traits_of(cls, config, network=None):
        traits = super().traits_of(config, network)
        return replace(traits, passes=traits.passes + config.passes - 1)
""",
    """    @property
    def optimizer(self):
        return OptimizerConfig("sgd", lr=0.1 / len(self.heads), momentum=0.5)
""": """    @classmethod
    def optimizer_of(cls, config, network=None):
        return OptimizerConfig("sgd", lr=None if network is None else 0.1 / len(network.hidden), momentum=0.5)
""",
    """    @property
    def shared_groups(self):
        return ("embed",) if self.config.embedding else ()
""": """    @classmethod
    def shared_groups_of(cls, config, network=None):
        return ("embed",) if config.embedding else ()
""",
    "step.here": "step.local_groups",
    "self.final": "self.final_prediction",
    "in_passing": "quick_predictions",
}
"""What the same plugin says for interface 2."""


def new() -> str:
    text = OLD
    for old, said in TABLE.items():
        assert old in text
        text = text.replace(old, said)
    return text


@pytest.fixture(autouse=True)
def untold() -> Iterator[None]:
    """Each test gets the warnings of the old names that it reads."""
    interface_v1._warn_once.cache_clear()
    yield
    interface_v1._warn_once.cache_clear()


def imported(text: str, name: str, folder: Path) -> types.ModuleType:
    path = folder / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def registry(text: str, name: str, folder: Path) -> Plugins:
    entry = types.SimpleNamespace(name=name, dist=types.SimpleNamespace(name=name, version="1"), load=lambda: imported(text, name, folder))
    return Plugins(entry_points=[entry])


def trained(plugins: Plugins, *words: str) -> tuple[Rule, Any]:
    """A run of an epoch by resolved settings."""
    settings = ["rule=noisy", "network.depth=2", "evaluation.alternatives=true", "threads=1", *words]
    recipe = resolve(parse_words(settings), plugins)
    task = recipe.build_task()
    rule = recipe.build_rule(task.spec)
    config = bpfree.TrainConfig(**{name: getattr(recipe.settings, name) for name in ("optimizer", "evaluation")})
    config = replace(config, budget=bpfree.BudgetConfig(epochs=1), device="cpu")
    return rule, bpfree.Trainer(rule, task, config).fit()


def scores(run: Any) -> list[dict[str, float]]:
    """Losses and accuracies after each pass, and of the test."""
    return [{key: value for key, value in metrics.items() if re.search("loss|accuracy", key)} for metrics in [*run.history, run.result]]


def spellings(caught: list[warnings.WarningMessage]) -> list[tuple[str, str]]:
    """Old and new name of each warning, and that it points at the plugin's own line."""
    found = []
    for warning in caught:
        match = re.fullmatch(r"(.*) is of plugin interface 1: write (.*); docs/from-1-to-2.md", str(warning.message))
        if match:
            assert warning.category is DeprecationWarning
            assert Path(warning.filename).name == "old_plugin.py", warning
            found.append((match[1], match[2]))
    return found


def test_a_plugin_of_interface_1_is_told_once_of_each_old_spelling_and_trains_as_its_twin(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        old = registry(OLD, "old_plugin", tmp_path)
        rule, run = trained(old)
        changed, _ = trained(old, "rule.passes=4", "rule.embedding=false")
    assert sorted(spellings(caught)) == sorted(
        [
            ("Local.traits as an attribute of the class", "the function traits_of(config, network)"),
            ("Local.optimizer_keys as an attribute of the class", "the function optimizer_keys_of(config, network)"),
            ("Noisy.traits as an attribute of the class", "the function traits_of(config, network)"),
            ("Noisy.optimizer as an attribute of the class", "the function optimizer_of(config, network)"),
            ("Noisy.shared_groups as an attribute of the class", "the function shared_groups_of(config, network)"),
            ("Noisy.draws as an attribute of the class", "the function draws_of(config, network)"),
            ("Noisy.own_network", "brings_network"),
            ("Rule.final", "final_prediction"),
            ("Rule.in_passing", "quick_predictions"),
            ("Step.here", "local_groups"),
        ]
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        twin, same = trained(registry(new(), "new_plugin", tmp_path))
        other, _ = trained(registry(new(), "new_plugin", tmp_path), "rule.passes=4", "rule.embedding=false")
    assert not spellings(caught)
    for mine, its in ((rule, twin), (changed, other)):
        for name in interface_v1.FUNCTIONS:
            assert getattr(mine, name) == getattr(its, name), name
            if name != "optimizer":
                assert getattr(type(mine), f"{name}_of")(mine.config) == getattr(type(its), f"{name}_of")(its.config), name
        assert mine.brings_network == its.brings_network
    assert type(rule).optimizer_of(rule.config) == OptimizerConfig()  # the property looks at what only a built rule has
    assert (rule.traits.passes, changed.traits.passes) == (2, 4)
    for name, value in twin.state_dict().items():
        assert torch.equal(rule.state_dict()[name], value), name
    assert scores(run) == scores(same)
    assert run.result["test/quick/accuracy"] < run.result["test/accuracy"]


def test_settings_are_checked_by_what_the_class_can_say(tmp_path: Path) -> None:
    """Keys of the optimiser, which are an attribute, are known; where the default is not, no momentum is refused."""
    with pytest.warns(DeprecationWarning, match="is of plugin interface 1"):
        plugins = registry(OLD, "old_plugin", tmp_path)
    with pytest.raises(bpfree.UsageError, match=r"optimizer.weight_decay=0.1 does nothing with the rule Noisy"):
        resolve(parse_words(["rule=noisy", "optimizer.weight_decay=0.1"]), plugins)
    assert resolve(parse_words(["rule=noisy", "optimizer.momentum=0.9"]), plugins)


def built(rule: type[Rule]) -> Rule:
    return rule(mlp(SPEC, MLPConfig(width=4)), SPEC)


SPEC = DIGITS.spec(DIGITS.Config(), None)
OLDER = "is of plugin interface 1"


def test_the_nearest_spelling_counts() -> None:
    with pytest.warns(DeprecationWarning, match=OLDER):

        class Old(DFA):
            traits = Traits(passes=5)  # type: ignore[assignment]

            @property
            def optimizer(self) -> OptimizerConfig:
                return replace(super().optimizer, lr=2 * (super().optimizer.lr or 0))

    class New(Old):
        traits_of = always(Traits(passes=6))
        optimizer_of = always(OptimizerConfig("sgd", lr=1.0))

    with pytest.warns(DeprecationWarning, match=OLDER):

        class OldAgain(New):
            @property
            def optimizer(self) -> OptimizerConfig:
                return replace(super().optimizer, momentum=0.5)

    with pytest.warns(DeprecationWarning, match=OLDER):

        class Twice(Old):
            @property
            def optimizer(self) -> OptimizerConfig:
                return replace(super().optimizer, lr=1 + (super().optimizer.lr or 0))

    for rule, passes, optimizer in (
        (Old, 5, OptimizerConfig("adam", lr=2e-3)),
        (New, 6, OptimizerConfig("sgd", lr=1.0)),
        (OldAgain, 6, OptimizerConfig("sgd", lr=1.0, momentum=0.5)),
        (Twice, 5, OptimizerConfig("adam", lr=1.002)),
    ):
        instance = built(rule)
        assert instance.traits.passes == rule.traits_of(instance.config).passes == passes
        assert instance.optimizer == rule.optimizer_of(instance.config) == optimizer


def test_of_both_spellings_in_a_class_the_new_one_counts_and_nothing_is_said(recwarn: pytest.WarningsRecorder) -> None:
    """So that a plugin can be for both interfaces."""

    class Both(DFA):
        traits = Traits(passes=7)  # type: ignore[assignment]
        traits_of = always(Traits(passes=8))
        own_network = False
        brings_network = True

    assert Both.brings_network
    assert built(Both).traits.passes == 8
    assert not [warning for warning in recwarn if OLDER in str(warning.message)]


def test_an_attribute_of_a_base_that_is_no_rule_is_found() -> None:
    class Mixin:
        draws = 4

    with pytest.warns(DeprecationWarning, match=r"Mixin.draws .* draws_of"):

        class Mixed(Mixin, DFA):  # type: ignore[misc]
            pass

    assert built(Mixed).draws == Mixed.draws_of(None) == 4


def test_values_can_be_read_on_the_class_with_its_default_options() -> None:
    """As in ``optimizer = Backprop.optimizer``, which was the way to take over another rule's."""
    with pytest.warns(DeprecationWarning, match=r"Backprop.optimizer of the class .* write Backprop.optimizer_of\(config\)"):
        optimizer: Any = Backprop.optimizer
    assert optimizer == OptimizerConfig("adam", lr=3e-3)
    with pytest.warns(DeprecationWarning, match="Rule.own_network .* brings_network"):
        assert Backprop.own_network is False  # type: ignore[attr-defined]


def test_old_names_can_be_set() -> None:
    rule = built(DFA)
    with pytest.warns(DeprecationWarning, match=r"Rule.final .* final_prediction"):
        rule.final = False
    assert not rule.final_prediction
    with pytest.warns(DeprecationWarning, match=r"DFA.draws set on a rule .* draws_of"):
        rule.draws = 6  # type: ignore[misc]
    assert rule.draws == 6


def test_the_network_is_there_where_a_property_asks_for_it() -> None:
    with pytest.warns(DeprecationWarning, match=OLDER):

        class Deep(DFA):
            @cached_property
            def optimizer(self) -> OptimizerConfig:  # type: ignore[override]
                return OptimizerConfig("sgd", lr=1 / len(self.network.names))

    network: Network = mlp(SPEC, MLPConfig(depth=3, width=4))
    assert Deep.optimizer_of(None, network) == OptimizerConfig("sgd", lr=0.25)
    assert Deep.optimizer_of(None) == OptimizerConfig()
    assert Deep(network, SPEC).optimizer == OptimizerConfig("sgd", lr=0.25)


def test_plugins_list_says_that_the_interface_is_an_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(DeprecationWarning, match=OLDER):
        plugins = registry(OLD, "old_plugin", tmp_path)
    record = plugins.records["old_plugin"]
    assert (record.status, record.api) == ("ok", 1)
    monkeypatch.setattr("bpfree.plugins.installed_plugins", lambda: plugins)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cli.main(["plugins", "info", "old_plugin"], standalone_mode=False) in (None, 0)
    assert "ok: written for interface version 1, which works for this release alone: docs/from-1-to-2.md" in capsys.readouterr().out


# --- what version 2 closed with ---------------------------------------------------------------------------------------


def streamed_trainings() -> dict[str, tuple[type[Rule], type[Rule]]]:
    """Old spellings and their twins: hooks without a step, also through ``super()``."""
    encode, hand_over = r"encode without a step .* write encode\(batch, step\)", r"hand_over without a step .*\(trace, batch, step\)"
    with pytest.warns(DeprecationWarning, match=encode), pytest.warns(DeprecationWarning, match=hand_over):

        class Old(bpfree.Streamed):
            def encode(self, batch: Any) -> Any:  # type: ignore[override]
                return 2 * super().encode(batch)  # type: ignore[call-arg]

            def hand_over(self, trace: Any, batch: Any) -> Any:  # type: ignore[override]
                return super().hand_over(trace, batch) / 2  # type: ignore[call-arg]

            def local_loss(self, trace: Any, batch: Any, step: Any) -> Any:
                return trace.output.square().mean()

    class New(bpfree.Streamed):
        def encode(self, batch: Any, step: Any) -> Any:
            return 2 * super().encode(batch, step)

        def hand_over(self, trace: Any, batch: Any, step: Any) -> Any:
            return super().hand_over(trace, batch, step) / 2

        def local_loss(self, trace: Any, batch: Any, step: Any) -> Any:
            return trace.output.square().mean()

    class OnOld(Old):
        def encode(self, batch: Any, step: Any) -> Any:  # type: ignore[override]
            assert step is not None
            return super().encode(batch, step) + 1  # type: ignore[call-arg]

    class OnNew(New):
        def encode(self, batch: Any, step: Any) -> Any:
            return super().encode(batch, step) + 1

    return {"direct": (Old, New), "a new class on an old one": (OnOld, OnNew)}


@pytest.mark.parametrize("kind", ["direct", "a new class on an old one"])
def test_hooks_without_a_step_still_work(kind: str) -> None:
    """Oracle: the same rule in the words of interface 2, bit for bit."""
    trained = []
    for rule in streamed_trainings()[kind]:
        torch.manual_seed(0)
        instance = built(rule)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            stepper = bpfree.Stepper(instance)
            for _ in range(3):
                stepper.take(bpfree.Batch(torch.ones(4, 1, 8, 8), torch.arange(4)))
        trained.append(instance.state_dict())
    for name, value in trained[0].items():
        assert torch.equal(value, trained[1][name]), name


def test_super_without_a_step_is_told() -> None:
    old = streamed_trainings()["direct"][0]
    instance: Any = built(old)
    first, second = (pytest.warns(DeprecationWarning, match=rf"super\(\).{name} without a step") for name in ("encode", "hand_over"))
    with first, second:
        instance.credit(bpfree.Batch(torch.ones(4, 1, 8, 8), torch.arange(4)), bpfree.new_step(instance))


@pytest.mark.parametrize(("old", "new"), [(True, "required"), (False, "optional")])
def test_the_trait_readout_was_true_or_false(old: Any, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf'Traits\(readout={old}\) .* write Traits\(readout="{new}"\)') as caught:
        traits = Traits(readout=old)
    assert traits == Traits(readout=new)  # type: ignore[arg-type]
    assert Path(caught[0].filename).name == Path(__file__).name
