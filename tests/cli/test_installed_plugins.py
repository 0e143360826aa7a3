"""The command line in environments with plugins that cannot be used: real distributions on the path."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from children import run


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path of modules, in which a distribution `bpfree-broken` is installed whose plugin does not import."""
    info = tmp_path / "site" / "bpfree_broken-0.3.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bpfree-broken\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text("[bpfree]\nbroken = bpfree_broken_plugin\n")
    (tmp_path / "site" / "bpfree_broken_plugin.py").write_text("import a_library_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return tmp_path / "site"


def test_a_broken_plugin_is_listed_with_its_reason(broken: Path) -> None:
    """By a fresh process, to which the folder is named as a user does."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(broken), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "bpfree", "plugins", "list", "--json"]
    listed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert listed.returncode == 0
    record = {record["name"]: record for record in json.loads(listed.stdout)}["broken"]
    assert (record["status"], record["distribution"], record["version"]) == ("broken", "bpfree-broken", "0.3")
    assert "a_library_that_is_not_there" in record["reason"]
    assert "broken" in run("rules").stderr
    shown = run("plugins", "info", "broken")
    assert shown.returncode == 0
    assert "a_library_that_is_not_there" in shown.stdout
    assert "not in the registry" in shown.stdout


def test_a_broken_plugin_gets_no_entry(broken: Path, tmp_path: Path) -> None:
    added = run("registry", "add", "broken", "--folder", str(tmp_path / "registry"))
    assert added.returncode == 1
    assert "plugin 'broken' is broken" in added.stderr
    assert not (tmp_path / "registry").exists()


def test_it_fails_only_the_run_that_asks_for_it(broken: Path, tmp_path: Path) -> None:
    assert run("rules", "dfa").returncode == 0
    asked = run("train", "rule=theirs", f"output={tmp_path / 'runs'}")
    assert asked.returncode == 2
    assert "a_library_that_is_not_there" in asked.stderr


def test_a_plugin_is_disabled_by_name(broken: Path) -> None:
    assert "noprop-dt" not in run("--disable", "noprop", "rules").stdout
    assert "noprop-dt" not in run("rules", BPFREE_DISABLE_PLUGINS="noprop").stdout
    assert "noprop-dt" in run("rules").stdout
