"""The executor ``local``: cells run in this process, or in a pool of processes on this machine."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from bpfree import interrupts, system
from bpfree.errors import UsageError
from bpfree.options import NoOptions
from bpfree.plugins import installed_plugins
from bpfree.search_path import search_path
from bpfree.study.executor import GRACE, Ended, Executor, Request
from bpfree.study.worker import Job, Worker
from bpfree.training.trainer import Interrupted

__all__ = ["InProcess", "Pool", "local", "serve", "stoppable", "visible_gpus"]

logger = logging.getLogger("bpfree")

READY = "ready"
"""Message of a worker that has finished its imports."""


def local(request: Request, options: NoOptions) -> Executor:
    """Run one cell after the other here, or several at a time in a pool: as many as there are GPUs, where they are used.

    Args:
        request: without ``jobs``, the study or the number of GPUs says how many.
        options: none.

    Raises:
        UsageError: several at a time, on a system without pools.
    """
    gpus = visible_gpus() if request.on_gpu else []
    wanted = request.jobs or max(request.usual, len(gpus))
    if wanted > 1 and not system.HAS_POOLS:
        wanted = _one(request)
    jobs, cores = min(wanted, max(1, request.left)), system.processors()
    if jobs > 1 and not gpus and jobs * request.threads > cores:
        many = "%d cells at a time with %d threads each oversubscribe the %d processors"
        logger.warning(many, jobs, request.threads, cores)
    # keep the pool even for one cell, because a rule may crash its process
    return InProcess() if wanted == 1 else Pool(jobs, gpus)


def _one(request: Request) -> int:
    """Run one cell at a time where the system has no pools of processes.

    Raises:
        UsageError: more were asked for.
    """
    what = "several cells at a time need a system that hands a process its connection, as Linux does"
    if request.jobs:
        raise UsageError(what, where=f"--jobs {request.jobs}", fix="--jobs 1, or --executor ray")
    logger.warning("%s: they run one after the other", what)
    return 1


def visible_gpus() -> list[str]:
    """Return the CUDA devices of this process, as ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(index) for index in range(count)]


class InProcess:
    """Runs one cell after the other in this process."""

    slots = 1

    def __init__(self) -> None:
        self._worker, self._ended = Worker(), list[Ended]()

    def start(self, job: Job) -> None:
        """Run the job at once."""
        self._ended.append(Ended(job.key.id, self._worker.run(job)))

    def wait(self) -> list[Ended]:
        """Return the job that has run."""
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """Do nothing, because no worker was started."""


@dataclass
class _WorkerProcess:
    """A process of the pool."""

    process: subprocess.Popen[bytes]
    connection: Connection
    number: int
    job: Job | None = None
    ready: bool = False
    since: float = math.inf

    def begin(self) -> None:
        """Start the clock of its cell once the worker is ready, so that imports do not count."""
        self.since = time.monotonic() if self.ready else math.inf


