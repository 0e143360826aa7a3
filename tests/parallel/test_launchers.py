"""The command line in several processes that are stopped and killed; under torchrun and on Ray.

Oracle: the weights of one undisturbed process, bit for bit. Exit codes of torchrun are not looked at: torch's threads may abort a process
that has done its work. What a launcher does to processes that stand ready anyway is done to them here; the launchers themselves, which
take many seconds to start, are slow tests but for one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import parallel_cases as cases
import psutil
import pytest
import torch
from parallel_ranks import Ranks, free_port
from study_kit import call, mlflow_runs
from torch import Tensor
from training_rules import assert_equal_bits

from bpfree.record.folder import read_run
from bpfree.training.checkpoint import read_checkpoint

pytestmark = pytest.mark.time_dependent
SMALL = ("network.width=8", "network.depth=1", "rule.T=4", "network.blocks=4", "rule.execution=loop", "pictures.every=0")
WORDS = ("rule=noprop-dt", "network=noprop-mlp", "task=digits", "threads=1", "device=cpu", "evaluation.every=20", *SMALL)
LONG = (*WORDS, "budget.epochs=40", "tracking.enabled=false")


@contextmanager
def torchrun(*words: str, size: int = 2) -> Iterator[subprocess.Popen[str]]:
    """Whatever happens, nothing of it is left."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), "--master-port", str(free_port())]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
    with open("output.txt", "w") as output:
        process = subprocess.Popen([*launcher, "-m", "bpfree", *words], env=environment, text=True, stdout=output, stderr=output)
    try:
        yield process
    finally:
        for one in [*members(process), process]:
            one.kill()
        process.wait()


def members(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str] | None = None) -> None:
    while not condition():
        assert process is None or process.poll() is None, Path("output.txt").read_text()
        time.sleep(0.01)


def the_run() -> Path:
    (run,) = Path("runs").iterdir()
    return run


def position(run: Path) -> int:
    """Steps that the checkpoint has behind it; 0 without one."""
    path = run / "checkpoints" / "last.pt"
    return int(read_checkpoint(path)["training"]["position"]["step"]) if path.is_file() else 0


def started() -> bool:
    return Path("runs").is_dir() and any(position(run) for run in Path("runs").iterdir())


def the_weights(run: Path) -> dict[str, Tensor]:
    return dict(torch.load(run / "checkpoints" / "last.pt", weights_only=True)["weights"])


def said() -> str:
    return Path("output.txt").read_text()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("undisturbed"))
        assert call("train", *LONG, "--quiet") == 0
        return the_weights(the_run())


@pytest.mark.slow
def test_one_run_is_made_and_tracked(workplace: Path) -> None:
    """One folder, one run of MLflow, one result printed; the weights and metrics of one process."""
    words = (*WORDS, "budget.epochs=2")
    assert call("train", *words, "tracking.enabled=false", "output=alone") == 0
    (alone,) = Path("alone").iterdir()
    with torchrun("train", *words) as process:
        process.wait()
    assert said().count("\nstatus ") == said().count("2 processes share the blocks") == 1, said()
    assert_equal_bits(the_weights(the_run()), the_weights(alone))
    about, other = (read_run(run) for run in (the_run(), alone))
    assert (about.status, about.tags["world_size"], about.tags["parallel"]) == ("finished", "2", "blocks")
    assert (other.tags["world_size"], other.tags["parallel"]) == ("1", "none")
    for name in ("test/accuracy", "train/samples", "train/steps", "train/operations"):
        assert about.result[name] == other.result[name]
    (run,) = mlflow_runs()
    assert run["tags"]["world_size"] == "2"
    assert all(count == 1 for count in run["counts"].values())


def test_processes_are_stopped_killed_and_gone_on_with(
    ranks: Ranks, tmp_path: Path, undisturbed: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM to all saves a checkpoint; what remains when one is killed ends with an error; one process finishes the run."""
    (tmp_path / "0").mkdir()
    monkeypatch.chdir(tmp_path / "0")  # where the first process works
    numbers = ranks.start(2, cases.command_line, tmp_path, ("train", *LONG, "--quiet"))
    wait_for(started)
    for number in numbers:
        os.kill(number, signal.SIGTERM)
    assert [answer[0][0] for answer in ranks.collect(2)] == [143, 143]
    run = the_run()
    assert read_run(run).status == "interrupted"
    stopped = position(run)
    assert 21 <= stopped < 840

    numbers = ranks.start(2, cases.command_line, tmp_path, ("train", "--resume", str(run), "--quiet"))
    wait_for(lambda: position(run) > stopped)
    os.kill(numbers[1], signal.SIGKILL)
    (code, told), _, _ = ranks.collect(2)[0]
    assert code == 1
    assert "another process of this run has ended" in told
    assert "--resume" in told
    assert position(run) < 840
    assert read_run(run).status == "failed"

    assert call("train", "--resume", str(run), "--quiet") == 0
    assert_equal_bits(the_weights(run), undisturbed)
    assert len(list(Path("runs").iterdir())) == 1


@pytest.mark.slow
def test_stopped_killed_and_gone_on_with(workplace: Path, undisturbed: dict[str, Tensor]) -> None:
    """SIGTERM of the job saves a checkpoint; SIGKILL of one process ends the job; another number of processes finishes it."""
    with torchrun("train", *LONG) as process:
        wait_for(started, process)
        process.terminate()
        process.wait()
    run = the_run()
    assert read_run(run).status == "interrupted", said()
    stopped = position(run)
    assert 21 <= stopped < 840

    with torchrun("train", "--resume", str(run)) as process:
        wait_for(lambda: position(run) > stopped, process)
        (second,) = (one for one in members(process) if one.environ().get("RANK") == "1")
        second.send_signal(signal.SIGKILL)
        process.wait()
    assert position(run) < 840
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.pt"]
    assert read_run(run).status in ("failed", "running"), said()

    assert call("train", "--resume", str(run), "--quiet") == 0
    assert_equal_bits(the_weights(run), undisturbed)
    assert len(list(Path("runs").iterdir())) == 1


@pytest.mark.slow
def test_a_wrong_request_is_told_once(workplace: Path) -> None:
    with torchrun("train", *WORDS, "budget.seconds=1") as process:
        process.wait()
    assert said().count("error: several processes cannot train together with budget.seconds") == 1, said()
    assert not list(Path("runs").iterdir())


@pytest.mark.slow
def test_on_a_cluster_one_process_of_which_is_killed(
    workplace: Path, undisturbed: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says how to continue, which ends with the same bits."""
    pytest.importorskip("ray", reason="Ray is not installed")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    with open("output.txt", "w") as output:
        command = [sys.executable, "-m", "bpfree", "train", "--ray", "2", *LONG]
        process = subprocess.Popen(command, env=environment, text=True, stdout=output, stderr=output)
    try:
        wait_for(started, process)
        working = [one for one in members(process) if "Member" in " ".join(one.cmdline())]
        assert len(working) == 2
        working[1].kill()
        process.wait()
    finally:
        for one in [*members(process), process]:
            one.kill()
    run = the_run()
    assert process.returncode == 1
    assert f"bpfree train --resume {run}" in said()
    assert call("train", "--resume", str(run), "--quiet") == 0
    assert_equal_bits(the_weights(run), undisturbed)
