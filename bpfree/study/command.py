"""A study from the first cell to the report: what ``bpfree study run`` and ``bpfree compare`` do."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bpfree.errors import UsageError
from bpfree.leaves import Leaf
from bpfree.study.engine import Display, Jobs, execute
from bpfree.study.executors import Executor, InProcess, Pool, stoppable
from bpfree.study.floors import Floors, measure_floors
from bpfree.study.report import Report, report_on, write_report
from bpfree.study.study_run import StudyRun
from bpfree.study.worklist import Worklist
from bpfree.training.distributed import World
from bpfree.training.environment import resolve_device
from bpfree.training.trainer import Interrupted

__all__ = ["Options", "executor_for", "report", "run"]

logger = logging.getLogger("bpfree")


@dataclass(frozen=True)
class Options:
    """How a study is run.

    Attributes:
        executor: ``local`` (in process for one job, else a pool) or ``ray``.
        jobs: cells at a time; ``None``: what the study says, or one per GPU where there are several.
        address: of a Ray cluster.
        gpus: that a cell asks of a Ray cluster; ``None``: 1 where its device is a GPU.
        timeout: seconds of a cell; ``None``: what the study says.
        folder: where the report goes; ``None``: beside the cells.
        quiet: no progress display.
    """

    executor: Literal["local", "ray"] = "local"
    jobs: int | None = None
    address: str | None = None
    gpus: float | None = None
    timeout: float | None = None
    folder: Path | None = None
    quiet: bool = False


def run(
    worklist: Worklist, overrides: Sequence[Leaf], words: Sequence[str], options: Options, display: Callable[[int], Display]
) -> tuple[Report, Path]:
    """Run what is not done, and report.

    Args:
        worklist: what of the study is to be run.
        overrides: of the command line.
        words: of the command line, for the report.
        options: how.
        display: made for a number of workers.

    Returns:
        The report, and its page.

    Raises:
        Interrupted: asked to stop. The report on what is done is written all the same.
        UsageError: a launcher has started several processes, each of which would run the study.
    """
    if World.here().size > 1:
        raise UsageError("a study has processes of its own, and no launcher", where="WORLD_SIZE", fix="--jobs N, or --executor ray")
    study_run = StudyRun(worklist.plan, worklist.store)
    if ran := bool(worklist.ready()):
        try:
            _execute(worklist, overrides, study_run, options, display)
        except (Interrupted, KeyboardInterrupt):
            study_run.close(worklist, *report(worklist, words, options.folder), "KILLED")
            raise
    else:
        _measure_floors(worklist, logger.info)
    made, page = report(worklist, words, options.folder)
    if ran or not study_run.settled:  # what the store did not take the last time is sent again
        study_run.close(worklist, made, page, "FINISHED" if worklist.complete() else "FAILED")
    return made, page


def _execute(
    worklist: Worklist, overrides: Sequence[Leaf], study_run: StudyRun, options: Options, display: Callable[[int], Display]
) -> None:
    executor = executor_for(worklist, options)
    shown = display(executor.slots)
    study_run.open()
    quiet = options.quiet or not isinstance(executor, InProcess)
    timeout = options.timeout or worklist.plan.study.timeout
    with stoppable():
        try:
            execute(worklist, Jobs(worklist, overrides, parent=study_run.run_id, timeout=timeout, quiet=quiet), executor, shown)
        finally:
            executor.close()
        _measure_floors(worklist, shown.say)


def _measure_floors(worklist: Worklist, say: Callable[[str], None]) -> None:
    if worklist.plan.study.floor:
        measure_floors(worklist.plan, worklist.table(), worklist.store.folder, say)


def executor_for(worklist: Worklist, options: Options) -> Executor:
    """Choose where cells run: in this process, in a pool of processes, or on a Ray cluster.

    Raises:
        UsageError: options of a cluster without one.
        BpfreeError: Ray is not installed, or the cluster does not answer.
    """
    settings = worklist.plan.rows[0].recipe.settings
    on_gpu = resolve_device(settings.device).type == "cuda"
    gpus = visible_gpus() if on_gpu else []
    if options.executor == "ray":
        from bpfree.study.ray_executor import RayExecutor

        share = options.gpus if options.gpus is not None else float(on_gpu)
        return RayExecutor(address=options.address, jobs=options.jobs, threads=settings.threads or 1, gpus=share)
    if options.address is not None:
        raise UsageError("an address is that of a Ray cluster", where="--address", fix="--executor ray")
    if options.gpus is not None:
        raise UsageError("GPUs of a cell are asked of a Ray cluster", where="--gpus", fix="--executor ray; a pool gives each process one")
    wanted = options.jobs or max(worklist.plan.study.jobs, len(gpus))
    jobs = min(wanted, max(1, worklist.left()))
    threads, cores = settings.threads or 1, len(os.sched_getaffinity(0))
    if jobs > 1 and not gpus and jobs * threads > cores:
        logger.warning("%d cells at a time with %d threads each, on %d processors: they will hold each other up", jobs, threads, cores)
    # a pool for the last cell too: who asks for processes may have a rule that takes its process with it
    return InProcess() if wanted == 1 else Pool(jobs, gpus)


def visible_gpus() -> list[str]:
    """The CUDA devices of this process, as ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(index) for index in range(count)]


def report(worklist: Worklist, words: Sequence[str], folder: Path | None) -> tuple[Report, Path]:
    """Write the report on what is finished so far.

    Args:
        worklist: of the study.
        words: of the command line, for the report.
        folder: where it goes; ``None``: beside the cells.

    Returns:
        The report, and its page.
    """
    plan, store = worklist.plan, worklist.store
    floors = Floors(plan, store.folder) if plan.study.floor else None
    made = report_on(plan, worklist.table(), words, hidden=worklist.hidden(), floors=floors)
    return made, write_report(made, folder or store.folder, made.name)
