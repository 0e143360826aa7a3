"""A tracked run in a process that kills itself at a chosen moment, for tests of what is left of it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bpfree import Run, Step, hookimpl, runner
from bpfree.config import parse_words, resolve
from bpfree.recipe import Recipe
from bpfree.record.log import EventLog
from bpfree.tracking.events import Artifact, End, Message
from bpfree.tracking.follower import Follower
from bpfree.tracking.store import Store

NAME = "the-run"
TAGS = {"study": "kills", "mlflow.parentRunId": "parent"}
WORDS = (
    *(
        "rule=dfa",
        "task=digits",
        "network.depth=2",
        "network.width=16",
        "network.dropout=0.2",
        "budget.epochs=3",
        "device=cpu",
        "threads=1",
    ),
    *("select=best-val", "pictures.every=2", "pictures.count=4", "log_interval=1000", "tracking.timeout=60", "tracking.interval=0.01"),
)


def recipe_in(folder: Path, uri: str, *, system: bool = False) -> Recipe:
    """Three epochs of digits, 26 steps each, tracked to a store."""
    system_words = ("tracking.system=true", "tracking.system_interval=0.05") if system else ("tracking.system=false",)
    return resolve(parse_words([*WORDS, *system_words, f"output={folder / 'runs'}", f"tracking.uri={uri}"]))


def start(folder: Path, uri: str, *, system: bool = False, observers: tuple[Any, ...] = ()) -> Run:
    """The run from its beginning."""
    recipe = recipe_in(folder, uri, system=system)
    return runner.run(recipe, quiet=True, run_id=NAME, tags=TAGS, label="a label", observers=observers)


def go_on(folder: Path, uri: str, *, system: bool = False) -> Run:
    """What whoever finds the run does: resume it from its checkpoint, or start it again."""
    place = folder / "runs" / NAME
    if (place / "checkpoints" / "last.pt").is_file():
        return runner.resume(str(place), quiet=True, tags=TAGS, label="a label")
    return start(folder, uri, system=system)


def kill() -> None:
    """End this process as an outage would."""
    os.kill(os.getpid(), signal.SIGKILL)


class KillAt:
    """An observer that ends the process at ``run_start``, ``step_end:40``, ``epoch_end:2``, ``checkpoint_saved:1`` or ``run_end``.

    It is called after the run's log is written, and before the tracker ends the run.
    """

    def __init__(self, point: str, samples: threading.Semaphore | None) -> None:
        self._point, self._samples, self._saved = point, samples, 0

    def _at(self, point: str) -> None:
        if point != self._point:
            return
        for _ in range(2 if self._samples else 0):  # this many samples of the system's use are in the store
            assert self._samples is not None
            self._samples.acquire()
        kill()

    @hookimpl
    def run_start(self) -> None:
        self._at("run_start")

    @hookimpl
    def step_end(self, step: Step) -> None:
        self._at(f"step_end:{step.index}")

    @hookimpl
    def epoch_end(self, metrics: Mapping[str, float]) -> None:
        self._at(f"epoch_end:{metrics['epoch']:.0f}")

    @hookimpl
    def checkpoint_saved(self) -> None:
        self._saved += 1
        self._at(f"checkpoint_saved:{self._saved}")

    @hookimpl
    def run_end(self) -> None:
        self._at("run_end")


def kill_in_store(point: str) -> None:
    """End the process in the store: once the run is ``created``, before a ``file`` or the ``end`` is sent, or when the end ``is sent``."""
    send, params = Store.send, Store._params

    def sending(self: Store, run_id: str, events: list[Message]) -> None:
        if (point == "file" and isinstance(events[0], Artifact)) or (point == "end" and isinstance(events[0], End)):
            kill()
        send(self, run_id, events)
        if point == "is sent" and isinstance(events[0], End):
            kill()

    def creating(self: Store, *arguments: Any) -> None:
        if point == "created":
            kill()
        params(self, *arguments)

    Store.send, Store._params = sending, creating  # type: ignore[method-assign]


def wait_for_the_store(samples: threading.Semaphore) -> None:
    """Each event is in the store before the run continues, so that a kill finds all that was told before it there."""
    append, begin, followers = EventLog.append, Follower.start, list[Follower]()

    def starting(self: Follower, patience: float) -> bool:
        followers.append(self)
        return begin(self, patience)

    def patiently(self: EventLog, event: str, **facts: Any) -> None:
        append(self, event, **facts)
        while any(follower.cursor.offset < self.size for follower in followers):
            for follower in followers:
                follower._wake.set()
            time.sleep(0.001)
        if event == "system":
            samples.release()

    Follower.start, EventLog.append = starting, patiently  # type: ignore[method-assign]


def be_killed(folder: Path, uri: str, point: str, patient: bool, system: bool) -> None:
    """The whole life of a process."""
    samples = threading.Semaphore(0)
    if patient:
        wait_for_the_store(samples)
    kill_in_store(point.removeprefix("store:"))
    start(folder, uri, system=system, observers=(KillAt(point, samples if system else None),))
    kill()
