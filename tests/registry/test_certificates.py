"""Certificates against the sources of now. Oracle: files changed on purpose."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from made_certificates import certificate, findings, write

from bpfree import BpfreeError, UsageError, sources
from bpfree.certify import CHECKS, Certificate, certify
from bpfree.certify.certificate import digest_of
from bpfree.certify.findings import Finding
from bpfree.certify.names import FULL, ONLY_FULL
from bpfree.plugins import Plugins, installed_plugins
from bpfree.registry import core_changed, stale, state
from bpfree.registry.certificates import rechecked
from bpfree.registry.validation import acceptable

CORE = {"bpfree contract", "bpfree examiner", "bpfree"}


def test_a_fresh_certificate_names_core_and_plugin() -> None:
    """Those that a rule's sources are in, and no other plugin."""
    made = certificate("noprop-dt")
    assert set(made.sources) == {*CORE, "bpfree_noprop"}
    assert stale(made, installed_plugins()) == []
    assert set(certificate("dfa").sources) == CORE


@pytest.mark.parametrize(
    ("changed", "found"),
    [({name: "0"}, [name]) for name in ("bpfree contract", "bpfree examiner", "bpfree_noprop", "bpfree_gone")],
)
def test_a_package_with_another_hash_makes_it_stale(changed: dict[str, str], found: list[str]) -> None:
    made = certificate("noprop-dt")
    made.sources |= changed
    assert stale(made, installed_plugins()) == found
    assert state("noprop-dt", {"noprop-dt": made}, installed_plugins()) == f"stale ({found[0]} changed)"


@pytest.mark.parametrize(
    ("file", "parts"),
    [
        ("rule.py", {"bpfree contract"}),
        ("step.py", {"bpfree contract"}),
        ("network/trace.py", {"bpfree contract"}),
        ("training/updater.py", {"bpfree contract"}),
        ("baselines.py", {"bpfree contract"}),
        ("certify/probe.py", {"bpfree examiner"}),
        ("certify/checks/traits.py", {"bpfree examiner"}),
        ("training/trainer.py", {"bpfree"}),
        ("tasks/loading.py", {"bpfree"}),
        ("certify/show.py", set()),
        ("cli/main.py", set()),
        ("study/cells.py", set()),
    ],
)
def test_each_file_of_the_core_is_in_one_part(file: str, parts: set[str], tmp_path: Path) -> None:
    """One line is added to a copy of the core."""
    core = Path(shutil.copytree(Path(sources.__file__).parent, tmp_path / "bpfree"))
    before = sources.core_parts(core)
    (core / file).write_text((core / file).read_text() + "EDITED = True\n")
    sources.hash_of.cache_clear()
    after = sources.core_parts(core)
    assert {part for part in before if before[part] != after[part]} == parts


def test_another_change_of_the_core_fails_nothing() -> None:
    """A certificate with another hash of the rest is good."""
    plugins, made = installed_plugins(), certificate("dfa")
    assert not core_changed(made, plugins)
    made.sources["bpfree"] = "0"
    assert core_changed(made, plugins)
    assert stale(made, plugins) == []
    assert state("dfa", {"dfa": made}, plugins) == "certified"
    assert list(acceptable(made, plugins, Path("there.json"))) == []


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
    assert set(sources.certificate_hashes(installed_plugins(), "dfa")) == {*CORE, "bpfree_noprop"}


def test_the_state_of_a_rule_s_certificate() -> None:
    plugins = installed_plugins()
    waived = certificate("dfa", findings=findings(Finding("bf16", "a", "waived", waiver="why")))
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
    (failed,) = faults(findings=findings(Finding("trait-update", "true", "failed")))
    assert failed.startswith("dfa failed its examination: trait-update")
    (old,) = faults(sources=certificate("dfa").sources | {"bpfree contract": "0"})
    assert "the sources of bpfree contract have changed since" in old
    assert "bpfree certify dfa --output there.json" in old
    assert "make certify" in old


@pytest.mark.parametrize(
    ("key", "value"),
    [("settings", None), ("settings", True), ("settings", [3]), ("plugin", [[[]]]), ("findings", {}), ("sources", 3), ("api", "2")],
)
def test_a_certificate_with_values_of_other_types_is_refused(key: str, value: object) -> None:
    content = certificate().to_dict()
    assert Certificate.from_dict(content).rule == content["rule"]
    with pytest.raises(BpfreeError, match="this is no certificate"):
        Certificate.from_dict({**content, key: value})


def test_a_forged_file_is_no_certificate() -> None:
    """Oracle: each forgery by hand; a certificate that was read is the one that was written."""
    content = certificate("dfa").to_dict()
    assert Certificate.from_dict(json.loads(json.dumps(content))) == certificate("dfa")
    first, *others = content["findings"]

    def forged(**changes: object) -> str:
        spoilt = {key: value for key, value in {**content, **changes}.items() if key != "digest"}
        return json.dumps({**spoilt, "digest": digest_of(spoilt)})

    def refused(text: str) -> str:
        with pytest.raises(BpfreeError) as caught:
            Certificate.from_dict(json.loads(text))
        return caught.value.what

    assert "another digest" in refused(json.dumps({**content, "date": "2030-01-01"}))
    assert "unknown status 'excellent'" in refused(forged(findings=[{**first, "status": "excellent"}, *others]))
    assert "'mine' is no check" in refused(forged(findings=[{**first, "id": "mine"}, *others]))
    assert "there twice" in refused(forged(findings=[first, first, *others]))
    for findings_left in ([], others):
        lacking = Certificate.from_dict(json.loads(forged(findings=findings_left)))
        assert (lacking.status, lacking.passed) == ("incomplete", False)
        (fault,) = acceptable(lacking, installed_plugins(), Path("there.json"))
        assert "lacks" in fault.what
    assert tuple(check.id for check in CHECKS) == FULL
    assert set(ONLY_FULL) == {check.id for check in CHECKS if not check.quick}


def test_a_drawn_check_is_repeated(tmp_path: Path) -> None:
    """An honest certificate is confirmed; one that claims what the check does not find is contradicted."""
    true = certify("dfa", only=["trait-supervision"])
    write(tmp_path / "certificates" / "dfa.json", true)
    assert [(rule, check, fault) for rule, check, fault in rechecked(tmp_path, installed_plugins(), 3)] == [
        ("dfa", "trait-supervision", None)
    ]
    (finding,) = true.findings
    finding.status = "not applicable"
    write(tmp_path / "certificates" / "dfa.json", true)
    ((_, _, fault),) = rechecked(tmp_path, installed_plugins(), 3)
    assert fault is not None
    assert "is not applicable; repeated, it is passed" in fault.what
