"""`make certify`: which certificates are renewed. Oracle: a registry with fresh, stale, quick, unreadable and missing ones."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType

import ci_scripts
import pytest
from made_certificates import certificate, write

from bpfree.plugins import installed_plugins
from bpfree.registry import certificates, problems, registry_folder, stale


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script over a copy of our registry, with an examination that takes no time."""
    module = ci_scripts.load("certify")
    shutil.copytree(registry_folder(), tmp_path / "registry", ignore=shutil.ignore_patterns("certificates"))
    monkeypatch.setattr(module, "REGISTRY", tmp_path / "registry")
    monkeypatch.setattr(module, "write_docs", lambda page, known: [])  # made-up certificates have nothing to draw
    module.renewed = []  # type: ignore[attr-defined]

    def examined(rule: str) -> bool:
        module.renewed.append(rule)
        write(module.REGISTRY / "certificates" / f"{rule}.json", certificate(rule))
        return True

    monkeypatch.setattr(module, "certify", examined)
    return module


def test_missing_stale_and_unusable_ones_are_renewed(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    place = script.REGISTRY / "certificates"
    write(place / "dfa.json", certificate("dfa"))
    write(place / "frozen.json", certificate("frozen", sources={"bpfree contract": "0"}))
    write(place / "linear.json", certificate("linear", kind="quick"))
    write(place / "oja.json", certificate("oja")).write_text("{")
    assert script.main(["dfa", "frozen", "linear", "oja", "sanger"]) == 0
    assert sorted(script.renewed) == ["frozen", "linear", "oja", "sanger"]
    assert "fresh\n" in capsys.readouterr().out
    found = certificates(script.REGISTRY)
    assert sorted(found) == ["dfa", "frozen", "linear", "oja", "sanger"]
    assert not any(stale(made, installed_plugins()) for made in found.values())
    assert problems(script.REGISTRY, installed_plugins()) == []  # index and tables were renewed too


def test_all_renews_also_fresh_ones(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    write(script.REGISTRY / "certificates/dfa.json", certificate("dfa"))
    assert script.main(["dfa"]) == 0
    made = certificate("dfa")
    write(script.REGISTRY / "certificates/dfa.json", certificate("dfa", sources=made.sources | {"bpfree": "0"}))
    assert script.main(["dfa"]) == 0  # a change beside contract and examiner is only said
    assert "fresh; the core has changed" in capsys.readouterr().out
    assert script.renewed == []
    assert script.main(["--all", "dfa"]) == 0
    assert script.renewed == ["dfa"]
    with pytest.raises(SystemExit):
        script.main(["nonsense"])
