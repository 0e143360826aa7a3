"""``bpfree runs``. Oracles: runs made by hand, a process that is killed, and the table of runs in the store."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest
from study_kit import call

from bpfree.record.folder import RunFolder, read_run
from bpfree.record.log import EventLog

FACTS = {"format": 2, "name": "n", "tags": {}, "total_epochs": 3, "resumed": False, "epoch": 0}


def begun(folder: Path, **config: object) -> EventLog:
    log = RunFolder(folder).log
    log.append("begin", id=folder.name, config={"tracking.enabled": False, **config}, **FACTS)
    log.append("epoch", epoch=1, metrics={"epoch": 1.0})
    return log


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, tuple[str, bool]]:
    assert call("runs", "--json", *words) == 0
    return {line["run"]: (line["status"], line["resumable"]) for line in json.loads(capsys.readouterr().out)}


def test_runs_and_how_they_ended(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with begun(Path("runs/finished")) as log:
        log.append("end", status="finished", reason="", epoch=3, result={"test/accuracy": 0.5}, tags={})
    begun(Path("runs/killed")).close()
    begun(Path("runs/saved")).close()
    (Path("runs/saved/checkpoints")).mkdir()
    (Path("runs/saved/checkpoints/last.pt")).touch()
    running = begun(Path("runs/running"))
    Path("runs/studies").mkdir()
    Path("runs/a file").touch()
    expected = {"finished": ("finished", False), "killed": ("interrupted", False), "saved": ("interrupted", True)}
    assert listed(capsys) == expected | {"running": ("running", False)}
    assert read_run("runs/killed").reason == "its process was killed"
    assert listed(capsys) == expected | {"running": ("running", False)}
    assert Path("runs/killed/events.jsonl").read_text().count('"end"') == 1
    running.close()
    assert call("runs") == 0
    lines = {words[0]: words[1:] for words in map(str.split, capsys.readouterr().out.splitlines())}
    assert lines["finished"] == ["finished", "3", "of", "3", "accuracy", "50.00", "%"]
    assert lines["running"][:6] == ["interrupted:", "its", "process", "was", "killed", "1"]


def test_dead_runs_are_removed_when_asked(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun(Path("runs/killed")).close()
    begun(Path("runs/saved")).close()
    (Path("runs/saved/checkpoints")).mkdir()
    (Path("runs/saved/checkpoints/last.pt")).touch()
    assert listed(capsys, "--clean") == {"killed": ("removed", False), "saved": ("interrupted", True)}
    assert not Path("runs/killed").exists()
    assert listed(capsys) == {"saved": ("interrupted", True)}


def test_a_killed_run_ends_in_its_store(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """MLflow shows it as killed, also where nothing was sent before."""
    begun(Path("runs/killed"), **{"tracking.enabled": True, "tracking.system": False}).close()
    listed(capsys)
    with sqlite3.connect("mlflow.db") as store:
        assert store.execute("select status from runs").fetchall() == [("KILLED",)]


def test_a_folder_that_is_not_there(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("runs", "elsewhere") == 2
    assert "no such folder" in capsys.readouterr().err
