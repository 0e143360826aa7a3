"""Discovery and isolation of plugins, with entry points made here."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bpfree import API_VERSION, UsageError, hookimpl
from bpfree.baselines import DFA
from bpfree.cli.main import main
from bpfree.config import resolve
from bpfree.plugins import KINDS, Plugins
from bpfree.study.file import find_study


class Entry:
    """An entry point that loads whatever it is given."""

    def __init__(self, name: str, load: Any) -> None:
        self.name = name
        self.dist = types.SimpleNamespace(name=f"bpfree-{name}", version="1.2")
        self._load = load

    def load(self) -> Any:
        if isinstance(self._load, BaseException):
            raise self._load
        return self._load() if isinstance(self._load, types.FunctionType) else self._load


def module(api: Any = API_VERSION, **hooks: Any) -> Any:
    made = types.ModuleType("plugin")
    if api is not None:
        made.bpfree_api = api  # type: ignore[attr-defined]
    for name, function in hooks.items():
        setattr(made, name, hookimpl(function))
    return made


def broken_spec(nonsense: int) -> dict[str, Any]:
    return {}


def nothing() -> dict[str, Any]:
    return {}


def broken_call() -> dict[str, Any]:
    raise KeyError("inside")


class NoConfig(DFA):
    Config = int  # type: ignore[assignment]


def leaving(code: Any) -> dict[str, Any]:
    raise SystemExit(code)


GOOD = module(bpfree_rules=lambda: {"mine": DFA})
BAD = {
    "imports": (ImportError("no module named flux"), "broken", "fails in its import: ImportError: no module named flux"),
    "future": (module(api=99), "incompatible", "interface version 99; this is version 2"),
    "silent": (module(api=None), "incompatible", "states no bpfree_api"),
    "signature": (module(bpfree_rules=broken_spec), "broken", "nonsense"),
    "misspelt": (module(bpfree_rulez=nothing), "broken", "bpfree_rulez"),
    "raises": (module(bpfree_rules=broken_call), "broken", "inside"),
    "leaves": (SystemExit(0), "broken", "calls sys.exit(0) in its import"),
    "leaves-later": (module(bpfree_tasks=lambda: leaving("no")), "broken", "calls sys.exit('no') in bpfree_tasks"),
    "generator": (GeneratorExit(), "broken", "fails in its import: GeneratorExit"),
    "numbered": (module(bpfree_rules=lambda: {3: DFA}), "broken", "registers the rule 3: a name must be text of one line"),
    "mixed": (module(bpfree_rules=lambda: {3: DFA, "a": DFA}), "broken", "registers the rule 3"),
    "nameless": (module(bpfree_rules=lambda: {"": DFA}), "broken", "a name must be text"),
    "lines": (module(bpfree_rules=lambda: {"a\nb": DFA}), "broken", "a name must be text of one line"),
    "undescribed": (module(bpfree_rules=lambda: {"zz": NoConfig}), "broken", "whose Config is a dataclass"),
    "keyless": (module(bpfree_presets=lambda: {"quickstart/zz": {3: 4}}), "broken", "a mapping of settings by their keys"),
    "wrong-type": (module(bpfree_rules=lambda: [DFA]), "broken", "must be a mapping of names, not list"),
    "thief": (module(bpfree_rules=lambda: {"backprop": DFA}), "broken", "which plugin 'core' has registered already"),
}


def test_broken_plugins_are_named_with_their_reason_and_the_others_work() -> None:
    registry = Plugins(entry_points=[Entry("good", GOOD), *(Entry(name, load) for name, (load, _, _) in BAD.items())])
    assert registry.get("rules", "mine") is DFA
    assert registry.records["good"].status == "ok"
    assert registry.records["good"].provides["rules"] == ["mine"]
    assert registry.records["good"].hooks == ["bpfree_rules"]
    assert {name: registry.records[name].api for name in ("good", "future", "silent", "imports")} == {
        "good": 2,
        "future": 99,
        "silent": None,
        "imports": None,
    }
    for name, (_, status, reason) in BAD.items():
        assert registry.records[name].status == status, name
        assert reason in registry.records[name].reason, registry.records[name].reason
    with pytest.raises(UsageError, match=r"not loaded: .*future"):
        registry.get("rules", "theirs")


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_is_nothing_that_can_be_registered(kind: str) -> None:
    registry = Plugins(entry_points=[Entry("zz", module(**{f"bpfree_{kind}": lambda: {"zz": 3}}))])
    assert registry.records["zz"].status == "broken"
    assert "'zz', which must be" in registry.records["zz"].reason
    assert "zz" not in registry.names(kind)


SETTINGS: list[tuple[str, Callable[[], Any], Callable[[], Any]]] = [
    ("torch's grad mode", lambda: torch.set_grad_enabled(False), torch.is_grad_enabled),
    ("torch's default dtype", lambda: torch.set_default_dtype(torch.float64), torch.get_default_dtype),
    ("torch's default device", lambda: torch.set_default_device("meta"), lambda: torch.ones(1).device),
    ("torch's number of threads", lambda: torch.set_num_threads(torch.get_num_threads() + 1), torch.get_num_threads),
    (
        "torch's deterministic algorithms",
        lambda: torch.use_deterministic_algorithms(True, warn_only=True),
        torch.are_deterministic_algorithms_enabled,
    ),
    ("torch's anomaly detection", lambda: torch.autograd.set_detect_anomaly(True), torch.is_anomaly_enabled),
    ("torch's precision of products", lambda: torch.set_float32_matmul_precision("medium"), torch.get_float32_matmul_precision),
    ("torch's seed", lambda: torch.manual_seed(1234), torch.initial_seed),
    ("the working folder", lambda: os.chdir("/"), os.getcwd),
    ("the signal handlers", lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN), lambda: signal.getsignal(signal.SIGTERM)),
]


def begin_inference() -> torch.inference_mode:
    context = torch.inference_mode()
    context.__enter__()
    return context


@pytest.mark.parametrize(("name", "change", "get"), [*SETTINGS, ("torch's grad mode", begin_inference, torch.is_inference_mode_enabled)])
@pytest.mark.parametrize("later", [False, True])
def test_settings_of_the_process_survive_a_plugin(
    name: str, change: Callable[[], Any], get: Callable[[], Any], later: bool, workplace: Path
) -> None:
    """Oracle: the settings as torch itself tells them, before and afterwards."""

    def load() -> Any:
        kept.append(change())
        return GOOD

    kept: list[Any] = []
    before, place = get(), "bpfree_rules" if later else "its import"
    registry = Plugins(entry_points=[Entry("zz", module(bpfree_rules=lambda: load() and {"zz": DFA}) if later else load)])
    assert get() == before
    assert kept, "the plugin was not asked"
    assert registry.records["zz"].status == "broken"
    assert registry.records["zz"].reason.startswith(f"changes {name} in {place}")
    assert not {"zz", "mine"} & set(registry.names("rules"))


def test_a_plugin_may_draw_and_print_while_it_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracles: torch's generator as it was; what a program reads from our output."""

    def load() -> Any:
        print("hello")
        torch.rand(3)
        return GOOD

    before = torch.get_rng_state()
    registry = Plugins(entry_points=[Entry("good", load)])
    assert registry.get("rules", "mine") is DFA
    assert torch.equal(before, torch.get_rng_state())
    assert tuple(capsys.readouterr()) == ("", "hello\n")


