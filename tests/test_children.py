"""The processes that tests are given. Oracles: the kernel's list of threads; exit codes and streams of ``python -m bpfree``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import children
import pytest

pytestmark = pytest.mark.time_dependent


def look(path: str) -> None:
    """Write down which heavy modules are loaded, and how many threads the parent has."""
    loaded = sorted({"torch", "mlflow", "bpfree_noprop"} & set(sys.modules))
    Path(path).write_text(f"{loaded} {len(os.listdir(f'/proc/{os.getppid()}/task'))} {os.environ['MINE']} {os.getpgid(0) == os.getpid()}")


@pytest.mark.skipif(not children.FORKS, reason="fresh processes on this system")
def test_they_are_forked_from_one_without_threads(tmp_path: Path) -> None:
    assert children.Child(look, "seen", folder=tmp_path, group=True, MINE="x").wait(60) == 0
    assert (tmp_path / "seen").read_text() == "['bpfree_noprop', 'mlflow', 'torch'] 1 x True"


@pytest.mark.parametrize("words", [("rules", "dfa"), ("train", "rule=nothing"), ("no-command",)])
def test_commands_say_and_return_what_a_fresh_process_does(workplace: Path, words: tuple[str, ...]) -> None:
    ours = children.run(*words)
    fresh = subprocess.run([sys.executable, "-m", "bpfree", *words], capture_output=True, text=True, check=False)
    assert (ours.returncode, ours.stdout, ours.stderr) == (fresh.returncode, fresh.stdout, fresh.stderr)


def test_a_child_is_waited_for_and_killed() -> None:
    child = children.Child(time.sleep, 600)
    assert child.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0)
    child.kill()
    assert child.communicate() == ("", "")
    assert child.returncode == -signal.SIGKILL


def test_an_exception_is_told() -> None:
    child = children.Child(int, "no number")
    assert "ValueError" in child.communicate()[1]
    assert child.returncode == 1
