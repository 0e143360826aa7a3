"""Common code of all kinds of faults: injected faults and their outcome, processes that can be killed, the content of a store."""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import random
import signal
import sqlite3
import sys
import threading
import time
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

__all__ = ["Command", "Outcome", "Plan", "leftovers", "log_points", "points_lost", "program", "stored_runs", "wait_for"]

PRELOADED = (
    "bpfree.cli.main",
    "bpfree.cli.train",
    "bpfree.cli.study",
    "bpfree.training.trainer",
    "bpfree.tracking.mlflow_tracker",
    "bpfree_noprop",
    "bpfree_hebbian",
    "bpfree_predictive_coding",
    "bpfree_sampled",
    "bpfree_feedback",
    "bpfree_forward_gradient",
    "mlflow.tracking",
    "sklearn.datasets",
    "PIL.Image",
)
"""Imported once, in the process that all others are forked from, which saves each of them seconds."""

PATH_VARIABLE = "TORTURE_PATH"
"""Of the environment: a folder of packages that a command finds first."""
UNTIMED = ("second", "step_ms", "elapsed", "load_")
"""Parts of the names of metrics that differ from run to run."""


@dataclass
class Outcome:
    """What came of the faults of one kind.

    Attributes:
        injected: faults.
        failures: of those that did not survive, what was lost and how to repeat it.
        facts: further numbers, by name.
        failed: faults that did not survive, where one failure stands for several.
    """

    injected: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    failed: int = 0

    def judge(self, problems: Iterable[str], faults: int = 1, **how: Any) -> None:
        """Count faults that were injected together, and record what is wrong after them."""
        self.injected += faults
        if found := list(problems):
            self.failed += faults
            self.failures.append({"lost": [problem[:600] for problem in found[:12]], **how})

    def count(self, name: str, by: float = 1) -> None:
        """Add to a count of the outcome."""
        self.facts[name] = self.facts.get(name, 0) + by


@dataclass
class Plan:
    """One kind of fault, as it is to be done.

    Attributes:
        count: of faults to inject.
        seed: of all that is drawn.
        folder: an empty one, for everything.
        quick: whether figures without meaning will do.
    """

    count: int
    seed: int
    folder: Path
    quick: bool = False

    def draws(self, *parts: object) -> random.Random:
        """Return a random generator for one part, so that one fault can be repeated alone."""
        return random.Random(":".join(map(str, (self.seed, *parts))))

    def place(self, name: str) -> Path:
        """Return an empty folder."""
        path = self.folder / name
        path.mkdir(parents=True)
        return path


# --- processes ----------------------------------------------------------------------------------------------------------


class Command:
    """A function in a process of its own, in a session of its own, whose output is collected.

    Args:
        target: called with the arguments; an importable function.
        folder: the working directory.
        variables: of the environment.
        powerless: it has no privileges, so that permissions of files count for root too.
    """

    def __init__(
        self, target: Callable[..., Any], *arguments: Any, folder: Path, variables: Mapping[str, str] | None = None, powerless: bool = False
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, *PRELOADED])
        ours, theirs = context.Pipe(duplex=False)
        self._text = bytearray()
        settings = (str(folder), dict(variables or {}), powerless)
        self.process: BaseProcess = context.Process(target=_life, args=(theirs, settings, target, arguments))
        self.took, self.began = 0.0, time.monotonic()
        self.process.start()
        theirs.close()
        self._reader = threading.Thread(target=self._read, args=(ours,), daemon=True)
        self._reader.start()

    def _read(self, connection: Connection) -> None:
        with connection, contextlib.suppress(OSError):
            while part := os.read(connection.fileno(), 65536):
                self._text += part

    @property
    def text(self) -> str:
        """Output of the command so far."""
        return self._text.decode(errors="replace")

    @property
    def alive(self) -> bool:
        """Whether the command's process still runs."""
        return self.process.is_alive()

    @property
    def pid(self) -> int:
        """Process ID of the command."""
        assert self.process.pid is not None
        return self.process.pid

    def wait(self, seconds: float = 300) -> int:
        """Return the exit code, negative for a signal; a command that hangs is killed, which gives an exit code too."""
        self.process.join(seconds)
        self.took = time.monotonic() - self.began
        if self.process.exitcode is None:
            self._text += f"\n[it did not end within {seconds:g} s]".encode()
            self.kill()
        self._reader.join(5)
        code = self.process.exitcode
        assert code is not None
        return code

    def kill(self, *, whole: bool = False) -> None:
        """Send SIGKILL to the command alone or to its whole session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL) if whole else os.kill(self.pid, signal.SIGKILL)
        self.process.join()

    def children(self) -> list[Any]:
        """List the processes that the command has started."""
        import psutil

        with contextlib.suppress(psutil.Error):
            return list(psutil.Process(self.pid).children(recursive=True))
        return []


def _life(output: Connection, settings: tuple[str, dict[str, str], bool], target: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """Run a command's process from its start to its end."""
    folder, variables, powerless = settings
    sys.modules["__main__"] = types.ModuleType("__main__")  # processes that it starts need not import this program
    multiprocessing.set_start_method(None, force=True)  # nor the server that it comes from
    os.setsid()
    os.chdir(folder)
    os.environ.update(variables)
    sys.stdout.flush()
    sys.stderr.flush()
    for number in (1, 2):
        os.dup2(output.fileno(), number)
    output.close()
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    if powerless:
        header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        if ctypes.CDLL(None).capset(header, nothing):
            raise RuntimeError("the process cannot give up its privileges")
    target(*arguments)


