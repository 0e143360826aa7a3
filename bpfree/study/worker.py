"""Run one cell in this process: finished cells are kept, interrupted ones resumed, and failures recorded.

A cell's run has a name that follows from study and cell, so that the successor of a killed process finds the run's folder, its
checkpoint and its MLflow run, and none is duplicated.
"""

from __future__ import annotations

import gc
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bpfree import runner, scoring
from bpfree.config import resolve
from bpfree.errors import BpfreeError, DiskError
from bpfree.hooks import hookimpl
from bpfree.leaves import Leaf, names_code
from bpfree.plugins import Given, Plugins, installed_plugins
from bpfree.recipe import Recipe, quick_examples
from bpfree.record.folder import RunFolder
from bpfree.recorded import known_run
from bpfree.redaction import redact
from bpfree.run import Run
from bpfree.study.concurrency import Concurrency, present
from bpfree.study.store import CellKey, CellRecord, CellStore
from bpfree.system import HAS_ALARMS
from bpfree.tasks.task import Task
from bpfree.training import environment
from bpfree.training.checkpoint import keep_weights
from bpfree.training.stopping import paused_at
from bpfree.training.trainer import Interrupted

__all__ = ["CellObserver", "Job", "TaskCache", "Worker", "garbage_collected"]

WORKERS = ".workers"
PATIENCE = 5.0
"""Seconds beyond its timeout before a cell is interrupted that has not checked the time after a step."""


@dataclass(frozen=True)
class Job:
    """A cell to run, as it is sent to another process.

    Attributes:
        key: of the cell.
        store: of its record.
        changes: settings of the command line that cannot change results; they apply to a resumed run too.
        tags: of its run; in MLflow they make the study's run its parent.
        timeout: seconds.
        training: whether the training split is scored too.
        again: whether it is run although it failed before.
        restart: whether it is run from the beginning, without its checkpoint.
        quiet: no progress display.
        until: epochs after which it pauses, with a checkpoint; ``None``: it trains to its end.
        given: code files that may be executed, and objects made in Python.
    """

    key: CellKey
    store: CellStore
    changes: Sequence[Leaf]
    tags: Mapping[str, str]
    timeout: float | None = None
    training: bool = False
    again: bool = False
    restart: bool = False
    quiet: bool = True
    until: int | None = None
    given: Given = field(default_factory=Given, repr=False)

    @property
    def folder(self) -> Path:
        """Folder of the cell's run."""
        return self.store.output / self.store.run_of(self.key)


class TimedOut(BpfreeError):
    """The cell exceeded its timeout."""


class Worker:
    """Runs jobs, one after the other."""

    def __init__(self) -> None:
        self._tasks = TaskCache()
        self._given = Given()
        self._registry: Plugins | None = None

    def _known(self, job: Job) -> Plugins:
        """Return the registry of a job's names; keep it, so that successive cells share data that were made in Python."""
        if self._registry is None or job.given is not self._given:
            self._given, self._registry = job.given, installed_plugins().extended(job.given)
        return self._registry

    def _recipe(self, job: Job) -> Recipe:
        return resolve(job.key.leaves, self._known(job))

    def run(self, job: Job) -> CellRecord | None:
        """Run a cell and record how it ended, whatever a plugin's rule raises.

        Returns:
            ``None``: another process runs the cell.

        Raises:
            Interrupted: it was asked to stop, and has saved a checkpoint.
        """
        store = job.store
        with store.lock(job.key.id) as mine:
            if not mine:
                return None
            before = store.read(job.key.id)
            if before is not None and _is_done(job, before):
                return before  # another process was faster
            record = store.begin(job.key, before, restart=job.restart)
            with present(store.folder_of_all / WORKERS) as concurrency, garbage_collected():
                observer = CellObserver(job, record, concurrency)
                self._run(job, record, observer)
            if record.status == "finished":
                keep_weights(job.folder / "checkpoints")
            return record

    def _run(self, job: Job, record: CellRecord, observer: CellObserver) -> None:
        job.store.write(record)
        try:
            with observer.alarm():
                run = record.about = self._train(job, observer)
            record.reason = run.reason
            if run.status == "finished" and job.training:
                self._score_training(job, record)
            record.status = "finished" if run.status == "finished" else "diverged"
        except (Interrupted, KeyboardInterrupt) as error:
            record.status, record.reason = "interrupted", getattr(error, "what", "stopped")
            if job.until is None or record.reason != paused_at(job.until):
                raise
            record.status = "paused"
        except DiskError as error:  # to be resumed once there is space
            record.status, record.reason = "interrupted", reason_of(error)
        except TimedOut as error:
            record.status, record.reason = "timeout", error.what
        except (Exception, SystemExit) as error:  # a rule that calls sys.exit ends its cell, not the study
            record.status = "refused" if isinstance(error, BpfreeError) and not observer.began else "failed"
            record.reason = reason_of(error)
        finally:
            observer.note()
            job.store.write(record)

    def _train(self, job: Job, observer: CellObserver) -> Run:
        folder, output = job.folder, str(job.store.output)
        options: dict[str, Any] = {"quiet": job.quiet, "label": job.key.label, "observers": [observer], "tags": job.tags}
        options["until"] = job.until
        if not job.restart and (folder / "checkpoints" / "last.pt").is_file():
            if runner.has_finished(str(folder)):  # the process was killed before it could record this
                return runner.resume(str(folder), output=output, changes=_code(job), quiet=job.quiet, registry=self._known(job))
            options |= {"changes": [*_code(job), *job.changes], "registry": self._known(job)}
            return runner.resume(str(folder), output=output, task=self._tasks.get(self._recipe(job)), **options)
        if job.restart:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        recipe = self._recipe(job)
        if recipe.is_program and (done := known_run(folder)) is not None and done.status == "finished" and not job.restart:
            return done  # the process was killed before it could record this
        return runner.run(recipe, run_id=folder.name, task=self._tasks.get(recipe), **options)

    def _score_training(self, job: Job, record: CellRecord) -> None:
        """Score all examples of the training split by the metrics of the run, and the weights that were tested."""
        settings = self._recipe(job).settings
        try:
            with environment.numerics(threads=settings.threads, deterministic=settings.deterministic):
                found = scoring.score(str(job.folder), _code(job), split="train", output=str(job.store.output), registry=self._known(job))
            measured = {f"train/{name}": found.values[name] for name in found.metrics if name in found.values}
            record.result.update(measured)
            with RunFolder(job.folder).log as log:
                log.append("result", metrics=measured)
        except Exception as error:  # the test result stands without it
            record.reason = f"the training split could not be scored: {reason_of(error)}"


