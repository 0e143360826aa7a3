"""The executor ``ray``: cells run as tasks of a Ray cluster, which may have many machines.

A task asks for as many processors as its cell has threads, and for a GPU where there are any. Ray starts the task of a worker that dies
again in another one, which resumes from the checkpoint if it sees the folder of runs; machines that do not share it send their results
back all the same.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Any

from bpfree.options import option
from bpfree.ray_cluster import SECRETS, connect, import_ray, room
from bpfree.study.executor import GRACE, Ended, Request, run_job
from bpfree.study.store import CellRecord
from bpfree.study.worker import Job

__all__ = ["RayConfig", "RayExecutor"]

RETRIES = 3
"""Number of times that Ray restarts a task whose worker has died."""


@dataclass
class RayConfig:
    """Options of the executor ``ray``."""

    address: str | None = option(
        None, "address of the Ray cluster, or auto for the cluster of this machine (default: $RAY_ADDRESS, otherwise a local cluster)"
    )
    gpus: float | None = option(None, "GPUs to request per cell; may be a fraction (default: 1 if the device is a GPU)", ge=0)


class RayExecutor:
    """Runs jobs as tasks of a cluster.

    Args:
        request: ``jobs`` are the processors of a cluster of its own, or the most cells at a time on another (``None``: as many as it has
            room for).
        config: which cluster.

    Raises:
        BpfreeError: Ray is not installed, or the cluster does not answer.
    """

    Config = RayConfig

    def __init__(self, request: Request, config: RayConfig) -> None:
        threads, gpus = request.threads, float(request.on_gpu) if config.gpus is None else config.gpus
        self._ray = import_ray(config.address)
        self._tasks: dict[Any, Job] = {}
        self._own = connect(self._ray, config.address, processors=(request.jobs or os.cpu_count() or 1) * threads)
        self._remote = self._ray.remote(_run).options(num_cpus=threads, num_gpus=gpus, max_retries=RETRIES, retry_exceptions=False)
        most = room(self._ray, processors=threads, gpus=gpus, what="cell")
        self.slots = min(most, request.jobs or most)

    def start(self, job: Job) -> None:
        """Submit the job as a task."""
        self._tasks[self._remote.remote(job, {name: os.environ[name] for name in SECRETS if name in os.environ})] = job

    def wait(self) -> list[Ended]:
        """Wait for a task to end, and return its result, if any."""
        ready, _ = self._ray.wait(list(self._tasks), timeout=1.0)
        return [self._ended(task, self._tasks.pop(task)) for task in ready]

    def _ended(self, task: Any, job: Job) -> Ended:
        try:
            record: CellRecord | None = self._ray.get(task)
        except self._ray.exceptions.RayError as error:  # after all retries
            return Ended(job.key.id, None, f"its worker died ({type(error).__name__})")
        return Ended(job.key.id, record)

    def close(self) -> None:
        """Stop running cells, which save checkpoints, and leave the cluster."""
        for task in self._tasks:
            with contextlib.suppress(Exception):
                self._ray.cancel(task, force=False, recursive=False)
        if self._tasks:
            self._ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=GRACE)
        self._tasks.clear()
        if self._own:
            self._ray.shutdown()


def _run(job: Job, environment: dict[str, str]) -> CellRecord | None:
    """Run a job in a worker of the cluster."""
    os.environ.update(environment)
    return run_job(job)
