"""``bpfree registry`` and what ``bpfree plugins`` shows of it. Oracle: certificates that are made here, good and bad."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from made_certificates import certificate, findings, resealed, write

from bpfree.certify.findings import Finding
from bpfree.cli.main import main
from bpfree.registry import read_entry, registry_folder

NOPROP = ["noprop-adjoint", "noprop-backprop", "noprop-ct", "noprop-dt", "noprop-fm"]


def call(*words: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, words)))
    return int(caught.value.code or 0)


def test_list_and_show_read_the_index_that_comes_with_bpfree(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("registry", "list", "--json") == 0
    listed = {record["name"]: record for record in json.loads(capsys.readouterr().out)}
    assert {"core", "noprop", "hebbian"} <= set(listed)
    for name in ("hebbian", "oja"):  # a plugin, or one of its rules
        assert call("registry", "show", name, "--json") == 0
        assert json.loads(capsys.readouterr().out) == listed["hebbian"]
    assert call("registry", "show", "hebbian") == 0
    shown = capsys.readouterr().out
    assert "Journe" in shown
    assert "93.59 ± 1.06" in shown
    assert call("registry", "show", "hebbain") == 2
    assert "did you mean 'hebbian'?" in capsys.readouterr().err


def test_add_then_list_show_and_validate(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From an installed plugin and its certificate to a valid registry."""
    made = write(workplace / "mine.json", certificate("noprop-dt"))
    assert call("registry", "add", "noprop", "--certificate", made) == 0
    assert "5 rules, 1 with a certificate" in capsys.readouterr().out
    entry = read_entry(workplace / "registry/plugins/noprop.toml")
    assert (entry.distribution, entry.rules, entry.api, entry.licence) == ("bpfree-noprop", NOPROP, [2, 2], "Apache-2.0")
    assert "2503.24322" in entry.papers[0]
    assert (workplace / "registry/certificates/noprop-dt.json").read_text() == made.read_text()
    assert call("registry", "validate", "--folder", "registry") == 0
    assert "valid" in capsys.readouterr().out
    assert call("registry", "list", "--folder", "registry") == 0
    assert "1 of 5, 2026-11-20" in capsys.readouterr().out
    assert "| 1 of 5, 2026-11-20 |" in (workplace / "registry/README.md").read_text()
    assert call("registry", "show", "noprop", "--index", "registry/index.json", "--json") == 0
    short = json.loads(capsys.readouterr().out)["certificates"]["noprop-dt"]
    assert short["status"] == "certified"
    assert short["properties"] == {"dependence": "independent"}  # no matrices in the index


