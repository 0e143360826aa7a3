"""What each shipped rule says of itself, for several of its options and networks.

Oracle: ``declared.json``, recorded when traits and optimisers were attributes of the rules (plugin interface 1). NoProp in
continuous time, by flow, and its baselines have taken all targets since, the first two with AdamW.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from bpfree import Rule, Traits
from bpfree.config import parse_words, resolve
from bpfree.plugins import installed_plugins

RECORDED = json.loads((Path(__file__).parent / "declared.json").read_text())
READOUT = {False: "none"}
"""What rules that needed no readout say now: each of those that are shipped has none."""
LATER = {"inputs", "own_loss", "views", "addons"}
"""What nothing said when this was recorded."""
KINDS = ["classes", "soft", "real"]
"""Of targets, at that time."""
SINCE = {"feedback", "gradient-free", "local-losses", "sampled"}
"""Plugins that came later."""
UNSET: dict[str, Any] = {"optimizer_keys": None, "shared_groups": [], "draws": 1}


def plain(value: Any) -> Any:
    """Of a dataclass what is not its default."""
    changed = {item.name: getattr(value, item.name) for item in dataclasses.fields(value) if getattr(value, item.name) != item.default}
    found = json.loads(json.dumps({key: entry for key, entry in changed.items() if entry != {} and key not in LATER}))
    if "targets" in found:
        found["targets"] = [kind for kind in found["targets"] if kind in KINDS]
    return {key: entry for key, entry in found.items() if (key, entry) != ("targets", KINDS)}


def largest(traits: Traits) -> Traits:
    """The traits without what a network can only lessen."""
    return dataclasses.replace(traits, reverse_span=0, passes=1)


def assert_holds_for_any_network(rule: Rule) -> None:
    """What the class says without a network: the same, but for bounds, and a rate that the network decides."""
    traits, optimizer = type(rule).traits_of(rule.config), type(rule).optimizer_of(rule.config)
    assert largest(traits) == largest(rule.traits)
    assert traits.passes >= rule.traits.passes
    assert traits.reverse_span in ("all", rule.traits.reverse_span) or traits.reverse_span > rule.traits.reverse_span
    assert optimizer in (rule.optimizer, dataclasses.replace(rule.optimizer, lr=None))
    for name in UNSET:
        assert getattr(type(rule), f"{name}_of")(rule.config) == getattr(rule, name), name


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda recorded: recorded["settings"])
def test_a_rule_says_what_was_recorded(recorded: dict[str, Any]) -> None:
    recipe = resolve(parse_words(recorded["settings"].split()))
    rule = recipe.build_rule(recipe.spec())
    traits = {key: READOUT.get(value, value) if key == "readout" else value for key, value in recorded["traits"].items()}
    assert plain(rule.traits) == traits
    assert plain(rule.optimizer) == recorded["optimizer"]
    for name, unset in UNSET.items():
        value = getattr(rule, name)
        assert (list(value) if isinstance(value, tuple) else value) == recorded.get(name, unset), name
    assert_holds_for_any_network(rule)


def test_every_shipped_rule_is_recorded() -> None:
    recorded = {resolve(parse_words(entry["settings"].split())).names["rule"] for entry in RECORDED}
    shipped = {"core", *(folder.name.replace("_", "-") for folder in (Path(__file__).parents[1] / "plugins").iterdir())} - SINCE
    assert recorded == {name for name, _, owner in installed_plugins().items("rules") if owner.name in shipped}
