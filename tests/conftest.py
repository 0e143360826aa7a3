"""Fixtures of all tests."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import pytest
import torch
from made_time import Time

from bpfree import Task
from bpfree.tasks.digits import DIGITS
from bpfree.training import meters

torch.set_num_threads(1)


@pytest.fixture
def device() -> torch.device:
    """Where tensors live: BPFREE_TEST_DEVICE, the CPU by default."""
    return torch.device(os.environ.get("BPFREE_TEST_DEVICE", "cpu"))


@pytest.fixture(scope="session")
def digits() -> Task:
    """The bundled digits with their default splits."""
    return Task.from_source(DIGITS)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    """The time of a run's training, which stands still unless the test moves it."""
    made = Time()
    monkeypatch.setattr(meters, "time", made)
    return made


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run commands in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
