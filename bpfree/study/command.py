"""A study from the first cell to the report: what ``bpfree study run`` and ``bpfree compare`` do."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bpfree import sources
from bpfree.errors import UsageError
from bpfree.leaves import Leaf
from bpfree.study.agenda import Agenda
from bpfree.study.cells import Plan
from bpfree.study.engine import Display, Jobs, execute
from bpfree.study.executors import Executor, InProcess, Pool, stoppable
from bpfree.study.floors import Floors, measure_floors
from bpfree.study.parent import Parent
from bpfree.study.report import Report, files_of, report_on, write_report
from bpfree.training.distributed import World
from bpfree.training.environment import resolve_device
from bpfree.training.predictions import FILE
from bpfree.training.trainer import Interrupted

__all__ = ["Options", "is_settled", "report", "run", "watched_files"]

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
    plan: Plan, agenda: Agenda, overrides: Sequence[Leaf], words: Sequence[str], options: Options, display: Callable[[int], Display]
) -> tuple[Report, Path]:
    """Run what is not done, and report.

    Args:
        plan, agenda: the study, and what of it is to be run.
        overrides: of the command line.
        words: of the command line, for the report.
        options: how.
        display: made for a number of workers.

    Raises:
        Interrupted: asked to stop. The report on what is done is written all the same.
        UsageError: a launcher has started several processes, each of which would run the study.
    """
    if World.here().size > 1:
        raise UsageError("a study has processes of its own, and no launcher", where="WORLD_SIZE", fix="--jobs N, or --executor ray")
    parent = Parent(plan, agenda.state)
    if not agenda.ready():
        _measure_floors(plan, agenda, logger.info)
        return _finish(plan, agenda, parent, words, options, ran=False)
    executor = _executor(plan, agenda, options)
    shown = display(executor.slots)
    parent.open()
    in_process = isinstance(executor, InProcess)
    timeout = options.timeout or plan.study.timeout
    jobs = Jobs(agenda, overrides=overrides, parent=parent.run_id, timeout=timeout, quiet=options.quiet or not in_process)
    try:
        with stoppable():
            try:
                execute(agenda, jobs, executor, shown)
            finally:
                executor.close()
            _measure_floors(plan, agenda, shown.say)
    except (Interrupted, KeyboardInterrupt):
        _finish(plan, agenda, parent, words, options, ran=True, interrupted=True)
        raise
    return _finish(plan, agenda, parent, words, options, ran=True)


def _measure_floors(plan: Plan, agenda: Agenda, say: Callable[[str], None]) -> None:
    if plan.study.floor:
        measure_floors(plan, agenda.lines(), agenda.state.folder, say)


def _executor(plan: Plan, agenda: Agenda, options: Options) -> Executor:
    settings = plan.cells[0].recipe.settings
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
    wanted = options.jobs or max(plan.study.jobs, len(gpus))
    jobs = min(wanted, max(1, agenda.left()))
    threads, cores = settings.threads or 1, len(os.sched_getaffinity(0))
    if jobs > 1 and not gpus and jobs * threads > cores:
        logger.warning("%d cells at a time with %d threads each, on %d processors: they will hold each other up", jobs, threads, cores)
    # a pool for the last cell too: who asks for processes may have a rule that takes its process with it
    return InProcess(lambda text: None) if wanted == 1 else Pool(jobs, gpus)


def visible_gpus() -> list[str]:
    """The CUDA devices of this process, as ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(index) for index in range(count)]


def report(plan: Plan, agenda: Agenda, words: Sequence[str], folder: Path | None) -> tuple[Report, Path]:
    """The report on what is finished so far, written.

    Returns:
        The report, and its page.
    """
    floors = Floors(plan, agenda.state.folder) if plan.study.floor else None
    made = report_on(plan, agenda.lines(), words, hidden=agenda.hidden(), runs=plan.output, floors=floors)
    return made, write_report(made, folder or agenda.state.folder, made.name)


def _finish(
    plan: Plan, agenda: Agenda, parent: Parent, words: Sequence[str], options: Options, *, ran: bool, interrupted: bool = False
) -> tuple[Report, Path]:
    made, page = report(plan, agenda, words, options.folder)
    if ran or not parent.settled:  # what the store did not take the last time is sent again
        status = "KILLED" if interrupted else "FINISHED" if agenda.complete() else "FAILED"
        parent.close(made.lines, agenda.all_cells(), files_of(page), status)
    return made, page


def is_settled(plan: Plan, agenda: Agenda) -> bool:
    """Whether nothing is left to do: the tracking store has it all, and all that an answer depends on can be watched."""
    return plan.book.watchable and Parent(plan, agenda.state).settled


def watched_files(plan: Plan, agenda: Agenda, page: Path) -> tuple[list[Path], Iterable[Path]]:
    """What an answer depends on: files, and folders of sources."""
    known = [outcome for cell in agenda.cells() if (outcome := agenda.state.read(cell.id)) is not None]
    cells = [agenda.state.path_of(outcome.cell) for outcome in known]
    kept = [
        path for outcome in known if outcome.run and (path := plan.output / outcome.run / FILE).is_file()
    ]  # errors are over examples too
    study = [plan.study.path] if plan.study.path is not None else []
    floors = sorted((agenda.state.folder / "floors").glob("*"))
    return [*study, *cells, *kept, *floors, *plan.book.files, *files_of(page)], sources.all_roots(plan.cells[0].recipe.registry)
