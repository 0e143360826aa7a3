"""A disk that is full for a while, or for good, while a run trains. Oracles: a run on a disk with room, and what is in its folder."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from training_rules import assert_equal_bits, config_of, rule_on

from bpfree import Task, hookimpl
from bpfree.errors import BpfreeError, DiskError
from bpfree.record.folder import read_run
from bpfree.record.log import EventLog
from bpfree.training import checkpoint
from bpfree.training.checkpoint import read_checkpoint
from bpfree.training.config import BudgetConfig
from bpfree.training.trainer import Trainer

EPOCHS = 4


class Full:
    """A disk on which checkpoints cannot be written after some epochs."""

    def __init__(self, epochs: range, patch: pytest.MonkeyPatch) -> None:
        self._epochs, self._write, self.full = epochs, checkpoint._Hashed.write, False
        patch.setattr(checkpoint._Hashed, "write", lambda hashed, content: self.write(hashed, content))

    def write(self, hashed: Any, content: Any) -> int:
        if self.full:
            trouble = hashed.trouble = OSError(errno.ENOSPC, "No space left on device")
            raise trouble
        return self._write(hashed, content)

    @hookimpl
    def epoch_end(self, metrics: dict[str, float]) -> None:
        self.full = int(metrics["epoch"]) in self._epochs


def trained(digits: Task, folder: Path, device: torch.device, observers: list[Any]) -> Trainer:
    config = config_of(device, budget=BudgetConfig(epochs=EPOCHS))
    return Trainer(rule_on(digits), digits, config, folder=folder, observers=observers)


def test_a_while(digits: Task, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """The run goes through with one warning, and its last checkpoint is that of a run with room."""
    trained(digits, tmp_path / "other", device, []).fit()
    run = trained(digits, tmp_path / "run", device, [Full(range(2, 4), monkeypatch)]).fit()
    assert run.status == read_run(tmp_path / "run").status == "finished"
    assert [record.getMessage() for record in caplog.records if "No space left" in record.getMessage()] != []
    assert len([record for record in caplog.records if "will try again" in record.getMessage()]) == 1
    mine, other = (read_checkpoint(tmp_path / name / "checkpoints" / "last.pt")["weights"] for name in ("run", "other"))
    assert_equal_bits(mine, other)
    assert [metrics["epoch"] for metrics in read_run(tmp_path / "run").history] == [1, 2, 3, 4]


def test_for_good(digits: Task, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that names disk and file; what was saved before stays, nothing else is left, and the run can be resumed."""
    with monkeypatch.context() as patch, pytest.raises(DiskError, match="No space left on device") as caught:
        trained(digits, tmp_path, device, [Full(range(2, 9), patch)]).fit()
    last = tmp_path / "checkpoints" / "last.pt"
    assert (caught.value.where, caught.value.exit_code) == (str(last), 1)
    assert read_run(tmp_path).status == "interrupted"
    assert list(last.parent.iterdir()) == [last]
    run = trained(digits, tmp_path, device, []).fit(last)
    assert (run.status, [metrics["epoch"] for metrics in run.history]) == ("finished", [1, 2, 3, 4])


def test_the_log_alone(digits: Task, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that never could be written ends the call with an error, whatever the rest did."""
    monkeypatch.setattr(EventLog, "_write", lambda log: False)
    monkeypatch.setattr("bpfree.record.log.WRITE_SECONDS", 0.0)
    with pytest.raises(BpfreeError, match="could not be written"):
        trained(digits, tmp_path, device, []).fit()
