"""Killing and stopping real processes. Oracle: the weights of an undisturbed run, bit for bit."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
import torch
from children import command
from signalled_commands import signalled

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


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_ends_with_the_same_bits(tmp_path: Path, undisturbed: dict[str, torch.Tensor]) -> None:
    """SIGKILL, which nothing can catch, three times: some checkpoints later, and then somewhere in what follows."""
    words = ("train", *TRAIN)
    for _ in range(3):
        process = signalled(tmp_path, signal.SIGKILL, random.randint(1, 4), random.randrange(5000), *words)
        assert process.wait() == -signal.SIGKILL, process.communicate()[1]
        (run,) = (tmp_path / "runs").iterdir()
        words = ("train", "--resume", run.name)
    process = command(*words, folder=tmp_path)
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
    process = signalled(tmp_path, number, 1, 0, "train", *TRAIN)
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