def program(*words: str) -> None:
    """Run the command line."""
    from bpfree.cli.main import main

    sys.argv = ["bpfree", *words]
    sys.path[:0] = filter(None, [os.environ.get(PATH_VARIABLE), ""])
    main()


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> bool:
    """Wait until a condition holds; returns whether it does."""
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(found)


def leftovers(processes: Sequence[Any], seconds: float = 60) -> list[str]:
    """Describe in a sentence each process that is still there after a while."""
    import psutil

    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return [f"process {process.pid} outlives the one that was killed" for process in alive if process.status() != psutil.STATUS_ZOMBIE]


# --- what a store holds ---------------------------------------------------------------------------------------------------

Points = dict[tuple[str, int], float]


def stored_runs(database: Path) -> list[dict[str, Any]]:
    """Read the runs of a SQLite store without MLflow: status, tags, and all values of each metric by step."""
    with contextlib.closing(sqlite3.connect(database, timeout=30)) as store:
        runs = [{"id": key, "status": status} for key, status in store.execute("select run_uuid, status from runs")]
        for run in runs:
            run["tags"] = dict(store.execute("select key, value from tags where run_uuid = ?", (run["id"],)))
            run["values"] = {}
            for key, step, value in store.execute("select key, step, value from metrics where run_uuid = ?", (run["id"],)):
                run["values"].setdefault((key, step), []).append(value)
    return runs


def log_points(folder: Path) -> dict[tuple[str, int], set[float]]:
    """Read a run's metrics from its log, under the store's names; a metric computed twice has both values."""
    from bpfree.tracking.mlflow_tracker import POSITIONS

    points: dict[tuple[str, int], set[float]] = {}
    began: int | None = None
    for line in (folder / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        began = event["time"] if began is None else began
        kind, metrics = event["event"], event.get("metrics", event.get("result", {}))
        for name, value in metrics.items() if kind in ("epoch", "progress", "system", "end") else ():
            if kind == "progress":
                key, step = f"step/{name}", int(metrics["step"])
            else:
                key, step = name, event["time"] - began if kind == "system" else int(event["epoch"])
            if kind != "progress" or name not in ("step", *POSITIONS):
                points.setdefault((key, step), set()).add(float(value))
    return points


def points_lost(run: Mapping[str, Any], folder: Path, *, whole: bool = True) -> list[str]:
    """Say what is wrong with a run in the store: each point of the log must be there once (``whole``), and nothing else.

    A run that was killed computes epochs again; what happened within them by the clock need not be there.
    """
    wanted, found = log_points(folder), run["values"]
    wrong = [f"{key} at {step} has {len(values)} values" for (key, step), values in found.items() if len(values) != 1]
    wrong += [f"{key} at {step} is not there" for key, step in wanted if (key, step) not in found and (whole or not _by_clock(key))]
    wrong += [f"{key} at {step} is of nowhere" for key, step in found if (key, step) not in wanted]
    wrong += [
        f"{key} at {step} is {values[0]!r}, not {wanted[key, step]!r}"
        for (key, step), values in found.items()
        if (key, step) in wanted and values[0] not in wanted[key, step]
    ]
    return wrong


def _by_clock(key: str) -> bool:
    return key.startswith(("step/", "system/"))
