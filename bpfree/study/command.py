"""Run a study from the first cell to the report, for ``bpfree study run`` and ``bpfree compare``.

The loop starts what is ready wherever there is room, and notes what has ended, until nothing is left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
import typing
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bpfree.errors import BpfreeError, UsageError
from bpfree.leaves import Leaf, parse_words, said
from bpfree.options import range_problems
from bpfree.plugins import installed_plugins, singular
from bpfree.redaction import redacted
from bpfree.study.cells import is_scientific
from bpfree.study.executor import Ended, Executor, Request
from bpfree.study.executors import InProcess, stoppable
from bpfree.study.floors import Floors, measure_floors
from bpfree.study.report import Report, report_on, write_report
from bpfree.study.rows import Cell
from bpfree.study.status import epoch_of
from bpfree.study.store import CellRecord
from bpfree.study.study_run import StudyRun
from bpfree.study.worker import Job
from bpfree.study.worklist import Worklist
from bpfree.training.distributed import World
from bpfree.training.environment import resolve_device
from bpfree.training.trainer import Interrupted
from bpfree.typed import Misfit, typed
from bpfree.yaml_values import plain

__all__ = ["Display", "Jobs", "Options", "asked_for", "execute", "executor_for", "report", "run"]

logger = logging.getLogger("bpfree")

DEATHS = 3
"""Number of workers that may die while running a cell before it counts as failed."""
POLL = 1.0
"""Seconds between checks of the cells that other processes run."""


@dataclass(frozen=True)
class Options:
    """Options of running a study.

    Attributes:
        executor: its name: ``local`` (in process for one job, else a pool), ``ray``, ``slurm``, or a plugin's.
        jobs: cells at a time; ``None``: what the study says, or one per GPU where there are several.
        settings: the executor's own options, ``key=value``.
        timeout: seconds of a cell; ``None``: what the study says.
        folder: of the report; ``None``: that of the cells.
        quiet: no progress display.
    """

    executor: str = "local"
    jobs: int | None = None
    settings: Sequence[str] = ()
    timeout: float | None = None
    folder: Path | None = None
    quiet: bool = False


class Display(Protocol):
    """Shows a study's progress."""

    def started(self, cell: Cell, before: CellRecord | None) -> None:
        """Show that a worker starts a cell, or resumes it from ``before``."""

    def waiting(self, cells: Sequence[Cell], epoch: Callable[[Cell], str]) -> None:
        """Update the display of running cells, about once a second; ``epoch`` returns a cell's progress."""

    def ended(self, cell: Cell, record: CellRecord | None, left: int) -> None:
        """Show that a cell has ended (``None``: another process runs it); ``left`` cells are still to run."""

    def say(self, text: str) -> None:
        """Show any other message."""


def run(
    worklist: Worklist, overrides: Sequence[Leaf], words: Sequence[str], options: Options, display: Callable[[int], Display]
) -> tuple[Report, Path]:
    """Run the unfinished cells of a study, and write its report.

    Args:
        worklist: what of the study is to be run.
        overrides: of the command line.
        words: of the command line, for the report.
        options: how.
        display: made for a number of workers.

    Returns:
        The report, and its page.

    Raises:
        Interrupted: asked to stop; the report on the finished cells is still written.
        UsageError: a launcher has started several processes, each of which would run the study.
    """
    if World.here().size > 1:
        raise UsageError(
            "a study starts its own processes and cannot run under a launcher", where="WORLD_SIZE", fix="use --jobs N or --executor ray"
        )
    worklist.store.claim(worklist.plan.study.path)
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
    if ran or not study_run.settled:  # what the store did not accept the last time is sent again
        study_run.close(worklist, made, page, "FINISHED" if worklist.complete() else "FAILED")
    return made, page


def _execute(
    worklist: Worklist, overrides: Sequence[Leaf], study_run: StudyRun, options: Options, display: Callable[[int], Display]
) -> None:
    executor = executor_for(worklist, options)
    if not isinstance(executor, InProcess):
        try:
            _refuse_unimportable(worklist)
        except UsageError:
            executor.close()
            raise
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


