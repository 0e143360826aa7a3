"""A run's log. Oracles: a strict JSON reader, what was appended, and the run that observers saw."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bpfree.errors import BpfreeError
from bpfree.record import log as log_module
from bpfree.record.folder import Cursor, RunFolder, read_run
from bpfree.record.log import EventLog
from bpfree.record.recorder import Recorder
from bpfree.run import Run


def lines(path: Path) -> list[dict[str, Any]]:
    """The file, read strictly."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def recorded(folder: Path, epochs: range, *, status: str | None = "finished", **fields: Any) -> tuple[Run, list[dict[str, float]]]:
    """A session that completes some epochs, and ends unless the status is ``None``; its metrics."""
    run, recorder, told = Run("id", "name", folder=folder, **fields), Recorder(), []
    recorder.run_start(run)
    for number in epochs:
        run.epoch = number
        told.append({"epoch": float(number), "train/loss": 1 / number})
        recorder.epoch_end(run, told[-1])
    if status is None:
        assert recorder._log is not None
        recorder._log.close()  # as the system does when a process is killed
    else:
        run.status = status  # type: ignore[assignment]
        recorder.run_end(run)
    return run, told


def test_a_run_is_read_as_it_was(tmp_path: Path) -> None:
    """Round trip, non-finite numbers and artifacts too; nothing else is written."""
    result = {"test/accuracy": 0.5, "test/loss": math.inf}
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "curves.svg").write_bytes(b"<svg/>")
    artifacts = {"curves": tmp_path / "plots" / "curves.svg", "other": Path(__file__)}
    run, told = recorded(
        tmp_path, range(1, 3), config={"seed": 1}, tags={"rule": "dfa"}, total_epochs=2, result=result, artifacts=artifacts
    )
    seen = read_run(tmp_path)
    assert (seen.id, seen.name, seen.config, seen.tags, seen.total_epochs) == (run.id, run.name, run.config, run.tags, 2)
    assert (seen.status, seen.epoch, seen.result, seen.history) == ("finished", 2, result, told)
    assert seen.artifacts == {"plots/curves.svg": tmp_path / "plots" / "curves.svg"}
    assert lines(tmp_path / "events.jsonl")[-1]["result"]["test/loss"] == "Infinity"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.jsonl", "plots"]


def test_how_far_an_evaluation_has_come_is_not_kept(tmp_path: Path) -> None:
    """Between two steps the number of the step stays the same, and a store keeps one value for each. Oracle: the lines of the log."""
    run, recorder = Run("id", "name", folder=tmp_path), Recorder()
    recorder.run_start(run)
    recorder.progress(run, {"step": 12.0, "rule/loss": 1.0})
    for share in (0.25, 0.5):
        recorder.progress(run, {"step": 12.0, "evaluation": share})
    recorder.progress(run, {"step": 12.0, "features": 0.5})
    recorder.run_end(run)
    found = [event["metrics"] for event, _ in RunFolder(tmp_path).log.read() if event["event"] == "progress"]
    assert found == [{"step": 12.0, "rule/loss": 1.0}]


def test_a_resumed_run_keeps_each_epoch_once(tmp_path: Path) -> None:
    """Killed in epoch 5 in the middle of a line, resumed after epoch 2: then 3 and 4 again."""
    _, told = recorded(tmp_path, range(1, 5), status=None)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "epoch", "tim')
    assert read_run(tmp_path).status == "running"
    recorded(tmp_path, range(3, 6), resumed=True, epoch=2)
    seen = read_run(tmp_path)
    assert [metrics["epoch"] for metrics in seen.history] == [1, 2, 3, 4, 5]
    assert seen.history[:2] == told[:2]
    assert [line["event"] for line in lines(tmp_path / "events.jsonl")] == ["begin", *["epoch"] * 4, "begin", *["epoch"] * 3, "end"]


def test_a_run_that_begins_again_forgets_its_epochs(tmp_path: Path) -> None:
    recorded(tmp_path, range(1, 5), status=None)
    recorded(tmp_path, range(1, 2), reopened=True)
    assert [metrics["epoch"] for metrics in read_run(tmp_path).history] == [1]