def test_add_keeps_what_only_people_can_say(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = registry_folder() / "plugins" / "noprop.toml"
    assert call("registry", "add", "noprop", "--entry", ours) == 0
    assert "bpfree certify noprop-dt --output" in capsys.readouterr().out
    there = workplace / "registry/plugins/noprop.toml"
    assert read_entry(there).results == read_entry(ours).results
    there.write_text(there.read_text().replace('repository = ""', 'repository = "https://example.org/x"'))
    there.write_text(re.sub(r'added = ".*"', 'added = "2025-01-02"', there.read_text()))
    assert call("registry", "add", "noprop") == 0
    assert read_entry(there).repository == "https://example.org/x"
    assert read_entry(there).added == "2025-01-02"
    assert call("registry", "add", "hebbian", "--entry", ours) == 2
    assert "the entry of 'noprop', not of 'hebbian'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"findings": findings(Finding("trait-update", "t", "failed"))}, "failed its examination: trait-update"),
        ({"kind": "quick"}, "is quick, not full"),
        ({"sources": {"bpfree contract": "0"}}, "is stale"),
        ({"rule": "dfa"}, "the certificate of 'dfa', which 'noprop' does not register"),
    ],
)
def test_add_refuses(changes: dict[str, Any], said: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is written then."""
    made = write(workplace / "mine.json", certificate("noprop-dt", **changes))
    assert call("registry", "add", "noprop", "--certificate", made) != 0
    assert said in capsys.readouterr().err
    assert not (workplace / "registry").exists()


def test_add_suggests_a_plugin_that_is_there(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("registry", "add", "nopropp") == 2
    assert "did you mean 'noprop'?" in capsys.readouterr().err


@pytest.fixture
def ours(workplace: Path) -> Path:
    """A copy of our registry with one certificate."""
    shutil.copytree(registry_folder(), workplace / "registry", ignore=shutil.ignore_patterns("certificates"))
    assert call("registry", "add", "noprop", "--certificate", write(workplace / "mine.json", certificate("noprop-dt"))) == 0
    return workplace / "registry"


def test_validate_names_a_certificate_of_another_core(ours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another hash of what is neither contract nor examiner is no fault."""
    path = ours / "certificates/noprop-dt.json"
    path.write_text(resealed(path.read_text().replace('"bpfree": "', '"bpfree": "x')))
    capsys.readouterr()
    assert call("registry", "validate", "--folder", "registry") == 0
    assert "measured before a change of the core outside contract and examiner: noprop-dt\n" in capsys.readouterr().out
    assert call("registry", "validate", "--folder", "registry", "--json") == 0
    assert json.loads(capsys.readouterr().out)["measured_on_another_core"] == ["noprop-dt"]


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("plugins/noprop.toml", 'status = "active"', 'status = "fine"', "status is 'fine', not one of active, archived, broken"),
        ("plugins/noprop.toml", 'licence = "Apache-2.0"\n', "", "licence is missing"),
        ("plugins/noprop.toml", 'status = "active"', 'status = "active"\nstars = 5', "stars is not known"),
        (
            "plugins/noprop.toml",
            '    "noprop-fm",\n',
            "",
            "the plugin registers noprop-adjoint, noprop-backprop, noprop-ct, noprop-dt, noprop-fm",
        ),
        ("plugins/noprop.toml", "api = [1, 2]", "api = [3, 4]", "interface version 2, which is not in [3, 4]"),
        ("plugins/noprop.toml", "seeds = 5", "seeds = 1", "give a deviation if, and only if,"),
        ("plugins/noprop.toml", "= [", "= ", "cannot read the entry"),
        ("plugins/hebbian.toml", '"oja",', '"oja",\n"noprop-dt",', "both hebbian and noprop list the rule 'noprop-dt'"),
        ("index.json", '"noprop-dt"', '"noprop-ct"', "bpfree registry index --folder registry"),
        ("README.md", "| `noprop` |", "| `nopropp` |", "README.md is out of date with entries and certificates"),
        ("certificates/noprop-dt.json", '"rule"', '"rul"', "this is no certificate"),
        ("certificates/noprop-dt.json", '"passed"', '"failed"', "failed its examination: whole-run-reading"),
        ("certificates/noprop-dt.json", '"full"', '"partial"', "is partial, not full"),
        ("certificates/noprop-dt.json", '"bpfree_noprop": "', '"bpfree_noprop": "x', "the sources of bpfree_noprop have changed since"),
        ("certificates/noprop-dt.json", '"plugin": "noprop"', '"plugin": "hebbian"', "the registry has that rule under noprop"),
    ],
)
def test_validate_finds(file: str, old: str, new: str, said: str, ours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One thing is spoilt at a time; before, nothing is wrong."""
    assert call("registry", "validate", "--folder", "registry") == 0
    text = (ours / file).read_text()
    assert old in text
    spoilt = text.replace(old, new)
    (ours / file).write_text(resealed(spoilt) if file.startswith("certificates") else spoilt)
    capsys.readouterr()
    assert call("registry", "validate", "--folder", "registry", "--json") == 1
    found = json.loads(capsys.readouterr().out)["problems"]
    assert any(said in f"{problem['what']} {problem['fix']}" for problem in found), found
    assert call("registry", "validate", "--folder", "registry") == 1
    assert said in capsys.readouterr().out


def test_files_in_the_wrong_place_are_found(ours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (ours / "certificates/noprop-dt.json").rename(ours / "certificates/other.json")
    (ours / "plugins/noprop.toml").rename(ours / "plugins/other.toml")
    assert call("registry", "validate", "--folder", "registry") == 1
    shown = capsys.readouterr().out
    assert "rename it to noprop-dt.json" in shown
    assert "rename the file to noprop.toml" in shown


def test_index_renews_what_is_out_of_date(ours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (ours / "plugins/hebbian.toml").unlink()
    assert call("registry", "validate", "--folder", "registry") == 1
    assert call("registry", "index") == 0
    assert call("registry", "validate", "--folder", "registry") == 0
    assert "`softhebb`" not in (ours / "README.md").read_text()
    capsys.readouterr()
    assert call("registry", "index") == 0
    assert "were up to date" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["list", "--folder", "."], "this is not a registry"),
        (["list", "--folder", ".", "--index", "x.json"], "both an index and a folder"),
        (["list", "--index", "x.json"], "not an index of format 1"),
        (["index"], "this is not a registry"),
    ],
)
def test_wrong_places(words: list[str], said: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "x.json").write_text("{}")
    assert call("registry", *words) != 0
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[" * 3000, "", "\0", "NaN"], ids=["nested", "empty", "NUL", "no JSON"])
def test_a_damaged_index_or_certificate_says_what_writes_one(text: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "x.json").write_text(text)
    for words in (["list", "--index", "x.json"], ["add", "core", "--certificate", "x.json", "--folder", "new"]):
        assert call("registry", *words) == 1
        said = capsys.readouterr().err
        assert "where: x.json" in said
        assert "fix:   " in said
    assert not (workplace / "new").exists()


def test_plugins_show_what_is_certified(ours: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("bpfree.registry.registry_folder", lambda: ours)
    assert call("plugins", "info", "noprop", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    certificates = shown["certificates"]
    assert set(certificates) == set(NOPROP)
    assert certificates["noprop-dt"] == {"state": "certified", "date": "2026-11-20"}
    assert certificates["noprop-ct"]["state"] == "none"
    assert shown["registry_entry"] == str(ours / "plugins/noprop.toml")
    assert (shown["api"], shown["hooks"]) == (
        2,
        ["bpfree_networks", "bpfree_presets", "bpfree_rules", "bpfree_studies", "epoch_end", "run_end"],
    )
    assert Path(shown["path"]).name == "plugin.py"
    write(ours / "certificates/dfa.json", certificate("dfa", sources=certificate("dfa").sources | {"bpfree contract": "0"}))
    assert call("plugins", "list") == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert lines["noprop"].endswith("1 of 5")
    assert lines["core"].endswith("0 of 4 (1 stale)")
    assert call("plugins", "info", "core") == 0
    assert "stale (bpfree contract changed)" in capsys.readouterr().out
    (ours / "certificates/dfa.json").write_text("{")
    assert call("plugins", "list") == 0  # also where a certificate cannot be read
    assert "cannot read the certificate" in capsys.readouterr().err
    assert call("plugins", "info", "norpop") == 2
