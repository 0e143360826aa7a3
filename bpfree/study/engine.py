"""The loop of a study: start what is ready wherever there is room, note what has ended, until nothing is left."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from bpfree.leaves import Leaf
from bpfree.study.cells import is_scientific
from bpfree.study.executors import Ended, Executor
from bpfree.study.rows import Cell
from bpfree.study.status import epoch_of
from bpfree.study.store import CellRecord
from bpfree.study.worker import Job
from bpfree.study.worklist import Worklist

__all__ = ["Display", "Jobs", "execute"]

DEATHS = 3
"""A worker that dies takes its cell with it so often; then the cell has failed."""
POLL = 1.0
"""Seconds between looks at cells that other processes run."""


class Display(Protocol):
    """Shows a study's progress."""

    def started(self, cell: Cell, before: CellRecord | None) -> None:
        """A cell is given to a worker, which resumes what was there before."""

    def waiting(self, cells: Sequence[Cell], epoch: Callable[[Cell], str]) -> None:
        """About once a second, while these run; ``epoch`` says how far one is."""

    def ended(self, cell: Cell, record: CellRecord | None, left: int) -> None:
        """A cell has ended (``None``: another process runs it), and so many are left."""

    def say(self, text: str) -> None:
        """Anything else."""


class Jobs:
    """Makes jobs of cells.

    Args:
        worklist: whose cells they are.
        overrides: of the command line; those that say where and how reach resumed runs too.
        parent: identifier of the study's MLflow run; empty without one.
        timeout: seconds that a cell may take.
        quiet: no progress display within a cell.
    """

    def __init__(
        self, worklist: Worklist, overrides: Sequence[Leaf] = (), *, parent: str = "", timeout: float | None = None, quiet: bool = True
    ) -> None:
        self._worklist, self._parent, self._timeout, self._quiet = worklist, parent, timeout, quiet
        self._changes = [dataclasses.replace(leaf, shared=True) for leaf in overrides if not is_scientific(leaf.key)]

    def of(self, cell: Cell) -> Job:
        """The job of a cell."""
        before = self._worklist.store.read(cell.key.id)
        again = before is not None and before.status in self._worklist.retry
        return Job(
            cell.key,
            self._worklist.store,
            changes=self._changes,
            tags=self._tags(cell),
            timeout=self._timeout,
            training=cell.key.trial is None and self._worklist.plan.study.publishes("train"),
            again=again,
            # a cell whose time was up goes on from its checkpoint; one that was refused may have one that cannot be read
            restart=before is not None and ((again and before.status in ("failed", "diverged")) or before.status == "refused"),
            quiet=self._quiet,
        )

    def _tags(self, cell: Cell) -> dict[str, str]:
        key, unused = cell.key, ", ".join(cell.recipe.unused)
        tags = {"study": self._worklist.plan.study.name, "study_row": key.row, "study_column": key.column, "study_cell": key.id}
        tags |= {"unused": unused} if unused else {}
        tags |= {} if key.trial is None else {"study_trial": str(key.trial)}
        return tags | ({"mlflow.parentRunId": self._parent} if self._parent else {})


def execute(worklist: Worklist, jobs: Jobs, executor: Executor, display: Display) -> None:
    """Run all that is to be run. Other processes may do the same at the same time; each takes cells that no other has.

    Raises:
        Interrupted: asked to stop; what was running has saved its checkpoints. The next call resumes it.
    """
    running: dict[str, Cell] = {}
    elsewhere: set[str] = set()
    deaths: Counter[str] = Counter()
    while True:
        waiting = [cell for cell in worklist.ready() if cell.key.id not in running and cell.key.id not in elsewhere]
        for cell in waiting[: executor.slots - len(running)]:
            running[cell.key.id] = cell
            display.started(cell, worklist.store.seen(cell.key.id))
            executor.start(jobs.of(cell))
        if not running and not elsewhere:
            return
        if not running:
            time.sleep(POLL)
            elsewhere.clear()  # perhaps they are done, or their process has died
        ended: list[Ended] = []
        while running and not ended:
            ended = executor.wait()
            display.waiting(list(running.values()), lambda cell: epoch_of(worklist.store.output, worklist.store.read(cell.key.id)))
        for one in ended:
            _note(one, running.pop(one.cell), worklist, elsewhere, deaths, display)


def _note(ended: Ended, cell: Cell, worklist: Worklist, elsewhere: set[str], deaths: Counter[str], display: Display) -> None:
    if ended.died:
        deaths[cell.key.id] += 1
        if deaths[cell.key.id] < DEATHS and not ended.final:
            display.say(f"{cell.key.label}: {ended.died}; it goes on in another worker")
            return
        record = worklist.store.read(cell.key.id) or CellRecord(cell.key)
        record.status, record.reason = ("timeout" if ended.final else "failed"), ended.died
        worklist.store.write(record)
        ended = Ended(cell.key.id, record)
    if ended.record is None:
        elsewhere.add(cell.key.id)
    else:
        worklist.take(ended.record)
        worklist.tried(cell.key.id)
    display.ended(cell, ended.record, worklist.left())
