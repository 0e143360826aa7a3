"""Work in a child process: what it answers, what it cannot reach, and that nothing of it stays."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bpfree.certify.child import in_child
from bpfree.errors import BpfreeError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the work is done in the same process")


def test_it_answers_with_what_the_work_returns() -> None:
    done = in_child(lambda: {"pid": os.getpid(), "text": "x" * 200_000})
    assert done.result["pid"] != os.getpid()
    assert len(str(done.result["text"])) == 200_000


def test_it_has_an_empty_home_and_no_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BPFREE_DATA", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "earlier").touch()

    def work() -> tuple[list[str], list[str], str]:
        return os.listdir(Path.home()), [name for name in ("BPFREE_DATA", "MLFLOW_TRACKING_PASSWORD") if name in os.environ], os.getcwd()

    here = os.getcwd()
    files, secrets, folder = in_child(work).result
    assert (files, secrets) == ([], [])
    assert folder != here
    assert os.getcwd() == here
    assert not Path(folder).exists()
    assert os.environ["HOME"] == str(tmp_path)
    assert in_child(os.getcwd, stay=True).result == here


def test_it_has_no_network_or_says_so() -> None:
    def work() -> bool:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=2).close()
        except OSError:
            return False
        return True

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = in_child(work)
    assert done.result == any("network" in words for words in done.open)
    assert any("digits" in words for words in done.open)


def test_errors_are_told_and_a_death_too() -> None:
    def fails() -> None:
        raise BpfreeError("no", where="there", fix="do this")

    def breaks() -> None:
        raise ArithmeticError("of its own")

    with pytest.raises(BpfreeError, match="no") as caught:
        in_child(fails)
    assert (caught.value.where, caught.value.fix) == ("there", "do this")
    with pytest.raises(BpfreeError, match="ArithmeticError: of its own"):
        in_child(breaks)
    with pytest.raises(BpfreeError, match="ended without an answer"):
        in_child(lambda: os._exit(3))
    with pytest.raises(BpfreeError, match="takes too long"):
        in_child(lambda: time.sleep(60), seconds=0.2)


def test_processes_that_it_started_end_with_it(tmp_path: Path) -> None:
    def work() -> int:
        return subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]).pid

    def lives() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    pid, tries = in_child(work).result, 1000
    while lives() and (tries := tries - 1):
        time.sleep(0.01)
    assert not lives()
