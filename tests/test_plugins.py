"""Discovery and isolation of plugins, with entry points made here."""

from __future__ import annotations

import json
import types
from typing import Any

import pytest

from bpfree import API_VERSION, UsageError, hookimpl
from bpfree.baselines import DFA
from bpfree.plugins import Plugins


class Entry:
    """An entry point that loads whatever it is given."""

    def __init__(self, name: str, load: Any) -> None:
        self.name = name
        self.dist = types.SimpleNamespace(name=f"bpfree-{name}", version="1.2")
        self._load = load

    def load(self) -> Any:
        if isinstance(self._load, Exception):
            raise self._load
        return self._load


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


GOOD = module(bpfree_rules=lambda: {"mine": DFA})
BAD = {
    "imports": (ImportError("no module named flux"), "broken", "fails to import: ImportError: no module named flux"),
    "future": (module(api=99), "incompatible", "interface version 99; this is version 2"),
    "silent": (module(api=None), "incompatible", "states no bpfree_api"),
    "signature": (module(bpfree_rules=broken_spec), "broken", "nonsense"),
    "misspelt": (module(bpfree_rulez=nothing), "broken", "bpfree_rulez"),
    "raises": (module(bpfree_rules=broken_call), "broken", "inside"),
    "wrong-type": (module(bpfree_rules=lambda: [DFA]), "broken", "must return a mapping"),
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