def _refuse_unimportable(worklist: Worklist) -> None:
    """Refuse classes and functions that another process cannot import.

    Raises:
        UsageError: one is defined in the main script or an interactive session.
    """
    for (kind, name), (_, record) in worklist.plan.rows[0].recipe.registry.given.things.items():
        if record.name == "__main__":
            what = f"the {singular(kind)} {name!r} is defined in the main script, which other processes cannot import"
            raise UsageError(what, where="jobs", fix="use jobs=1, or move the definition to a module")


def _measure_floors(worklist: Worklist, say: Callable[[str], None]) -> None:
    if worklist.plan.study.floor:
        measure_floors(worklist.plan, worklist.table(), worklist.store.folder, say)


def asked_for(options: Options) -> tuple[Any, Any]:
    """Look up the executor that the options name, and fill its configuration, without starting anything.

    Raises:
        UsageError: no plugin registers it, or an option that it does not have.
    """
    maker = installed_plugins().get("executors", options.executor, where="--executor")
    return maker, configured(options.executor, maker.options, options.settings)


def executor_for(worklist: Worklist, options: Options) -> Executor:
    """Make the executor that the options name.

    Raises:
        UsageError: no plugin registers it, or an option that it does not have.
        BpfreeError: a library is missing, or the cluster does not answer.
    """
    maker, own = asked_for(options)
    settings, study = worklist.plan.rows[0].recipe.settings, worklist.plan.study
    on_gpu = resolve_device(settings.device).type == "cuda"
    request = Request(options.jobs, study.jobs, worklist.left(), settings.threads or 1, on_gpu, worklist.store.folder)
    try:
        made = maker(request, own)
    except ImportError as error:
        raise BpfreeError(f"the executor {options.executor!r} cannot be used here: {error}", fix="install the missing package") from error
    if not isinstance(made, Executor):
        what = f"the executor {options.executor!r} is not a bpfree.Executor: {made!r:.80}"
        raise UsageError(what, where="--executor", fix="report it to the plugin's author")
    return made


def configured(name: str, config: type, words: Sequence[str]) -> Any:
    """Fill an executor's options from words ``key=value``.

    Raises:
        UsageError: with everything that is wrong.
    """
    hints, values, problems = typing.get_type_hints(config), dict[str, Any](), list[str]()
    for leaf in parse_words(words):
        key, _, part = leaf.key.partition(".")
        if key not in hints:
            elsewhere = _who_has(key) or f"its options: {', '.join(hints) or 'none'}"
            problems.append(f"the executor {name!r} has no option {key} ({elsewhere})")
            continue
        try:
            values[key] = values.get(key, {}) | {part: plain(leaf.value)} if part else typed(leaf.value, hints[key], key)
        except Misfit as error:
            problems.append(f"{key}={said(leaf.value)}: {error}")
    made = config(**values)
    problems += range_problems(made)
    if problems:
        raise UsageError.of(problems, "options of the executor", where=f"--executor {name}")
    return made


def _who_has(key: str) -> str:
    """Name the executors that have this option, as a hint."""
    found = []
    for name, maker, _ in installed_plugins().items("executors"):
        with contextlib.suppress(ImportError):  # an executor that cannot be used here
            found += [f"--executor {name}"] if key in typing.get_type_hints(maker.options) else []
    return " or ".join(found)


def report(worklist: Worklist, words: Sequence[str], folder: Path | None) -> tuple[Report, Path]:
    """Write the report on what is finished so far.

    Args:
        worklist: of the study.
        words: of the command line, for the report.
        folder: of the report; ``None``: that of the cells.

    Returns:
        The report, and its page.
    """
    plan, store = worklist.plan, worklist.store
    floors = Floors(plan, store.folder) if plan.study.floor else None
    made = report_on(plan, worklist.table(), words, hidden=worklist.hidden(), floors=floors)
    return made, write_report(made, folder or store.folder, made.name)


# --- the loop ---------------------------------------------------------------------------------------------------------


