"""Cells as tasks of a Ray cluster: many machines, the same cells, the same store.

A task asks for as many processors as its cell has threads, and for a GPU where there are any. Ray starts the task of a worker that dies
again in another one, which goes on from the checkpoint if it sees the folder of runs; machines that do not share it send their results
back all the same.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpfree.errors import BpfreeError, UsageError
from bpfree.study.executors import Ended
from bpfree.study.state import Outcome
from bpfree.study.worker import Job, Worker

__all__ = ["RayExecutor"]

logger = logging.getLogger("bpfree")

RETRIES = 3
"""How often Ray starts a task again whose worker has died."""
PASSED_ON = ("BPFREE_DATA", "BPFREE_DISABLE_PLUGINS", "MLFLOW_TRACKING_URI", "MLFLOW_DISABLE_TELEMETRY", "OMP_NUM_THREADS")


@dataclass
class _Request:
    """What a cell asks for."""

    num_cpus: float
    num_gpus: float


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
        self._ray, self._own = _import_ray(), False
        self._request = _Request(threads, gpus)
        self._tasks: dict[Any, Job] = {}
        try:
            self._connect(address or os.environ.get("RAY_ADDRESS"), jobs)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise BpfreeError(f"the Ray cluster does not answer: {error}", where=f"address {address}", fix="ray start --head") from error
        self._remote = self._ray.remote(_run).options(
            num_cpus=self._request.num_cpus, num_gpus=self._request.num_gpus, max_retries=RETRIES, retry_exceptions=False
        )
        self.slots = self._room(jobs)

    def _connect(self, address: str | None, jobs: int | None) -> None:
        if self._ray.is_initialized():
            return
        variables = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        variables["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
        variables["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)  # what is on this path is on theirs
        options: dict[str, Any] = {"runtime_env": {"env_vars": variables}, "log_to_driver": False, "logging_level": logging.ERROR}
        if address is None:
            options |= {"num_cpus": (jobs or os.cpu_count() or 1) * self._request.num_cpus, "include_dashboard": False}
            options |= {"_node_ip_address": "127.0.0.1"}
        else:
            options["address"] = address
        self._ray.init(**options)
        self._own = True

    def _room(self, jobs: int | None) -> int:
        resources = self._ray.cluster_resources()
        request = self._request
        rooms = [resources.get("CPU", 0) / request.num_cpus] if request.num_cpus else []
        rooms += [resources.get("GPU", 0) / request.num_gpus] if request.num_gpus else []
        room = int(min(rooms, default=1))
        if room < 1:
            asked = f"{request.num_cpus:g} processors and {request.num_gpus:g} GPUs"
            raise UsageError(
                f"the cluster has no room for one cell: it asks for {asked}", where=f"cluster: {_listed(resources)}", fix="lower threads"
            )
        return min(room, jobs or room)

    def start(self, job: Job) -> None:
        """Submit it."""
        self._tasks[self._remote.remote(job)] = job

    def wait(self) -> list[Ended]:
        """The task that has ended, if any."""
        ready, _ = self._ray.wait(list(self._tasks), timeout=1.0)
        return [self._ended(task, self._tasks.pop(task)) for task in ready]

    def _ended(self, task: Any, job: Job) -> Ended:
        try:
            outcome: Outcome | None = self._ray.get(task)
        except self._ray.exceptions.RayError as error:  # again and again
            return Ended(job.cell, None, f"its worker died ({type(error).__name__})")
        return Ended(job.cell, outcome)

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


def _run(job: Job) -> Outcome | None:
    """What a worker of the cluster does."""
    Path(job.output).mkdir(parents=True, exist_ok=True)
    return Worker().run(job)


def _listed(resources: dict[str, float]) -> str:
    return ", ".join(f"{name} {resources[name]:g}" for name in ("CPU", "GPU") if name in resources) or "empty"


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage reports to its makers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise BpfreeError(f"this executor needs Ray ({error})", where="--executor ray", fix="pip install 'bpfree[ray]'") from error
    return ray
