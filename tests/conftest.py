"""Fixtures of all tests."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import threading
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.pop("COLUMNS", None)  # which pytest's processes have: tables and messages would be wrapped

import pytest
import torch
from made_time import Time

from bpfree import Task
from bpfree.tasks.digits import DIGITS
from bpfree.tracking import store
from bpfree.training import meters

for name in ("COLUMNS", "LINES"):
    os.unsetenv(name)  # readline, which pytest loads, sets them behind os.environ, where child processes find them
torch.set_num_threads(1)
MAKE_DATABASE = store._make_database


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


_made = list[Path]()
_making = threading.Lock()


def _empty_database(folders: pytest.TempPathFactory) -> Path:
    """Trackers' threads ask for it, too."""
    with _making:
        if not _made:
            path = folders.mktemp("template") / "mlflow.db"
            store.prepare_mlflow(10)
            MAKE_DATABASE(path)
            with contextlib.closing(sqlite3.connect(path)) as database:
                database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            _made.append(path)
    return _made[0]


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database: made once, as it takes seconds."""
    return _empty_database(tmp_path_factory)


@pytest.fixture(autouse=True)
def _databases_are_copied(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New databases of runs in this process are copies of the template, but where a test is about making one."""
    if request.node.get_closest_marker("makes_database") is None:
        monkeypatch.setattr(store, "_make_database", lambda path: shutil.copy(_empty_database(tmp_path_factory), path))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run commands in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
