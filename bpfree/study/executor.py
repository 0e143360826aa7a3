"""The interface of executors, which run the cells of a study in any order, each in a process that may die.

The study (:func:`bpfree.study.command.execute`) gives it jobs as long as there is room, asks which have ended, and saves their records. A
cell whose worker has died is given to it again, and resumes from its checkpoint. So an executor need not retry, and stores nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from bpfree.study.store import CellRecord
from bpfree.study.worker import Job, Worker

__all__ = ["GRACE", "Ended", "Executor", "Request", "run_job"]

GRACE = 60.0
"""Grace period in seconds for saving before a worker is killed, also for a cell beyond its time."""


@dataclass(frozen=True)
class Request:
    """Describe the cells that an executor is made for.

    Attributes:
        jobs: cells at a time, as ``--jobs`` says; ``None``: it does not.
        usual: the same, as the study says.
        left: cells that are to be run.
        threads: processors of a cell.
        on_gpu: whether cells train on a GPU.
        folder: of the study, for files of the executor's own.
    """

    jobs: int | None
    usual: int
    left: int
    threads: int
    on_gpu: bool
    folder: Path


@dataclass(frozen=True)
class Ended:
    """The end of a job.

    Attributes:
        cell: ``job.key.id``.
        record: what :func:`run_job` has returned; ``None``: another process runs the cell, or the worker has died.
        died: how the worker died, if it did.
        final: whether another attempt is pointless.
    """

    cell: str
    record: CellRecord | None
    died: str = ""
    final: bool = False


@runtime_checkable
class Executor(Protocol):
    """Runs jobs; made with a :class:`Request` and its options, whose dataclass is its attribute ``Config``, if it has any.

    Attributes:
        slots: how many at a time.
    """

    slots: int

    def start(self, job: Job) -> None:
        """Have a worker call :func:`run_job` with this job, which can be pickled; a slot is free."""

    def wait(self) -> list[Ended]:
        """Wait for about a second, and return the jobs that have ended, if any.

        Raises:
            Interrupted: asked to stop.
        """

    def close(self) -> None:
        """End the workers: send SIGTERM to those that run a cell, and give them time to save it."""


def run_job(job: Job) -> CellRecord | None:
    """Run a cell in this process, which may be on a machine that does not share the study's folder.

    Args:
        job: of the cell.

    Returns:
        The record of the cell; ``None``: another process runs it.

    Raises:
        Interrupted: this process was asked to stop; the cell has a checkpoint.
    """
    job.store.output.mkdir(parents=True, exist_ok=True)
    return Worker().run(job)
