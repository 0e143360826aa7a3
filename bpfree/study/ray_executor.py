"""Cells as tasks of a Ray cluster: many machines, the same cells, the same store.

A task asks for as many processors as its cell has threads, and for a GPU where there are any. Ray starts the task of a worker that dies
again in another one, which resumes from the checkpoint if it sees the folder of runs; machines that do not share it send their results
back all the same.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

from bpfree.ray_cluster import SECRETS, connect, import_ray, room
from bpfree.study.executors import Ended
from bpfree.study.store import CellRecord
from bpfree.study.worker import Job, Worker

__all__ = ["RayExecutor"]

RETRIES = 3
"""How often Ray starts a task again whose worker has died."""


class RayExecutor:
    """Runs jobs as tasks of a cluster.

    Args:
        address: of the cluster, or ``auto`` for the one that this machine belongs to; ``None``: the environment's ``RAY_ADDRESS``,
            else a cluster of its own on this machine.
        jobs: processors of a cluster of its own; most cells at a time on another (``None``: as many as it has processors or GPUs).
        threads: of a cell.
        gpus: of a cell, perhaps a share; 0 on the CPU.

    Raises:
        BpfreeError: Ray is not installed, or the cluster does not answer.
    """

    def __init__(self, *, address: str | None = None, jobs: int | None = None, threads: int = 1, gpus: float = 0) -> None:
        self._ray = import_ray(address)
        self._tasks: dict[Any, Job] = {}
        self._own = connect(self._ray, address, processors=(jobs or os.cpu_count() or 1) * threads)
        self._remote = self._ray.remote(_run).options(num_cpus=threads, num_gpus=gpus, max_retries=RETRIES, retry_exceptions=False)
        most = room(self._ray, processors=threads, gpus=gpus, what="cell")
        self.slots = min(most, jobs or most)

    def start(self, job: Job) -> None:
        """Submit it."""
        self._tasks[self._remote.remote(job, {name: os.environ[name] for name in SECRETS if name in os.environ})] = job

    def wait(self) -> list[Ended]:
        """The task that has ended, if any."""
        ready, _ = self._ray.wait(list(self._tasks), timeout=1.0)
        return [self._ended(task, self._tasks.pop(task)) for task in ready]

    def _ended(self, task: Any, job: Job) -> Ended:
        try:
            record: CellRecord | None = self._ray.get(task)
        except self._ray.exceptions.RayError as error:  # again and again
            return Ended(job.key.id, None, f"its worker died ({type(error).__name__})")
        return Ended(job.key.id, record)

    def close(self) -> None:
        """Stop what runs, with its checkpoints, and leave the cluster."""
        for task in self._tasks:
            with contextlib.suppress(Exception):
                self._ray.cancel(task, force=False, recursive=False)
        if self._tasks:
            self._ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=60.0)
        self._tasks.clear()
        if self._own:
            self._ray.shutdown()


def _run(job: Job, environment: dict[str, str]) -> CellRecord | None:
    """What a worker of the cluster does."""
    os.environ.update(environment)
    job.store.output.mkdir(parents=True, exist_ok=True)
    return Worker().run(job)
