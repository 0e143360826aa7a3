"""Killing and stopping real processes. Oracle: the weights of an undisturbed run, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from children import Child, command

from bpfree.record.folder import read_run

TRAIN = ["rule=dfa", "network.dropout=0.1", "budget.epochs=60", "threads=1", "device=cpu", "tracking.enabled=false", "evaluation.every=20"]


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(run / "checkpoints" / "last.pt", weights_only=True)["weights"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("undisturbed")
    process = command("train", *TRAIN, folder=folder)
    process.communicate(timeout=240)
    assert process.returncode == 0
    (run,) = (folder / "runs").iterdir()
    return last_weights(run)


def wait_for(condition: object, process: Child, seconds: float = 120) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.005)


def the_checkpoint(folder: Path) -> Path | None:
    return next(iter((folder / "runs").glob("*/checkpoints/last.pt")), None)


def test_killed_at_random_moments_and_resumed_ends_with_the_same_bits(tmp_path: Path, undisturbed: dict[str, torch.Tensor]) -> None:
    """SIGKILL, which nothing can catch, at three random moments (seeded, and shown on failure)."""
    moments = random.Random(time.time_ns())
    process = command("train", *TRAIN, folder=tmp_path)
    wait_for(lambda: the_checkpoint(tmp_path), process)
    killed = 0
    for _ in range(3):
        time.sleep(moments.uniform(0, 0.4))
        if process.poll() is None:
            process.kill()
            killed += 1
        process.communicate()
        (run,) = (tmp_path / "runs").iterdir()
        before = os.stat(run / "checkpoints" / "last.pt").st_mtime_ns
        process = command("train", "--resume", run.name, folder=tmp_path)

        def progressed(process: Child = process, path: Path = run / "checkpoints" / "last.pt", before: int = before) -> bool:
            return os.stat(path).st_mtime_ns != before or process.poll() is not None

        while not progressed():
            time.sleep(0.005)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert killed >= 1
    weights = last_weights(run)
    assert all(torch.equal(weights[name], value) for name, value in undisturbed.items())
    assert read_run(run).status == "finished"
    epochs = [metrics["epoch"] for metrics in read_run(run).history]
    assert epochs == list(range(1, 61))
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name != "last.pt" and not path.name.startswith(".")] == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint_and_a_resumable_run(
    tmp_path: Path, undisturbed: dict[str, torch.Tensor], number: signal.Signals, code: int
) -> None:
    process = command("train", *TRAIN, folder=tmp_path)
    wait_for(lambda: the_checkpoint(tmp_path), process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "--resume" in errors
    assert "Traceback" not in errors
    (run,) = (tmp_path / "runs").iterdir()
    assert read_run(run).status == "interrupted"
    resumed = command("train", "--resume", str(run), "--quiet", folder=tmp_path)
    _, errors = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, errors
    weights = last_weights(run)
    assert all(torch.equal(weights[name], value) for name, value in undisturbed.items())
