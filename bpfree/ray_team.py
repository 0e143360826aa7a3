"""Training one network in processes of a Ray cluster: each gets its rank, as from ``torchrun``, and runs the same command."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bpfree import interrupts
from bpfree.config import resolve
from bpfree.errors import BpfreeError, UsageError
from bpfree.leaves import Leaf, last_said
from bpfree.plugins import Given, Plugins, installed_plugins
from bpfree.ray_cluster import SECRETS, connect, import_ray, room
from bpfree.run import Run, new_run_id
from bpfree.training.environment import resolve_device

__all__ = ["train"]

GRACE = 120.0
"""Seconds that processes have to save a checkpoint when they are asked to stop."""


@dataclass(frozen=True)
class Order:
    """The instructions to each process.

    Attributes:
        leaves: of the configuration, or its changes.
        resume: the run to resume; ``None``: a new one.
        output: folder of runs.
        run_id: of a new run.
        folder: to work in, where it is there.
        given: files of code that may be executed.
    """

    leaves: Sequence[Leaf]
    resume: str | None
    output: str
    run_id: str
    folder: str
    given: Given = field(default_factory=Given)

    @property
    def place(self) -> Path:
        """The run's folder."""
        return Path(self.output, self.run_id) if self.resume is None else Path(self.resume)


class Member:
    """One process of the run, on the cluster."""

    def standing(self) -> tuple[str, int, int, str]:
        """Return the process's address, a port that is free there, its process number, and its node."""
        import ray

        with socket.socket() as found:
            found.bind(("", 0))
            port = int(found.getsockname()[1])
        return ray.util.get_node_ip_address(), port, os.getpid(), ray.get_runtime_context().get_node_id()

    def train(self, order: Order, environment: dict[str, str]) -> tuple[Run | None, int, str]:
        """Train in this process, and return its run, or the code and text of the error that ended it."""
        from bpfree import runner

        os.environ.update(environment)
        if Path(order.folder).is_dir():
            os.chdir(order.folder)
        registry = installed_plugins().extended(order.given)
        try:
            if order.resume is not None:
                return runner.resume(order.resume, output=order.output, changes=order.leaves, quiet=True, registry=registry), 0, ""
            return runner.run(resolve(order.leaves, registry), run_id=order.run_id, quiet=True), 0, ""
        except BpfreeError as error:
            return None, error.exit_code, str(error)
        except Exception as error:
            return None, 1, f"{type(error).__name__}: {error}"


def train(
    leaves: Sequence[Leaf], *, size: int, address: str | None = None, resume: str | None = None, registry: Plugins | None = None
) -> Run:
    """Train or resume a run in n processes, and return the run of the first one.

    Args:
        leaves: of the configuration, or its changes.
        size: how many processes.
        address: of the cluster, as :func:`bpfree.ray_cluster.connect` takes it.
        resume: the run to resume.
        registry: of names; the installed plugins by default.

    Raises:
        BpfreeError: what ended the run: an error of its own, a process that died, a signal.
    """
    registry = registry or installed_plugins()
    output = last_said(leaves, "output", "runs")
    threads, device = 1, "auto"
    run_id = ""
    if resume is None:
        recipe = resolve(leaves, registry)
        threads, device = recipe.settings.threads or 1, recipe.settings.device
        run_id = new_run_id(f"{recipe.names['rule']}-{recipe.names['task']}-s{recipe.settings.seed}")
    else:
        threads, device = last_said(leaves, "threads", None, int | None) or 1, last_said(leaves, "device", "auto")
    gpus = float(resolve_device(device).type == "cuda")
    ray = import_ray(address)
    own = connect(ray, address, processors=size * threads)
    members: list[Any] = []
    try:
        most = room(ray, processors=threads, gpus=gpus, what="process")
        if most < size:
            raise UsageError(f"the cluster has room for {most} processes, not {size}", where="--ray", fix=f"--ray {most}")
        members = _start(ray, size, threads, gpus)
        return _together(ray, members, Order(leaves, resume, output, run_id, os.getcwd(), registry.given))
    finally:
        for member in members:
            with contextlib.suppress(Exception):
                ray.kill(member)
        if own:
            ray.shutdown()


def _start(ray: Any, size: int, threads: int, gpus: float) -> list[Any]:
    """Start the processes, the first one on this machine if there is room, because it writes the run's folder."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    kind = ray.remote(Member)
    options: dict[str, Any] = {"num_cpus": threads, "num_gpus": gpus, "max_restarts": 0}
    return [kind.options(**options, **({} if rank else {"scheduling_strategy": here})).remote() for rank in range(size)]


def _together(ray: Any, members: Sequence[Any], order: Order) -> Run:
    try:
        standings = ray.get([member.standing.remote() for member in members])
        host, port, *_ = standings[0]
        meeting = {
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(len(members)),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            **{name: os.environ[name] for name in SECRETS if name in os.environ},
        }
        tasks = [member.train.remote(order, {**meeting, "RANK": str(rank)}) for rank, member in enumerate(members)]
        with _forwarded(ray, standings):
            return _wait(ray, tasks, order)
    except ray.exceptions.RayError as error:
        raise _lost(f"a process of the run has died ({type(error).__name__})", order) from error


def _wait(ray: Any, tasks: list[Any], order: Order) -> Run:
    """Wait for the first process's run; when a process has failed, give the others a moment to report too."""
    waiting, failures = list(tasks), []
    end = None
    while waiting and (end is None or time.monotonic() < end):
        ready, waiting = ray.wait(waiting, timeout=0.5)
        failures += [found[1:] for found in ray.get(ready) if found[0] is None]
        if failures and end is None:
            end = time.monotonic() + GRACE
    if not failures:
        return ray.get(tasks[0])[0]  # type: ignore[no-any-return]
    code, text = min(failures, key=lambda failure: "another process of this run" in failure[1] or "the first process failed" in failure[1])
    if code > 128:
        raise _lost(text.splitlines()[0], order, code)
    error = BpfreeError(text)
    error.exit_code = code
    raise error


def _lost(what: str, order: Order, code: int = 1) -> BpfreeError:
    there = (order.place / "checkpoints" / "last.pt").is_file() or order.resume is not None
    error = BpfreeError(
        what, fix=f"resume it with: bpfree train --resume {order.place} --ray N" if there else "it has no checkpoint: start it again"
    )
    error.exit_code = code
    return error


@contextmanager
def _forwarded(ray: Any, standings: Sequence[tuple[str, int, int, str]]) -> Iterator[None]:
    """Forward a first SIGINT or SIGTERM to the processes, which save a checkpoint; a second one ends this process."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def forward(number: int, frame: Any) -> None:
        interrupts.answer(signal.default_int_handler)
        for _, _, process, node in standings:
            place = NodeAffinitySchedulingStrategy(node, soft=False)
            ray.remote(os.kill).options(num_cpus=0, scheduling_strategy=place).remote(process, number)

    with interrupts.handling(forward):
        yield
