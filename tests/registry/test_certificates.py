"""Certificates against the sources of now. Oracle: files changed on purpose."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from made_certificates import certificate

from bpfree import UsageError, sources
from bpfree.certify.findings import Finding
from bpfree.plugins import Plugins, installed_plugins
from bpfree.registry import stale, state
from bpfree.registry.validation import acceptable


def test_a_fresh_certificate_names_core_and_plugin() -> None:
    """Those that a rule's sources are in, and no other plugin."""
    made = certificate("noprop-dt")
    assert set(made.sources) == {"bpfree", "bpfree_noprop"}
    assert stale(made, installed_plugins()) == []
    assert set(certificate("dfa").sources) == {"bpfree"}


@pytest.mark.parametrize(
    ("changed", "found"),
    [({"bpfree": "0"}, ["bpfree"]), ({"bpfree_noprop": "0"}, ["bpfree_noprop"]), ({"bpfree_gone": "0"}, ["bpfree_gone"])],
)
def test_a_package_with_another_hash_makes_it_stale(changed: dict[str, str], found: list[str]) -> None:
    made = certificate("noprop-dt")
    made.sources |= changed
    assert stale(made, installed_plugins()) == found
    assert state("noprop-dt", {"noprop-dt": made}, installed_plugins()) == f"stale ({found[0]} changed)"


def test_an_edited_source_makes_it_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule's package is edited on disk; only its own rules are concerned."""
    package = tmp_path / "bpfree_edited"
    package.mkdir()
    text = "from bpfree.baselines import DFA\nclass Mine(DFA):\n    pass\n"
    (package / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    import bpfree_edited

    monkeypatch.setitem(sys.modules, "bpfree_edited", bpfree_edited)
    plugins = Plugins(entry_points=()).including(bpfree_edited.Mine)
    made = certificate("dfa", rule="Mine", sources=sources.certificate_hashes(plugins, "Mine"))
    assert stale(made, plugins) == []
    (package / "__init__.py").write_text(text + "EDITED = True\n")
    sources.hash_of.cache_clear()
    assert stale(made, plugins) == ["bpfree_edited"]


def test_networks_of_a_specimen_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A core rule whose specimen is a plugin's network depends on that plugin."""
    from bpfree.baselines import DFA

    monkeypatch.setattr(
        DFA, "specimen", classmethod(lambda cls, kind, depth, width: {"network.name": "noprop-mlp"} if kind == "dense" else None)
    )
    assert set(sources.certificate_hashes(installed_plugins(), "dfa")) == {"bpfree", "bpfree_noprop"}


def test_the_state_of_a_rule_s_certificate() -> None:
    plugins = installed_plugins()
    waived = certificate("dfa", findings=[Finding("a", "a", "waived", waiver="why")])
    assert state("dfa", {}, plugins) == "none"
    assert state("dfa", {"dfa": certificate("dfa")}, plugins) == "certified"
    assert state("dfa", {"dfa": waived}, plugins) == "certified with waivers"
    assert state("dfa", {"dfa": certificate("dfa", kind="quick")}, plugins) == "passed (quick)"
    assert state("theirs", {"theirs": certificate("dfa", rule="theirs")}, plugins) == "certified"  # not installed: nothing to compare with
    with pytest.raises(UsageError, match="unknown rule 'theirs'"):
        stale(certificate("dfa", rule="theirs"), plugins)


def test_what_a_registry_accepts() -> None:
    def faults(**changes: object) -> list[str]:
        return [
            f"{fault.what} | {fault.fix}" for fault in acceptable(certificate("dfa", **changes), installed_plugins(), Path("there.json"))
        ]

    assert faults() == []
    assert faults(kind="quick") == ["the certificate of dfa is quick, not full | bpfree certify dfa --output there.json"]
    (failed,) = faults(findings=[Finding("traits", "true", "failed")])
    assert failed.startswith("dfa failed its examination: traits")
    (old,) = faults(sources={"bpfree": "0"})
    assert "the sources of bpfree have changed since" in old
    assert "bpfree certify dfa --output there.json" in old
    assert "make certify" in old