def test_what_follows_the_end(tmp_path: Path) -> None:
    """Further results and tags count; lines that are damaged, or mean nothing, do not."""
    recorded(tmp_path, range(1, 2), result={"test/accuracy": 0.5})
    with RunFolder(tmp_path).log as log:
        log.append("result", metrics={"train/accuracy": 0.75})
        log.append("tags", tags={"parent": "x"})
        log.append("something of a later version", metrics={"a": 1})
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "result", "time": 1, "metrics": {"test/accuracy": "ninety"}}\n{"event": "end", "time": 1}\n[]\n\n{"a"\n')
    seen = read_run(tmp_path)
    assert (seen.result, seen.tags, seen.status) == ({"test/accuracy": 0.5, "train/accuracy": 0.75}, {"parent": "x"}, "finished")


def test_paths_stay_inside_the_folder(tmp_path: Path) -> None:
    """Of somebody else's log: no absolute path, none upwards, no symbolic link out of the folder."""
    run = tmp_path / "run"
    recorded(run, range(1, 2))
    (tmp_path / "secret").write_text("secret")
    (run / "link").symlink_to(tmp_path / "secret")
    (run / "mine").write_text("mine")
    (run / "also").symlink_to(run / "mine")
    with RunFolder(run).log as log:
        for name in ("../secret", str(tmp_path / "secret"), "link", "mine", "also", ".", ""):
            log.append("artifact", path=name)
    assert set(read_run(run).artifacts) == {"mine", "also"}


class Disk:
    """``os.write`` on a disk that is full while ``full``: it takes some bytes of the first line, then none."""

    def __init__(self) -> None:
        self.full, self.partly, self.write = False, True, os.write

    def __call__(self, file: int, data: bytes) -> int:
        if not self.full:
            return self.write(file, data)
        if self.partly:
            self.partly = False
            return self.write(file, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Disk, EventLog]:
    """A log whose disk is full since its second event."""
    disk = Disk()
    monkeypatch.setattr(log_module.os, "write", disk)
    log = EventLog(tmp_path / "events.jsonl")
    log.append("a")
    disk.full = True
    log.append("b")
    return disk, log


def test_a_disk_that_is_full_for_a_while(filled: tuple[Disk, EventLog]) -> None:
    """What could not be written is written later, in order."""
    disk, log = filled
    log.append("c")
    assert [event["event"] for event, _ in log.read()] == ["a"]
    disk.full = False
    log.append("d")
    log.close()
    assert [line["event"] for line in lines(log.path)] == ["a", "b", "c", "d"]


def test_a_disk_that_stays_full(filled: tuple[Disk, EventLog]) -> None:
    """The end says so, with disk and file: exit status 1."""
    _, log = filled
    with pytest.raises(BpfreeError, match="No space left on device") as caught:
        log.close(patience=0.0)
    assert (caught.value.exit_code, caught.value.where) == (1, str(log.path))


@pytest.mark.time_dependent
def test_one_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one is refused; the system frees the log of a process that is killed."""
    monkeypatch.setattr(log_module, "LOCK_SECONDS", 0.0)
    path = tmp_path / "events.jsonl"
    code = f"from pathlib import Path; from bpfree.record.log import EventLog\nEventLog(Path({str(path)!r})).append('a'); print(); input()"
    with subprocess.Popen([sys.executable, "-uc", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"\n"
        assert EventLog(path).is_held()
        with pytest.raises(BpfreeError, match="another process"):
            EventLog(path).append("b")
        holder.kill()
        holder.wait()
    assert not EventLog(path).is_held()
    with EventLog(path) as log:
        log.append("c")
    assert [line["event"] for line in lines(path)] == ["a", "c"]


def test_offsets(tmp_path: Path) -> None:
    """A reader that continues from any offset it was given sees the rest, and each event once."""
    recorded(tmp_path, range(1, 6))
    log = RunFolder(tmp_path).log
    everything = list(log.read())
    for place, (_, offset) in enumerate(everything):
        assert list(log.read(offset)) == everything[place + 1 :]
    assert everything[-1][1] == log.size
    assert [event["event"] for event, _ in log.read(without=("epoch",))] == ["begin", "end"]


def test_copies_and_moves(tmp_path: Path) -> None:
    """A copy is another run, as long as the first one is there; what was moved is the same one."""
    run = tmp_path / "run"
    recorded(run, range(1, 2))
    (tmp_path / "x").mkdir()
    Cursor("store", 10, {"mlflow_run_id": "x"}).write(RunFolder(run).cursor("mlflow"))
    assert RunFolder(run).name_copy() is None
    assert RunFolder(tmp_path / "x" / ".." / "run").name_copy() is None  # by another name
    (tmp_path / "link").symlink_to(run)
    assert RunFolder(tmp_path / "link").name_copy() is None
    shutil.copytree(run, tmp_path / "copy")
    shutil.copytree(run, tmp_path / "elsewhere" / "run")
    run.rename(tmp_path / "moved")
    assert RunFolder(tmp_path / "moved").name_copy() is None
    assert RunFolder(tmp_path / "copy").name_copy() is None  # nothing is at the first place any more
    (tmp_path / "moved").rename(run)
    assert RunFolder(tmp_path / "copy").name_copy() == "copy"
    assert RunFolder(tmp_path / "elsewhere" / "run").name_copy() == "run"
    assert [read_run(path).id for path in (run, tmp_path / "copy", tmp_path / "elsewhere" / "run")] == ["id", "copy", "run"]
    assert Cursor.read(RunFolder(tmp_path / "copy").cursor("mlflow")).offset == 0


def test_without_a_folder(tmp_path: Path) -> None:
    """Nothing is written, and there is nothing to read."""
    run, recorder = Run("id", "name"), Recorder()
    recorder.run_start(run)
    recorder.epoch_end(run, {"epoch": 1.0})
    recorder.run_end(run)
    with pytest.raises(BpfreeError, match="no record of a run"):
        read_run(tmp_path)


def test_a_folder_in_place_of_a_log_is_no_log(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").mkdir()
    with pytest.raises(BpfreeError, match="no record of a run"):
        read_run(tmp_path)


def test_a_folder_in_the_place_of_the_log_is_refused_before_training(tmp_path: Path) -> None:
    """A full disk may have room again; a folder stays one."""
    (tmp_path / "events.jsonl").mkdir()
    with pytest.raises(BpfreeError, match="the run's record is no file"):
        Recorder().run_start(Run("id", "name", folder=tmp_path))
