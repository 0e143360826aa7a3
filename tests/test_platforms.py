"""What bpfree needs of the system: without what only Unix, or only Linux, has, everything imports, trains and compares."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bpfree import UsageError, system
from bpfree.files import remove_abandoned, write_text
from bpfree.record.log import EventLog
from bpfree.study import executors
from bpfree.study.concurrency import present
from bpfree.study.store import CellStore

BARE = Path(__file__).with_name("bare_system.py")
TWO = """
title: Two cells
tasks: [digits]
rules: [frozen, linear]
settings: {budget.epochs: 1, tracking.enabled: false, threads: 1}
seeds: 1
floor: false
"""


def bare(folder: Path, words: str) -> str:
    """What commands say on a system without fcntl, resource, SIGHUP, fork and the like."""
    done = subprocess.run([sys.executable, str(BARE), words], capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_system_without_what_unix_has_imports_trains_and_compares(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(TWO)
    said = bare(tmp_path, "--help; rules; train rule=dfa budget.epochs=1 tracking.enabled=false -q; study run two.yaml --jobs 1")
    assert said.count("\nexit 0") == 4
    assert "imported" in said
    assert [path.suffix for path in (tmp_path / "runs" / "studies" / "two" / "cells").glob("*.json")] == [".json", ".json"]
    assert (tmp_path / "runs" / "studies" / "two" / "report.html").is_file()


class Unlocked:
    """The module fcntl on a file system without locks."""

    LOCK_EX, LOCK_SH, LOCK_NB = 2, 1, 4

    def __init__(self, error: OSError) -> None:
        self.error = error

    def flock(self, file: int, how: int) -> None:
        raise self.error


def test_a_file_is_locked_for_others_and_shared_with_those_that_share(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as first, path.open("rb") as second, path.open("rb") as third:
        assert system.lock(first.fileno())
        assert not system.lock(second.fileno())
        assert not system.lock(second.fileno(), shared=True)
        first.close()
        assert system.lock(second.fileno(), shared=True)
        assert system.lock(third.fileno(), shared=True)
        assert not system.lock(third.fileno())


@pytest.mark.parametrize("missing", [True, False], ids=["no module", "no locks in the file system"])
def test_without_locks_everything_is_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: bool) -> None:
    monkeypatch.setattr(system, "fcntl", None if missing else Unlocked(OSError(errno.ENOLCK, "no locks")))
    with pytest.raises(OSError, match="locks"), (tmp_path / "own").open("wb") as file:
        system.lock(file.fileno())
    write_text(tmp_path / "page.txt", "all of it")
    (tmp_path / f".page.txt-{'0' * 8}").touch()
    remove_abandoned(tmp_path, "*.txt")  # without locks it may still be being written
    assert sorted(path.name for path in tmp_path.glob("*page*")) == [f".page.txt-{'0' * 8}", "page.txt"]
    with EventLog(tmp_path / "events.jsonl") as log:
        log.append("tags", tags={})
        assert not log.is_held()
    assert [event["event"] for event, _ in log.read()] == ["tags"]
    with CellStore(tmp_path, "study").lock("cell") as free:
        assert free
    with present(tmp_path / "cells") as count:
        assert count.most == 1


def test_a_line_that_a_killed_process_began_is_cut_off_without_pread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pread", raising=False)
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event": "tags", "time": 1, "tags": {}}\n{"event": "epo')
    with EventLog(path) as log:
        log.append("tags", tags={})
    assert len(path.read_bytes().splitlines()) == 2
    assert [event["event"] for event, _ in log.read()] == ["tags", "tags"]


def request(**facts: Any) -> Any:
    return SimpleNamespace(**({"on_gpu": False, "jobs": None, "usual": 1, "left": 4, "threads": 1} | facts))


def test_without_pools_cells_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(system, "HAS_POOLS", False)
    assert isinstance(executors.local(request(usual=2), executors.NoOptions()), executors.InProcess)
    assert "one after the other" in caplog.text
    with pytest.raises(UsageError, match="several cells at a time") as refused:
        executors.local(request(jobs=2), executors.NoOptions())
    assert "--jobs 1" in str(refused.value.fix)


def test_processors_are_those_of_the_machine_where_none_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert system.processors() == 6
