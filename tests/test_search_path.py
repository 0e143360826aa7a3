"""Where processes import modules from. Oracle: files in the current folder that leave a mark when they are executed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bpfree
from bpfree.search_path import search_path

DECOYS = (
    "bpfree",
    "concurrent",
    "dataclasses",
    "decimal",
    "filelock",
    "json",
    "numpy",
    "omegaconf",
    "random",
    "statistics",
    "torch",
    "yaml",
)
"""Names of modules that bpfree or torch imports."""
OURS = Path(bpfree.__file__).parents[1]
SPY = 'import pathlib\npathlib.Path("executed").open("a").write(__name__ + "\\n")\n'
PLUGIN = """
import bpfree
from bpfree.baselines import DFA

bpfree_api = 1


class Mine(DFA):
    pass


@bpfree.hookimpl
def bpfree_rules():
    return {"mine": Mine}
"""
STUDY = """
title: Two processes
settings: {task: digits, device: cpu, network.width: 8, budget.epochs: 1}
seeds: 1
floor: false
probe: false
rules: [mine, dfa]
"""


def plugin_in(folder: Path) -> Path:
    """A distribution with a rule, as `pip install --target` leaves it."""
    info = folder / "bpfree_mine-0.3.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bpfree-mine\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text("[bpfree]\nmine = mine\n")
    (folder / "mine.py").write_text(PLUGIN)
    return folder


def decoys_in(folder: Path, names: tuple[str, ...] = DECOYS) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name}.py").write_text(SPY)


def environment_of(*paths: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), **more}


@pytest.mark.slow
def test_nothing_is_imported_from_the_current_folder(tmp_path: Path) -> None:
    """A study in two worker processes, with a rule from the user's PYTHONPATH."""
    script = Path(sys.executable).with_name("bpfree")
    start = [str(script)] if script.exists() else [sys.executable, "-P", "-m", "bpfree"]
    here = tmp_path / "downloads"
    decoys_in(here, DECOYS)
    (here / "two.yaml").write_text(STUDY)
    environment = environment_of(plugin_in(tmp_path / "site"), OURS)
    words = ["study", "run", "two.yaml", "--jobs", "2", "--quiet", "tracking.enabled=false"]
    done = subprocess.run([*start, *words], cwd=here, env=environment, capture_output=True, text=True, check=False)
    assert not (here / "executed").exists(), (here / "executed").read_text()
    assert done.returncode == 0, done.stderr
    assert [json.loads(path.read_text())["status"] for path in here.rglob("cells/*.json")] == ["finished"] * 2


def test_neither_with_python_m(tmp_path: Path) -> None:
    """But for ``bpfree`` itself, which Python looks for before it executes a line of ours."""
    decoys_in(tmp_path, tuple(name for name in DECOYS if name != "bpfree"))
    environment = environment_of(OURS, XDG_CACHE_HOME=str(tmp_path / "cache"))
    command = [sys.executable, "-m", "bpfree", "rules", "dfa"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert not (tmp_path / "executed").exists(), (tmp_path / "executed").read_text()
    assert "dfa" in done.stdout, done.stderr


@pytest.mark.slow
def test_python_m_where_bpfree_itself_lies(tmp_path: Path) -> None:
    """In a checkout that is not installed, the folder comes last."""
    (tmp_path / "bpfree").symlink_to(OURS / "bpfree")
    decoys_in(tmp_path, ("random", "statistics"))
    command = [sys.executable, "-m", "bpfree", "rules", "dfa"]
    environment = environment_of(tmp_path / "nothing", XDG_CACHE_HOME=str(tmp_path / "cache"))
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert not (tmp_path / "executed").exists(), (tmp_path / "executed").read_text()
    assert "dfa" in done.stdout, done.stderr


def test_the_path_of_other_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", ["/named", str(tmp_path)])
    assert search_path() == ["/named", str(tmp_path)]
    monkeypatch.setattr(sys, "path", ["", "/named", str(tmp_path), ""])
    assert search_path() == ["/named", str(tmp_path), str(OURS)]
