"""The loop of a study: start what is ready wherever there is room, note what has ended, until nothing is left."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from bpfree.leaves import Leaf
from bpfree.study.agenda import Agenda
from bpfree.study.cells import Cell, is_scientific
from bpfree.study.executors import Ended, Executor
from bpfree.study.standing import epoch_of
from bpfree.study.state import Outcome
from bpfree.study.worker import Job

__all__ = ["Display", "Jobs", "execute"]

DEATHS = 3
"""A worker that dies takes its cell with it so often; then the cell has failed."""
POLL = 1.0
"""Seconds between looks at cells that other processes run."""


class Display(Protocol):
    """Shows a study's progress."""

    def started(self, cell: Cell, before: Outcome | None) -> None:
        """A cell is given to a worker, which resumes what was there before."""

    def waiting(self, cells: Sequence[Cell], epoch: Callable[[Cell], str]) -> None:
        """About once a second, while these run; ``epoch`` says how far one is."""

    def ended(self, cell: Cell, outcome: Outcome | None, left: int) -> None:
        """A cell has ended (``None``: another process runs it), and so many are left."""

    def say(self, text: str) -> None:
        """Anything else."""


class Jobs:
    """Makes jobs of cells.

    Args:
        agenda: whose cells they are.
        overrides: of the command line; those that say where and how reach resumed runs too.
        parent: identifier of the study's MLflow run; empty without one.
        timeout: seconds that a cell may take.
        quiet: no progress display within a cell.
    """

    def __init__(
        self, agenda: Agenda, *, overrides: Sequence[Leaf] = (), parent: str = "", timeout: float | None = None, quiet: bool = True
    ) -> None:
        self._agenda, self._parent, self._timeout, self._quiet = agenda, parent, timeout, quiet
        self._changes = [dataclasses.replace(leaf, shared=True) for leaf in overrides if not is_scientific(leaf.key)]

    def of(self, cell: Cell) -> Job:
        """The job of a cell."""
        study, before = self._agenda.plan.study, self._agenda.state.read(cell.id)
        again = before is not None and before.status in self._agenda.retry
        return Job(
            study=study.name,
            cell=cell.id,
            row=cell.row,
            column=cell.column,
            seed=cell.seed,
            trial=cell.trial,
            identity=cell.identity,
            leaves=cell.leaves,
            output=cell.recipe.settings.output,
            changes=self._changes,
            label=cell.label,
            tags=self._tags(cell),
            timeout=self._timeout,
            training=cell.trial is None and study.publishes("train"),
            again=again,
            # a cell whose time was up goes on from its checkpoint; one that was refused may have one that cannot be read
            restart=before is not None and ((again and before.status in ("failed", "diverged")) or before.status == "refused"),
            quiet=self._quiet,
        )

    def _tags(self, cell: Cell) -> dict[str, str]:
        tags = {"study": self._agenda.plan.study.name, "study_row": cell.row, "study_column": cell.column, "study_cell": cell.id}
        tags |= {"unused": ", ".join(cell.recipe.unused)} if cell.recipe.unused else {}
        tags |= {} if cell.trial is None else {"study_trial": str(cell.trial)}
        return tags | ({"mlflow.parentRunId": self._parent} if self._parent else {})


def execute(agenda: Agenda, jobs: Jobs, executor: Executor, display: Display) -> None:
    """Run all that is to be run. Other processes may do the same at the same time; each takes cells that no other has.

    Raises:
        Interrupted: asked to stop; what was running has saved its checkpoints. The next call resumes it.
    """
    running: dict[str, Cell] = {}
    elsewhere: set[str] = set()
    deaths: Counter[str] = Counter()
    while True:
        waiting = [cell for cell in agenda.ready() if cell.id not in running and cell.id not in elsewhere]
        for cell in waiting[: executor.slots - len(running)]:
            running[cell.id] = cell
            display.started(cell, agenda.state.seen(cell.id))
            executor.start(jobs.of(cell))
        if not running and not elsewhere:
            return
        if not running:
            time.sleep(POLL)
            elsewhere.clear()  # perhaps they are done, or their process has died
        ended: list[Ended] = []
        while running and not ended:
            ended = executor.wait()
            display.waiting(list(running.values()), lambda cell: epoch_of(agenda, agenda.state.read(cell.id)))
        for one in ended:
            _note(one, running.pop(one.cell), agenda, elsewhere, deaths, display)


def _note(ended: Ended, cell: Cell, agenda: Agenda, elsewhere: set[str], deaths: Counter[str], display: Display) -> None:
    if ended.died:
        deaths[cell.id] += 1
        if deaths[cell.id] < DEATHS and not ended.final:
            display.say(f"{cell.label}: {ended.died}; it goes on in another worker")
            return
        outcome = agenda.state.read(cell.id) or Outcome(cell.id, cell.row, cell.column, cell.seed, trial=cell.trial)
        outcome.status, outcome.reason = ("timeout" if ended.final else "failed"), ended.died
        agenda.state.write(outcome)
        ended = Ended(cell.id, outcome)
    if ended.outcome is None:
        elsewhere.add(cell.id)
    else:
        agenda.take(ended.outcome)
        agenda.tried(cell.id)
    display.ended(cell, ended.outcome, agenda.left())
