"""``bpfree runs``. Oracles: runs made by hand, a process that is killed, the table of runs in the store, and the files that are left."""

from __future__ import annotations

import datetime
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from study_kit import call

from bpfree import UsageError
from bpfree.record.folder import RunFolder, read_run
from bpfree.record.log import EventLog
from bpfree.record.runs import since, value_of
from bpfree.run import Run

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


def made(name: str, *, status: str = "finished", accuracy: float | None = None, history: tuple[float, ...] = (), **config: Any) -> Path:
    """Make a run's folder with a log, and a checkpoint where it is finished."""
    folder = Path("runs") / name
    log = RunFolder(folder).log
    tags = {"study": str(config.pop("study"))} if "study" in config else {}
    facts = {"format": 2, "name": name, "tags": tags, "total_epochs": 9, "resumed": False, "epoch": 0}
    metrics = {"accuracy": {"greater": True, "share": True}, "loss": {"greater": False, "share": False}}
    settings = {"tracking.enabled": False, **{key.replace("__", "."): value for key, value in config.items()}}
    with log:
        log.append("begin", id=name, config=settings, metrics=metrics, **facts)
        for epoch, value in enumerate(history, 1):
            log.append("epoch", epoch=epoch, metrics={"epoch": float(epoch), "val/accuracy": value, "val/loss": 1 - value})
        result = {} if accuracy is None else {"test/accuracy": accuracy, "test/loss": 1 - accuracy}
        log.append("end", status=status, reason="" if status == "finished" else "a reason", epoch=len(history), result=result, tags={})
    if status in ("finished", "interrupted"):
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "last.pt").write_bytes(b"x" * 1000)
    return folder


@pytest.fixture
def several(workplace: Path) -> None:
    made("a", accuracy=0.7, rule__name="dfa", task__name="digits", optimizer__lr=0.1)
    made("b", accuracy=0.9, rule__name="noprop-dt", task__name="digits", optimizer__lr=0.01)
    made("c", status="failed", rule__name="noprop-ct", task__name="mnist", optimizer__lr=None)
    made("d", accuracy=0.8, rule__name="dfa", task__name="mnist", optimizer__lr=0.1, study="table")
    made("e", status="interrupted", rule__name="dfa", task__name="digits", optimizer__lr=0.1)


