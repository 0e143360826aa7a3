"""A study on a real cluster of Ray, on this machine's loopback, with two worker processes.

Oracles: an undisturbed study in one process, bit for bit; the process identifiers of the workers.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from study_kit import call, mlflow_runs, outcomes, plugin_on_path, untimed

from bpfree import ray_cluster
from bpfree.ray_cluster import connect, import_ray

ray = pytest.importorskip("ray", reason="Ray is not installed")

PLUGIN = '''
import os
import time
from pathlib import Path

import bpfree
from bpfree.baselines import DFA

bpfree_api = 2


class Watched(DFA):
    """Says in which process it learns, and takes its time."""

    def credit(self, batch, step):
        if step.index % 20 == 0:
            Path(os.environ["WATCHED"], f"{os.getpid()}-{step.index}").touch()
        time.sleep(0.02)
        return super().credit(batch, step)


@bpfree.hookimpl
def bpfree_rules():
    return {"watched": Watched}
'''
STUDY = """
title: Watched
settings: {task: digits, device: cpu, network.width: 16, budget.epochs: 4}
seeds: 2
floor: false
probe: false
rules: [watched, dfa]
"""


@pytest.fixture
def site(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (workplace / "seen").mkdir()
    monkeypatch.setenv("WATCHED", str(workplace / "seen"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with plugin_on_path(workplace / "site", "watched", PLUGIN):
        yield workplace
        ray.shutdown()


def seen(folder: Path) -> set[int]:
    """Processes in which a rule has learned."""
    return {int(path.name.split("-")[0]) for path in (folder / "seen").iterdir()}


@pytest.mark.slow
def test_a_cluster_of_two_workers_one_of_which_is_killed_loses_nothing(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("watched.yaml").write_text(STUDY)
    assert call("study", "run", "watched.yaml", "output=undisturbed/runs", "--quiet") == 0
    own = seen(site)
    assert own == {os.getpid()}
    killed = []

    def kill() -> None:
        """The first worker of the cluster that is in its second epoch, so that it has a checkpoint to continue from."""
        while not killed:
            for path in (site / "seen").iterdir():
                process, step = map(int, path.name.split("-"))
                if process not in own and step >= 40:
                    os.kill(process, signal.SIGKILL)
                    killed.append(process)
                    return
            time.sleep(0.01)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    try:
        assert call("study", "run", "watched.yaml", "--executor", "ray", "--jobs", "2", "--quiet") == 0
    finally:
        killed.append(0)
        thread.join()
    assert len(killed) == 2
    workers = seen(site) - own
    assert len(workers) >= 3  # two, and the one that came for the killed one
    assert killed[0] in workers

    ours, theirs = outcomes(), outcomes("undisturbed/runs/studies")
    assert {outcome["status"] for outcome in ours} == {"finished"}
    for first, second in zip(ours, theirs, strict=True):
        assert untimed(first["result"]) == untimed(second["result"])
        mine, yours = (
            torch.load(Path(root) / known["run"] / "checkpoints" / "last.pt", weights_only=True)["weights"]
            for root, known in (("runs", first), ("undisturbed/runs", second))
        )
        assert all(torch.equal(mine[key], yours[key]) for key in yours)
    assert max(outcome["parallel"] for outcome in ours) == 2

    # the same store: one run for each cell under one parent
    runs = mlflow_runs()
    cells = [run for run in runs if "study_cell" in run["tags"]]
    assert len(cells) == 4
    assert len(runs) == 5
    assert all(count == 1 for run in cells for count in run["counts"].values())
    assert not ray.is_initialized()


@pytest.mark.slow
def test_results_come_back_from_machines_that_do_not_share_the_folder(site: Path) -> None:
    """What a worker returns is noted where the study is run, if it is not there already."""
    from bpfree.study import cells
    from bpfree.study.command import Jobs, execute
    from bpfree.study.executor import Ended
    from bpfree.study.executors import InProcess
    from bpfree.study.file import read_study
    from bpfree.study.store import CellStore
    from bpfree.study.worker import Job
    from bpfree.study.worklist import Worklist

    class Elsewhere(InProcess):
        def start(self, job: Job) -> None:
            from dataclasses import replace

            super().start(replace(job, store=CellStore(Path("another-machine/runs"), job.store.study)))

        def wait(self) -> list[Ended]:
            return super().wait()

    class Silent:
        def started(self, *arguments: object) -> None: ...
        def waiting(self, *arguments: object) -> None: ...
        def ended(self, *arguments: object) -> None: ...
        def say(self, text: str) -> None: ...

    Path("watched.yaml").write_text(STUDY.replace("[watched, dfa]", "[dfa]").replace("epochs: 4", "epochs: 1, tracking.enabled: false"))
    plan = cells.plan(read_study(Path("watched.yaml")))
    worklist = Worklist(plan)
    execute(worklist, Jobs(worklist), Elsewhere(), Silent())
    assert {outcome["status"] for outcome in outcomes()} == {"finished"}
    assert all(outcome["history"] for outcome in outcomes())
    assert worklist.complete()


@pytest.mark.parametrize(
    ("address", "variable", "own"), [(None, "", True), ("local", "", True), (None, "local", True), ("auto", "", False)]
)
def test_which_clusters_are_its_own(address: str | None, variable: str, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", variable)
    assert ray_cluster._is_own(address) is own
    assert not ray_cluster._is_own("127.0.0.1:6379")


def surroundings() -> tuple[list[str], dict[str, str], str]:
    """What a task of the cluster sees."""
    import filelock

    return sys.path, dict(os.environ), str(filelock.__file__)


def listening() -> set[tuple[str, int]]:
    """Where this process and its children listen."""
    here = psutil.Process()
    sockets = [socket for one in (here, *here.children(recursive=True)) for socket in one.net_connections("inet")]
    return {(socket.laddr.ip.removeprefix("::ffff:"), socket.laddr.port) for socket in sockets if socket.status == psutil.CONN_LISTEN}


@pytest.mark.slow
def test_a_cluster_of_its_own_lets_no_one_in(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracles: the sockets that the kernel lists; a file in the current folder named as a library; a task's environment and path."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))))  # empty: here
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somebody:hunter2@127.0.0.1:9")
    Path("filelock.py").write_text("raise SystemExit('executed')")
    before = listening()  # of other tests in this process
    ours = import_ray(None)
    assert connect(ours, None, processors=1)
    path, environment, library = ours.get(ours.remote(surroundings).remote())
    assert str(site) not in path
    assert Path(library).parent != site
    assert str(site / "site") in path  # what is on our path is on theirs
    if hasattr(ours._private, "authentication"):  # before, Ray had no tokens
        assert len(environment["RAY_AUTH_TOKEN"]) >= 32
        assert environment["RAY_AUTH_MODE"] == "token"

    places = {place for place, _ in listening() - before}
    assert places == {"127.0.0.1"}

    logs = Path(ours._private.worker._global_node.get_session_dir_path())
    ray.shutdown()
    assert not [file for file in logs.rglob("*") if file.is_file() and b"hunter2" in file.read_bytes()]


def test_wrong_requests(site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("watched.yaml").write_text(STUDY)
    assert call("study", "run", "watched.yaml", "--address", "auto") == 2
    assert "--executor ray" in capsys.readouterr().err
    assert call("study", "run", "watched.yaml", "--executor", "ray", "--gpus", "1", "--jobs", "1") == 2
    assert "the cluster has no room for one cell: it asks for 1 processors and 1 GPUs" in capsys.readouterr().err
    ray.shutdown()
    monkeypatch.setitem(sys.modules, "ray", None)
    assert call("study", "run", "watched.yaml", "--executor", "ray") == 1
    assert "pip install 'bpfree[ray]'" in capsys.readouterr().err
    assert json.dumps(outcomes()) == "[]"
