"""Stores to track to: a migrated SQLite template, a real server, a gate that cuts a connection, a server that never answers."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bpfree.record.folder import Cursor, RunFolder
from bpfree.record.recorder import Recorder
from bpfree.run import Run
from bpfree.tracking.config import TrackingConfig
from bpfree.tracking.mlflow_tracker import MLflowTracker
from bpfree.tracking.sending import Tracking


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tracking settings of whoever runs the tests."""
    for name in list(os.environ):
        if name.startswith("MLFLOW_"):
            monkeypatch.delenv(name)


@pytest.fixture
def uri(tmp_path: Path, template: Path) -> str:
    """A store of one's own."""
    shutil.copy(template, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[..., Run]:
    """A run by hand, with its folder."""

    def make(name: str = "rule-task-s0", **fields: Any) -> Run:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True, exist_ok=True)
        return Run(f"{tmp_path.name}-{name}", name, folder=folder, **fields)

    return make


@pytest.fixture
def track(tmp_path: Path) -> Callable[..., Recorder]:
    """A recorder whose log a tracker reads; without system metrics, unless asked for."""

    def make(uri: str | None, patience: float | None = None, **options: Any) -> Recorder:
        def tracker(run: Run, config: TrackingConfig) -> MLflowTracker:
            made = MLflowTracker(run, config)
            made.patience = made.patience if patience is None else patience
            return made

        options = {"system": False, "interval": 0.05, "timeout": 5.0} | options
        return Recorder([Tracking(TrackingConfig(uri=uri, **options), {"mlflow": tracker})])

    return make


@pytest.fixture
def epoch() -> Callable[[Run, Any, int], dict[str, float]]:
    """Tell an observer of an epoch, as the trainer does."""

    def tell(run: Run, observer: Any, number: int) -> dict[str, float]:
        metrics = {
            "epoch": float(number),
            "samples": 100.0 * number,
            "seconds": 0.5 * number,
            "train/loss": 1 / number,
            "val/accuracy": 1 - 0.5 / number,
        }
        run.epoch = number
        run.history.append(metrics)
        observer.epoch_end(run, metrics)
        return metrics

    return tell


@pytest.fixture
def stored() -> Callable[[Run, str], Any]:
    """What the store has of a run: MLflow's run, and every point of every metric as ``{key: [(step, value), ...]}``."""

    def read(run: Run, uri: str) -> tuple[Any, dict[str, list[tuple[int, float]]]]:
        from mlflow import MlflowClient

        client = MlflowClient(uri)
        found = client.get_run(run.tracking["mlflow_run_id"])
        points = {key: [(p.step, p.value) for p in client.get_metric_history(found.info.run_id, key)] for key in found.data.metrics}
        return found, points

    return read


@pytest.fixture
def unsent() -> Callable[[Run], list[dict[str, Any]]]:
    """What the log has of a run beyond what MLflow is known to have."""

    def read(run: Run) -> list[dict[str, Any]]:
        folder = RunFolder(run.folder or "")
        return [event for event, _ in folder.log.read(Cursor.read(folder.cursor("mlflow")).offset)]

    return read


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def closed_port() -> int:
    """A port where no one listens."""
    return free_port()


class Server:
    """A real ``mlflow server`` on loopback, in a process group of its own."""

    def __init__(self, folder: Path, template: Path) -> None:
        shutil.copy(template, folder / "server.db")
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
        command += ["--artifacts-destination", str(folder / "artifacts"), "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        environment = os.environ | {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        self.log = folder / "server.log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)

    def wait(self) -> None:
        while self._process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.2)
        pytest.fail(f"mlflow server did not start: {self.log.read_text()[-2000:]}")

    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory, template: Path) -> Iterator[Callable[[], Server]]:
    """Gives the server that runs; starts one if there is none, or the last was killed."""
    started: list[Server] = []

    def current() -> Server:
        if not started or not started[-1].alive():
            started.append(Server(tmp_path_factory.mktemp("server"), template))
            started[-1].wait()
        return started[-1]

    try:
        yield current
    finally:
        for server in started:
            server.kill()


@pytest.fixture
def server(servers: Callable[[], Server]) -> Server:
    """One server for all tests, as it takes seconds to start."""
    return servers()


class Gate:
    """A TCP relay to a server that can be shut (no one listens, connections are cut) and opened again."""

    def __init__(self, target: int) -> None:
        self._target, self.port = target, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._sockets: list[socket.socket] = []
        self._listener: socket.socket | None = None

    def open(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                self._sockets += [client, server]
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=self._relay, args=(source, sink), daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def shut(self) -> None:
        assert self._listener is not None
        for end in [self._listener, *self._sockets]:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._sockets.clear()


@pytest.fixture
def gate(server: Server) -> Iterator[Gate]:
    """The server behind a gate that is open."""
    gate = Gate(server.port)
    gate.open()
    yield gate
    gate.shut()


@pytest.fixture
def black_hole() -> Iterator[str]:
    """The address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