def test_a_broken_plugin_is_reported_once_and_by_who_needs_it(caplog: pytest.LogCaptureFixture) -> None:
    registry = Plugins(entry_points=[Entry("zz", SystemExit(0))])
    for _ in range(2):
        resolve({"rule": "dfa", "task": "digits"}, registry)
    assert [record.message for record in caplog.records] == ["the plugin zz is left out, because it calls sys.exit(0) in its import"]
    with pytest.raises(UsageError, match=r"not loaded: zz \(broken: calls sys.exit\(0\) in its import\)"):
        resolve({"rule": "zz", "task": "digits"}, registry)


@pytest.mark.parametrize("preset", [{"rule": "nope"}, {"lr": 3}, {"rule": "dfa", "network.width": "x"}, {"rule": {"a": 1}}])
def test_a_preset_that_is_wrong_is_left_out_of_the_studies_of_all(preset: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: the study without the plugin."""
    installed = importlib.metadata.entry_points(group="bpfree")
    registry = Plugins(entry_points=[*installed, Entry("zz", module(bpfree_presets=lambda: {"quickstart/zz": preset}))])
    rows = find_study("quickstart", registry).rows
    assert [row.label for row in rows] == [row.label for row in find_study("quickstart", Plugins()).rows]
    assert "the preset quickstart/zz of the plugin zz is left out: " in caplog.text


def test_foreign_code_that_leaves_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], workplace: Path) -> None:
    """`sys.exit` where nothing contains it, as in a rule."""
    monkeypatch.setattr(DFA, "signals", lambda *arguments: leaving(0))
    with pytest.raises(SystemExit) as end:
        main(["train", "rule=dfa", "budget.epochs=1", "tracking.enabled=false", "device=cpu", "--quiet"])
    assert end.value.code == 1
    assert f"code outside of bpfree has called sys.exit(0)\n  where: {__file__}, line" in capsys.readouterr().err


def test_a_plugin_can_be_disabled_by_name() -> None:
    registry = Plugins(disabled=["good"], entry_points=[Entry("good", GOOD)])
    assert registry.records["good"].status == "disabled"
    assert "mine" not in registry.names("rules")


def test_two_plugins_of_one_name() -> None:
    registry = Plugins(entry_points=[Entry("good", GOOD), Entry("good", module())])
    assert sorted(record.status for record in registry.records.values()) == ["broken", "ok", "ok"]


def test_the_listing_is_plain_data() -> None:
    import dataclasses

    registry = Plugins(entry_points=[Entry(name, load) for name, (load, _, _) in BAD.items()])
    assert json.loads(json.dumps([dataclasses.asdict(record) for record in registry.records.values()]))


def test_every_installed_rule_has_a_card() -> None:
    """What `bpfree rules NAME` shows: a summary, and an equation."""
    registry = Plugins()
    for name, rule, _ in registry.items("rules"):
        assert rule.card.summary, name
        assert rule.card.equation, name