class Pool:
    """Runs cells in processes on this machine, which are started when needed and replaced when they die.

    Where there are GPUs, each process sees one of them, in turn. Processes end when this one dies, for whatever reason.

    Args:
        jobs: how many.
        gpus: as ``CUDA_VISIBLE_DEVICES`` names them; empty for the CPU.
    """

    def __init__(self, jobs: int, gpus: Sequence[str] = ()) -> None:
        self.slots, self._gpus = jobs, list(gpus)
        self._workers: list[_WorkerProcess] = []

    def start(self, job: Job) -> None:
        """Send the job to a free process."""
        worker = next((worker for worker in self._workers if worker.job is None and worker.process.poll() is None), None) or self._new()
        worker.job = job
        worker.begin()
        with contextlib.suppress(OSError):  # the process has just died, which the next wait detects
            worker.connection.send(job)

    def wait(self) -> list[Ended]:
        """Collect results and dead workers, and kill workers whose cell is long over time."""
        busy = [worker for worker in self._workers if worker.job is not None]
        wait([worker.connection for worker in busy], timeout=1.0)  # a connection ends when its process does
        return [found for worker in busy if (found := self._look(worker)) is not None]

    def close(self) -> None:
        """Stop running cells, which save checkpoints."""
        for worker in self._workers:
            with contextlib.suppress(OSError):
                if worker.job is not None:
                    worker.process.terminate()
                else:
                    worker.connection.send(None)
        deadline = time.monotonic() + GRACE
        for worker in self._workers:
            _end(worker, max(0.0, deadline - time.monotonic()))
        self._workers.clear()

    def _new(self) -> _WorkerProcess:
        taken = {worker.number for worker in self._workers}
        number = next(number for number in range(len(taken) + 1) if number not in taken)
        ours, theirs = socket.socketpair()
        variables = {
            **os.environ,
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        }  # a worker that waits must not occupy a processor
        variables["PYTHONSAFEPATH"] = "1"  # neither a worker nor its child processes import from the current folder
        if self._gpus:
            variables["CUDA_VISIBLE_DEVICES"] = self._gpus[number % len(self._gpus)]
        # a process group of its own: Ctrl-C reaches only this process, which then stops the workers
        code = (
            f"import sys; sys.path[:] = {search_path()}; from bpfree.study.executors import serve; serve({theirs.fileno()}, {os.getpid()})"
        )
        command = [sys.executable, "-c", code]
        process = subprocess.Popen(command, env=variables, pass_fds=[theirs.fileno()], process_group=0, stdin=subprocess.DEVNULL)
        theirs.close()
        worker = _WorkerProcess(process, Connection(ours.detach()), number)
        self._workers.append(worker)
        return worker

    def _look(self, worker: _WorkerProcess) -> Ended | None:
        assert worker.job is not None
        job = worker.job
        try:
            if worker.connection.poll():
                record = worker.connection.recv()
                if record == READY:
                    worker.ready = True
                    worker.begin()
                    return None
                worker.job = None
                return Ended(job.key.id, record)
        except (EOFError, OSError):
            self._workers.remove(worker)
            _end(worker, 1.0)
            return Ended(job.key.id, None, f"its worker died ({_how(worker.process.returncode)})")
        if job.timeout is not None and time.monotonic() - worker.since > 1.5 * job.timeout + GRACE:
            self._workers.remove(worker)
            _end(worker, 0.0)
            return Ended(job.key.id, None, f"killed: it did not stop after its timeout of {job.timeout:g} s", final=True)
        return None


def _end(worker: _WorkerProcess, patience: float) -> None:
    """Wait for a process to end, for some seconds, then kill it."""
    try:
        worker.process.wait(patience)
    except subprocess.TimeoutExpired:
        worker.process.kill()
        worker.process.wait()
    worker.connection.close()


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"


def serve(handle: int, parent: int) -> None:
    """Run jobs in a process of the pool until it is asked to end.

    Args:
        handle: of the connection.
        parent: identifier of the process that started this one, and whose death ends it.
    """
    _end_with(parent)
    connection = Connection(handle)
    worker = Worker()
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt, Interrupted), stoppable():
        installed_plugins().reported = True  # by the parent process
        connection.send(READY)
        while (job := connection.recv()) is not None:
            connection.send(worker.run(job))


def _end_with(parent: int) -> None:
    """Ask the kernel to end this process when its parent dies, even if that is killed (Linux)."""
    set_death_signal = 1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(set_death_signal, signal.SIGTERM)
    if os.getppid() != parent:  # the parent died before the call above
        os._exit(1)


@contextmanager
def stoppable() -> Iterator[None]:
    """Turn the signals that end a process into an exception inside the context.

    Raises:
        Interrupted: one of them came.
    """

    def stop(number: int, frame: Any) -> None:
        interrupts.answer(signal.SIG_DFL)  # a second signal ends the process at once
        raise Interrupted(f"stopped by {signal.Signals(number).name}", None)

    with interrupts.handling(stop):
        yield
