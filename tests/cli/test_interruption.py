"""Killing and stopping real processes. Oracle: the weights of an undisturbed run, bit for bit."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
import torch
from children import Child, command
from waiting import until

from bpfree.record.folder import read_run

pytestmark = pytest.mark.time_dependent

EPOCHS = 60
TRAIN = [
    "rule=dfa",
    "network.dropout=0.1",
    f"budget.epochs={EPOCHS}",
    "threads=1",
    "device=cpu",
    "tracking.enabled=false",
    "evaluation.every=20",
]


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(run / "checkpoints" / "last.pt", weights_only=True)["weights"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("undisturbed")
    process = command("train", *TRAIN, folder=folder)
    assert process.wait() == 0
    (run,) = (folder / "runs").iterdir()
    return last_weights(run)


def checkpoint_of(folder: Path) -> int:
    """When it was written; 0 without one."""
    return next((path.stat().st_mtime_ns for path in (folder / "runs").glob("*/checkpoints/last.pt")), 0)


def until_another_checkpoint(folder: Path, process: Child) -> None:
    before = checkpoint_of(folder)
    until(lambda: checkpoint_of(folder) != before, process)


def test_killed_at_random_moments_and_resumed_ends_with_the_same_bits(tmp_path: Path, undisturbed: dict[str, torch.Tensor]) -> None:
    """SIGKILL, which nothing can catch, three times: some checkpoints later, and then somewhere in what follows."""
    process = command("train", *TRAIN, folder=tmp_path)
    for _ in range(3):
        for _ in range(random.randint(1, 4)):
            until_another_checkpoint(tmp_path, process)
        for _ in range(random.randrange(10_000)):
            os.sched_yield()
        process.kill()
        assert process.wait() == -signal.SIGKILL
        (run,) = (tmp_path / "runs").iterdir()
        process = command("train", "--resume", run.name, folder=tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    weights = last_weights(run)
    assert all(torch.equal(weights[name], value) for name, value in undisturbed.items())
    assert read_run(run).status == "finished"
    epochs = [metrics["epoch"] for metrics in read_run(run).history]
    assert epochs == list(range(1, EPOCHS + 1))
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name != "last.pt" and not path.name.startswith(".")] == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint_and_a_resumable_run(
    tmp_path: Path, undisturbed: dict[str, torch.Tensor], number: signal.Signals, code: int
) -> None:
    process = command("train", *TRAIN, folder=tmp_path)
    until_another_checkpoint(tmp_path, process)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == code
    assert "--resume" in errors
    assert "Traceback" not in errors
    (run,) = (tmp_path / "runs").iterdir()
    assert read_run(run).status == "interrupted"
    resumed = command("train", "--resume", str(run), "--quiet", folder=tmp_path)
    _, errors = resumed.communicate()
    assert resumed.returncode == 0, errors
    weights = last_weights(run)
    assert all(torch.equal(weights[name], value) for name, value in undisturbed.items())
