"""How the driver of a run on Ray ends. Oracle: a cluster that is made up, whose processes have answered in known ways."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bpfree import BpfreeError, ray_team
from bpfree.ray_team import Order
from bpfree.run import Run

ELSEWHERE = "another process of this run has ended, or cannot be reached"


class Cluster:
    """A task is its answer, or the exception that getting it raises; ``None`` never answers."""

    exceptions = SimpleNamespace(RayError=OSError)

    def wait(self, tasks: Sequence[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        return [task for task in tasks if task is not None], [task for task in tasks if task is None]

    def get(self, tasks: Any) -> Any:
        found = tasks if isinstance(tasks, list) else [tasks]
        for task in found:
            if isinstance(task, Exception):
                raise task
        return tasks


def order(folder: Path, *, checkpoint: bool = False) -> Order:
    made = Order([], None, str(folder), "a-run", "")
    if checkpoint:
        (made.place / "checkpoints").mkdir(parents=True)
        (made.place / "checkpoints" / "last.pt").touch()
    return made


def test_the_first_process_gives_the_run(tmp_path: Path) -> None:
    first, second = Run("one", "one"), Run("two", "two")
    assert ray_team._wait(Cluster(), [(first, 0, ""), (second, 0, "")], order(tmp_path)) is first


@pytest.mark.parametrize(
    ("answers", "code", "words"),
    [
        ([(None, 1, ELSEWHERE), (None, 3, "no room on the disk")], 3, "no room on the disk"),
        ([(None, 2, "unknown rule"), (None, 2, "the first process failed: unknown rule")], 2, "unknown rule"),
        ([(Run("one", "one"), 0, ""), (None, 1, "its disk is full")], 1, "its disk is full"),
        ([(None, 143, "stopped by SIGTERM\n  fix: ..."), (None, 143, "stopped by SIGTERM")], 143, "--resume"),
    ],
)
def test_the_cause_is_told_with_its_code(tmp_path: Path, answers: list[Any], code: int, words: str) -> None:
    with pytest.raises(BpfreeError) as caught:
        ray_team._wait(Cluster(), answers, order(tmp_path, checkpoint=True))
    assert caught.value.exit_code == code
    assert words in str(caught.value)
    assert "the first process failed" not in str(caught.value)


def test_others_have_a_moment_when_one_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_team, "GRACE", 0.05)
    with pytest.raises(BpfreeError, match="its disk is full"):
        ray_team._wait(Cluster(), [None, (None, 1, "its disk is full")], order(tmp_path))


@pytest.mark.parametrize(("checkpoint", "words"), [(True, "bpfree train --resume"), (False, "start it again")])
def test_a_process_that_died(tmp_path: Path, checkpoint: bool, words: str) -> None:
    """Ray says so by an exception of its own."""
    made = order(tmp_path, checkpoint=checkpoint)
    members = [SimpleNamespace(standing=SimpleNamespace(remote=lambda: OSError("the actor died")))]
    with pytest.raises(BpfreeError) as caught:
        ray_team._together(Cluster(), members, made)
    assert "a process of the run has died (OSError)" in str(caught.value)
    assert words in str(caught.value)
