"""The executor ``slurm``: cells run as jobs of a SLURM cluster, one each, submitted with submitit.

The machines need the same packages, and the folder of runs on a file system that all of them see. submitit's own files, which are pickles
and logs of the jobs, are in a folder of the study that only its owner can read.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from bpfree.errors import BpfreeError, UsageError
from bpfree.options import option
from bpfree.search_path import search_path
from bpfree.study.executor import GRACE, Ended, Request, run_job
from bpfree.study.executors import stoppable
from bpfree.study.store import CellRecord
from bpfree.study.worker import Job

__all__ = ["SlurmConfig", "SlurmExecutor"]

POLL = 1.0


@dataclass
class SlurmConfig:
    """Options of the executor ``slurm``."""

    minutes: int = option(240, "time limit of a job in minutes; a longer cell is resumed in a second and a third job", ge=1)
    partition: str | None = option(None, "partition (default: the cluster's default)")
    gpus: int | None = option(None, "GPUs per cell (default: 1 if the device is a GPU)", ge=0)
    memory: float | None = option(None, "memory per cell in GB (default: the cluster's default)", gt=0)
    parameters: dict[str, Any] = option(factory=dict, help="additional parameters of submitit, such as slurm_account")
    cluster: Literal["slurm", "local"] = option("slurm", "slurm, or local to try the executor with processes on this machine")


class SlurmExecutor:
    """Runs each job as a job of the cluster.

    Args:
        request: without ``jobs`` all cells are submitted at once.
        config: what each job asks for.

    Raises:
        BpfreeError: submitit is not installed, or there is no cluster.
        UsageError: parameters that submitit does not know.
    """

    Config = SlurmConfig

    def __init__(self, request: Request, config: SlurmConfig) -> None:
        try:
            import submitit
        except ImportError as error:
            raise BpfreeError(
                f"this executor needs submitit ({error})", where="--executor slurm", fix="pip install 'bpfree[slurm]'"
            ) from error
        folder = request.folder / "slurm"
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        self.slots = request.jobs or max(1, request.left)
        self._running: dict[Any, Job] = {}
        asked = {
            "name": "bpfree",
            "timeout_min": config.minutes,
            "cpus_per_task": request.threads,
            "gpus_per_node": int(request.on_gpu) if config.gpus is None else config.gpus,
            "mem_gb": config.memory,
            "slurm_partition": config.partition,
        }
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=config.cluster)
            self._executor.update_parameters(**{name: value for name, value in asked.items() if value is not None} | config.parameters)
        except RuntimeError as error:
            fix = "run the study on a machine with sbatch, or choose another --executor"
            raise BpfreeError(f"no SLURM on this machine: {error}", where="--executor slurm", fix=fix) from error
        except (NameError, TypeError, ValueError) as error:
            raise UsageError(f"submitit rejects its parameters: {error}", where="--with parameters=...") from error

    def start(self, job: Job) -> None:
        """Submit the job."""
        with _for_workers():
            self._running[self._executor.submit(_run, job)] = job

    def wait(self) -> list[Ended]:
        """Return the jobs that have ended; a job without a result has died."""
        done = [one for one in self._running if one.done()]
        if not done:
            time.sleep(POLL)
        return [self._ended(one, self._running.pop(one)) for one in done]

    def _ended(self, one: Any, job: Job) -> Ended:
        try:
            return Ended(job.key.id, one.result())
        except Exception as error:  # raised by submitit: there is no result, or the job has raised
            reason = next(reversed(str(error).strip().splitlines()), type(error).__name__)
            return Ended(job.key.id, None, f"its job {one.job_id} died ({one.state}: {reason})")

    def close(self) -> None:
        """Cancel running jobs, whose cells save checkpoints."""
        for one in self._running:
            with contextlib.suppress(Exception):
                one.cancel(check=False)
        until = time.monotonic() + GRACE
        while any(not one.done() for one in self._running) and time.monotonic() < until:
            time.sleep(0.1)
        self._running.clear()


def _run(job: Job) -> CellRecord | None:
    """Run a job in the cluster, with handlers for the signal of a cancelled job, which submitit ignores."""
    with stoppable():
        return run_job(job)


@contextmanager
def _for_workers() -> Iterator[None]:
    """Set the environment that submitted jobs inherit: they import from the search path of this process, not the current folder."""
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "PYTHONSAFEPATH", "OMP_WAIT_POLICY")}
    os.environ |= {"PYTHONPATH": os.pathsep.join(filter(os.path.isabs, search_path())), "PYTHONSAFEPATH": "1"}
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