def _is_done(job: Job, before: CellRecord) -> bool:
    """Tell whether a record fulfils a job."""
    if before.status == "paused":
        return job.until is not None and bool(before.history) and before.history[-1]["epoch"] >= job.until
    return before.is_final and (before.status == "finished" or not job.again)


@contextmanager
def garbage_collected() -> Iterator[None]:
    """Free what was made inside: a run's tensors are held by objects that refer to each other, too few for Python to look by itself.

    What was there before (imported libraries, for the most part) is left out, because looking through it takes a quarter of a second.
    """
    ours = not gc.get_freeze_count()
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        if ours:
            gc.unfreeze()


def _code(job: Job) -> list[Leaf]:
    """Return settings with the current paths of the cell's code files, whose content is unchanged by the cell's hash."""
    return [leaf for leaf in job.key.leaves if names_code(leaf)]


class CellObserver:
    """Follows a run: whether training has begun, its time limit, and the number of parallel cells."""

    def __init__(self, job: Job, record: CellRecord, concurrency: Concurrency) -> None:
        self._job, self._record, self._concurrency = job, record, concurrency
        self._since, self._before = time.monotonic(), record.elapsed
        self.began = False

    @hookimpl
    def phase_start(self, run: Run) -> None:
        """Note that training begins: errors from here on are failures of the cell."""
        self.began = True

    @hookimpl
    def progress(self, run: Run) -> None:
        """Check the time limit during an epoch.

        Raises:
            TimedOut: the limit is exceeded.
        """
        self.note()
        if self._job.timeout is not None and self._record.elapsed > self._job.timeout:
            raise TimedOut(f"not done after {self._job.timeout:g} s, in epoch {run.epoch + 1}")

    @hookimpl
    def epoch_end(self, run: Run) -> None:
        """Check the time limit after an epoch."""
        self.progress(run)

    @hookimpl
    def run_end(self, run: Run) -> None:
        """Stop checking the time limit: the rest of the work does not count."""
        self._stop_alarm()

    @contextmanager
    def alarm(self) -> Iterator[None]:
        """Interrupt the code inside when it is long over time and has not checked the limit; only in the main thread.

        Raises:
            TimedOut: the limit is long exceeded; raised again every second, in case it is caught.
        """
        if self._job.timeout is None or not _can_ring():
            yield
            return

        def ring(number: int, frame: Any) -> None:
            raise TimedOut(f"not done after {self._job.timeout:g} s, and the cell does not check its time limit")

        former = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, max(0.0, self._job.timeout - self._before) + PATIENCE, 1.0)
        try:
            yield
        finally:
            self._stop_alarm()
            signal.signal(signal.SIGALRM, former)

    def _stop_alarm(self) -> None:
        if _can_ring():
            signal.setitimer(signal.ITIMER_REAL, 0)

    def note(self) -> None:
        """Record the elapsed time and the number of parallel cells so far."""
        self._concurrency.look()
        self._record.elapsed = self._before + time.monotonic() - self._since
        if self._concurrency.most > self._record.parallel:
            self._record.parallel = self._concurrency.most
            self._job.store.write(
                self._record
            )  # saved at once, so that the record of a killed process still shows that its seconds cannot be compared


def _can_ring() -> bool:
    """Tell whether an alarm can be set here."""
    return HAS_ALARMS and threading.current_thread() is threading.main_thread()


class TaskCache:
    """Caches the last task, which successive cells often share, and the errors of data that cannot be loaded."""

    def __init__(self) -> None:
        self._key: Any = None
        self._task: Task | None = None
        self._missing: list[tuple[Any, BpfreeError]] = []

    def get(self, recipe: Recipe) -> Task:
        """Load a recipe's task, unless it is cached.

        Raises:
            BpfreeError: it cannot be loaded, which is not tried a second time.
        """
        quick = quick_examples(recipe.settings) if recipe.settings.quick else None
        key = (recipe.task_id, recipe.options["task"], recipe.task, recipe.root(), quick)
        for other, error in self._missing:
            if other == key:
                raise error
        if self._task is None or self._key != key:
            self._task = None  # two large sets need not be in memory at once
            try:
                self._key, self._task = key, recipe.build_task()
            except BpfreeError as error:
                self._missing.append((key, error))
                raise
        return self._task


def reason_of(error: BaseException) -> str:
    """Format an error in one line."""
    if isinstance(error, BpfreeError):
        return " ".join(f"{error.what} ({error.where})".split()) if error.where else " ".join(error.what.split())
    return redact(f"{type(error).__name__}: {' '.join(str(error).split())}")