class Jobs:
    """Makes jobs of cells.

    Args:
        worklist: whose cells they are.
        overrides: of the command line; those that say where and how reach resumed runs too.
        parent: identifier of the study's MLflow run; empty without one.
        timeout: seconds that a cell may take.
        quiet: no progress display within a cell.
    """

    def __init__(
        self, worklist: Worklist, overrides: Sequence[Leaf] = (), *, parent: str = "", timeout: float | None = None, quiet: bool = True
    ) -> None:
        self._worklist, self._parent, self._timeout, self._quiet = worklist, parent, timeout, quiet
        self._changes = [dataclasses.replace(leaf, shared=True) for leaf in overrides if not is_scientific(leaf.key)]

    def of(self, cell: Cell) -> Job:
        """Make the job of a cell."""
        before = self._worklist.store.read(cell.key.id)
        again = before is not None and before.status in self._worklist.retry
        return Job(
            cell.key,
            self._worklist.store,
            changes=[*_unrecorded(cell.key.leaves), *self._changes],
            tags=self._tags(cell),
            timeout=self._timeout,
            training=cell.key.trial is None and self._worklist.plan.study.publishes("train"),
            again=again,
            # a cell that timed out resumes from its checkpoint; a refused cell may have a checkpoint that cannot be read
            restart=before is not None and ((again and before.status in ("failed", "diverged")) or before.status == "refused"),
            quiet=self._quiet,
            until=self._worklist.until(cell),
            given=cell.recipe.registry.given,
        )

    def _tags(self, cell: Cell) -> dict[str, str]:
        key, unused = cell.key, ", ".join(cell.recipe.unused)
        tags = {"study": self._worklist.plan.study.name, "study_row": key.row, "study_column": key.column, "study_cell": key.id}
        tags |= {"unused": unused} if unused else {}
        tags |= {} if key.trial is None else {"study_trial": str(key.trial)}
        return tags | ({"mlflow.parentRunId": self._parent} if self._parent else {})


def _unrecorded(leaves: Sequence[Leaf]) -> list[Leaf]:
    """Select the settings that a checkpoint does not hold in full, because they are addresses with passwords."""
    return [leaf for leaf in leaves if redacted({leaf.key: leaf.value}) != {leaf.key: leaf.value}]


def execute(worklist: Worklist, jobs: Jobs, executor: Executor, display: Display) -> None:
    """Run all cells that are to be run; other processes may do so at the same time, each with cells that no other process runs.

    Raises:
        Interrupted: asked to stop; running cells have saved checkpoints, from which the next call resumes.
    """
    running: dict[str, Cell] = {}
    elsewhere: set[str] = set()
    deaths: Counter[str] = Counter()
    while True:
        waiting = [cell for cell in worklist.ready() if cell.key.id not in running and cell.key.id not in elsewhere]
        for cell in waiting[: executor.slots - len(running)]:
            running[cell.key.id] = cell
            display.started(cell, worklist.store.seen(cell.key.id))
            executor.start(jobs.of(cell))
        if not running and not elsewhere:
            return
        if not running:
            time.sleep(POLL)
            elsewhere.clear()  # by then they may be done, or their process may have died
        ended: list[Ended] = []
        while running and not ended:
            ended = executor.wait()
            display.waiting(list(running.values()), lambda cell: epoch_of(worklist.store.read(cell.key.id)))
        for one in ended:
            cell = running.pop(one.cell)
            unreported = sum(not worklist.to_do(other) for other in running.values())  # so that each cell has a number of its own
            _note(one, cell, worklist, elsewhere, deaths, display, unreported)


def _note(
    ended: Ended, cell: Cell, worklist: Worklist, elsewhere: set[str], deaths: Counter[str], display: Display, unreported: int
) -> None:
    if ended.died:
        deaths[cell.key.id] += 1
        if deaths[cell.key.id] < DEATHS and not ended.final:
            display.say(f"{cell.key.label}: {ended.died}; another worker resumes it")
            return
        record = worklist.store.read(cell.key.id) or CellRecord(cell.key)
        record.status, record.reason = ("timeout" if ended.final else "failed"), ended.died
        worklist.store.write(record)
        ended = Ended(cell.key.id, record)
    if ended.record is None:
        elsewhere.add(cell.key.id)
    else:
        worklist.take(ended.record)
        if not worklist.has_paused(cell.key.id):
            worklist.tried(cell.key.id)
    display.ended(cell, ended.record, worklist.left() + unreported)
