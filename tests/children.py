"""Processes for tests, forked from one that has torch, MLflow and the plugins loaded and no thread started.

A fresh process imports for seconds before it does what a test is about. Where its beginning is what a test is about (what is imported, from
where, which variables are read then), it takes ``subprocess``. On systems other than Linux the processes here are fresh ones, too.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest

FORKS = sys.platform == "linux"
LOADED = (
    *("torch", "mlflow.tracking", "sklearn.datasets", "torchvision", "PIL.Image"),
    *("bpfree.training.trainer", "bpfree.tracking.mlflow_tracker", "bpfree.cli.train", "bpfree.study.worker"),
    *("bpfree_noprop.plugin", "bpfree_feedback.plugin", "bpfree_forward_gradient.plugin", "bpfree_gradient_free.plugin"),
    *("bpfree_hebbian.plugin", "bpfree_local_losses.plugin", "bpfree_predictive_coding.plugin", "bpfree_sampled.plugin"),
)
"""Modules of the process that is forked. None of them starts a thread with the variables below."""
VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # pyarrow, which MLflow imports
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # as the command line sets it before torch is loaded
}


def context() -> BaseContext:
    """Of ``multiprocessing``: its processes are forked from the one described above, which is started by the first call."""
    if not FORKS:
        return multiprocessing.get_context("spawn")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in VARIABLES.items():
            patch.setenv(name, value)
        forkserver.set_forkserver_preload(list(LOADED))
        forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


class Child:
    """A process that calls a function, with the methods of ``subprocess.Popen``; what it writes is kept in files.

    It is killed when the process of the tests ends.

    Args:
        target: a function that can be pickled; an exit code that it raises is the process's.
        arguments: of the function.
        folder: where it works; here by default.
        group: give it a process group of its own.
        variables: of its environment, beside those of this process.
    """

    def __init__(
        self, target: Callable[..., Any], *arguments: Any, folder: Path | None = None, group: bool = False, **variables: str
    ) -> None:
        self._written = tempfile.TemporaryDirectory()
        self._files = [Path(self._written.name, name) for name in ("output", "errors")]
        for path in self._files:
            path.touch()
        around = (str(folder or Path.cwd()), {**os.environ, **variables}, [str(path) for path in self._files], group)
        self._process = context().Process(target=_live, args=(*around, target, arguments), daemon=True)  # type: ignore[attr-defined]
        self._process.start()
        self.pid = int(self._process.pid)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode  # type: ignore[no-any-return]

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait, and return what was written to both streams."""
        self.wait(timeout)
        output, errors = (path.read_text() for path in self._files)
        return output, errors

    def send_signal(self, number: signal.Signals) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def command(*words: str, folder: Path | None = None, group: bool = False, **variables: str) -> Child:
    """Start ``bpfree WORDS``."""
    return Child(call_command, *words, folder=folder, group=group, **variables)


def run(*words: str, folder: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run ``bpfree WORDS`` to its end."""
    child = command(*words, folder=folder, **variables)
    output, errors = child.communicate()
    return subprocess.CompletedProcess(words, child.wait(), output, errors)


def call_command(*words: str) -> None:
    """Be ``bpfree WORDS``, in a child."""
    from bpfree.cli.main import main

    sys.argv[:] = ["bpfree", *words]
    main(list(words))


def _live(
    folder: str, environment: dict[str, str], files: list[str], group: bool, target: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    if FORKS:
        assert len(os.listdir(f"/proc/{os.getppid()}/task")) == 1, f"a module of {LOADED} has started a thread"
    if group:
        os.setpgid(0, 0)
    for number, (name, path) in enumerate(zip(("stdout", "stderr"), files, strict=True), start=1):
        opened = open(path, "a", encoding="utf-8", errors="backslashreplace", buffering=1)  # noqa: SIM115  open until the process ends
        os.dup2(opened.fileno(), number)
        setattr(sys, name, opened)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    target(*arguments)