def names(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert call("runs", *words, "--json") == 0
    return "".join(line["run"] for line in json.loads(capsys.readouterr().out))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "abcde"),
        (("list", "runs"), "abcde"),
        (("rule=dfa",), "ade"),
        (("runs", "rule=noprop*"), "bc"),
        (("rule=dfa", "task=digits"), "ae"),
        (("status=finished",), "abd"),
        (("status=f*",), "abcd"),
        (("optimizer.lr=1e-1",), "ade"),
        (("optimizer.lr=none",), "c"),
        (("study=table",), "d"),
        (("--sort", "accuracy"), "bdace"),
        (("--sort", "test/loss"), "bdace"),
        (("--sort", "accuracy", "--limit", "2"), "bd"),
        (("--since", "1h"), "abcde"),
        (("--since", "2199-01-01"), ""),
    ],
)
def test_runs_are_filtered_and_sorted(words: tuple[str, ...], expected: str, several: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert names(capsys, *words) == expected


@pytest.mark.parametrize(
    ("words", "what", "fix"),
    [
        (("status=finised",), "unknown status 'finised'", "finished"),
        (("optimizer.leraning=1",), "no run has the setting", "did you mean optimizer.lr"),
        (("--sort", "acuracy"), "no run has a number 'acuracy'", "did you mean accuracy"),
        (("--since", "yesterdy"), "is no time", "2026-11-30"),
        (("runs", "others"), "two folders of runs", "KEY=VALUE"),
        (("show", "x"), "no such run", ""),
        (("compare", "a"), "one run is nothing to compare", "two runs"),
        (("delete",), "which runs?", "--failed"),
        (("delete", "x"), "no such run", "bpfree runs"),
    ],
)
def test_what_cannot_be_asked_is_said(
    words: tuple[str, ...], what: str, fix: str, several: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("runs", *words) == 2
    said = capsys.readouterr().err
    assert what in said
    assert fix in said


def test_times_are_dates_or_how_long_ago() -> None:
    now = datetime.datetime(2026, 3, 10, 12, 30)
    assert since("90m", now) == datetime.datetime(2026, 3, 10, 11)
    assert since("2w", now) == datetime.datetime(2026, 2, 24, 12, 30)
    assert since("today", now) == datetime.datetime(2026, 3, 10)
    assert since("2026-03-01 07:00", now) == datetime.datetime(2026, 3, 1, 7)
    with pytest.raises(UsageError):
        since("7", now)


def test_numbers_of_a_run_by_their_keys() -> None:
    run = Run("i", "n", result={"test/accuracy": 0.5, "train/seconds": 3.0}, history=[{"val/loss": 2.0}, {"val/loss": 1.0}])
    assert [value_of(run, key) for key in ("accuracy", "test/accuracy", "seconds", "val/loss", "loss")] == [0.5, 0.5, 3.0, 1.0, 1.0]


def test_runs_beside_each_other(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made("a", accuracy=0.7, history=(0.1, 0.5), rule__name="dfa", optimizer__lr=0.1, seed=0)
    made("b", accuracy=0.9, history=(0.3, 0.5, 0.9), rule__name="dfa", optimizer__lr=0.2, rule__scale=1.0, seed=0)
    assert call("runs", "compare", "a", "runs/b", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"] == {"optimizer.lr": [0.1, 0.2], "rule.scale": [None, 1.0]}
    assert found["results"]["test/accuracy"] == [0.7, 0.9]
    assert found["curves"]["val/accuracy"] == [[0.1, 0.5], [0.3, 0.5, 0.9]]
    assert call("runs", "compare", "a", "b") == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["optimizer.lr", "0.1", "0.2"] in [line.split() for line in lines]
    assert "val/accuracy  A  ▁▅  10.00 % to 50.00 %" in lines  # one scale, from 0.1 to 0.9
    assert "val/accuracy  B  ▃▅█  30.00 % to 90.00 %" in lines
    assert all(len(line) <= 80 for line in lines)


def test_a_run_is_shown(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made("a", accuracy=0.7, history=(0.1, 0.5), rule__name="dfa", seed=0, study="table")
    assert call("runs", "show", "a", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["status"], found["config"]["rule.name"], found["result"]["test/accuracy"]) == ("finished", "dfa", 0.7)
    assert [epoch["val/accuracy"] for epoch in found["history"]] == [0.1, 0.5]
    assert call("runs", "show", "a") == 0
    text = capsys.readouterr().out
    for words in ("test accuracy        70.00 %", "epochs  2 of 9", "study   table", "▁█  10.00 % to 50.00 %"):
        assert words in text


# --- deleting -----------------------------------------------------------------------------------------------------------------


def there() -> str:
    return "".join(sorted(path.name for path in Path("runs").iterdir()))


def test_nothing_is_deleted_without_yes(several: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("runs", "delete", "--failed", "a") == 0
    assert "2 of 2 runs" in (said := capsys.readouterr().out)
    assert "--yes deletes them" in said
    assert there() == "abcde"
    assert call("runs", "delete", "--failed", "a", "--yes") == 0
    assert there() == "bde"


def test_failed_runs_are_those_without_a_checkpoint(several: None, capsys: pytest.CaptureFixture[str]) -> None:
    begun(Path("runs/k")).close()  # killed before the first checkpoint
    made("n", status="diverged", rule__name="dfa")
    assert call("runs", "delete", "--failed", "--yes", "--json") == 0
    assert [Path(line["run"]).name for line in json.loads(capsys.readouterr().out) if line["deleted"]] == ["c", "k", "n"]
    assert there() == "abde"
    assert call("runs", "delete", "status=interrupted", "rule=dfa", "--yes") == 0
    assert there() == "abd"


def test_what_is_no_run_is_never_deleted(several: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor a run that is in use, one of a study, or what symbolic links point to."""
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "kept").touch()
    Path("runs/link").symlink_to(Path("runs/a").resolve())
    Path("runs/notes").mkdir()
    Path("runs/notes/text").touch()
    Path("runs/a/outside").symlink_to(other)
    running = begun(Path("runs/running"))
    assert call("runs", "delete", "link", "notes", "running", "d", "..", "/", "--yes", "--json") == 0
    kept = {line["run"]: line["kept"] for line in json.loads(capsys.readouterr().out)}
    assert list(kept.values()) == [
        "a symbolic link, not a run's folder",
        "no run's folder",
        "in use by a process",
        "a run of the study table, whose report needs it",
        "no run's folder",
        "no run's folder",
    ]
    assert there() == "abcdelinknotesrunning"
    running.close()
    assert call("runs", "delete", "a", "d", "--with-studies", "--yes") == 0
    assert there() == "bcelinknotesrunning"
    assert (other / "kept").exists()


def test_a_folder_that_cannot_be_changed_stays_whole(
    several: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "rename", refuse)
    assert call("runs", "delete", "a", "--yes") == 1
    assert "cannot delete the run: Permission denied" in capsys.readouterr().err
    assert RunFolder(Path("runs/a")).last.is_file()
