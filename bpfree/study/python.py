"""Run studies from Python with :func:`compare` and :func:`run_study`; rules, networks and tasks may be objects."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bpfree.leaves import Leaf, leaves_of
from bpfree.network.builders import NetworkBuilder
from bpfree.plugins import installed_plugins
from bpfree.rule import Rule
from bpfree.study import cells, command
from bpfree.study.comparing import comparison
from bpfree.study.model import Study
from bpfree.study.progress import StudyProgress
from bpfree.study.report import Report
from bpfree.study.rows import Cell
from bpfree.study.store import CellRecord
from bpfree.study.things import Things
from bpfree.study.worklist import Worklist
from bpfree.tasks.task import DataSource, Task
from bpfree.tracking.notebook import in_notebook

__all__ = ["compare", "run_study"]

logger = logging.getLogger("bpfree")


def compare(
    rules: Sequence[str | type[Rule]],
    *,
    network: str | NetworkBuilder | Callable[..., Any] | None = None,
    task: str | Task | DataSource | Callable[..., Any] = "digits",
    settings: Mapping[str, Any] | None = None,
    seeds: int = 3,
    references: bool = True,
    output: str | Path = "runs",
    jobs: int | None = None,
    progress: bool = True,
) -> Report:
    """Compare rules over seeds, as ``bpfree compare`` does; finished cells are not run again.

    Args:
        rules: names (with settings of their own: ``"noprop-dt,rule.T=1"``), or classes.
        network: a name; a function that returns a network or any module; a subclass of ``nn.Module``; ``None``: what each rule asks for.
        task: a name, a task, or a function that returns one or ``(train, test)``.
        settings: of all cells, by dotted key or nested: ``{"budget.epochs": 10}``.
        seeds: how many.
        references: add the linear classifier, own-prediction twins and back-propagation.
        output: folder of runs.
        jobs: cells at a time; with several, objects must be importable by other processes.
        progress: show it: in place in a notebook, a line for each cell elsewhere. Without it only failures are logged.

    Returns:
        The report, which a notebook shows; ``.text()`` gives it as the terminal would show it. Its page lies in ``OUTPUT/studies``.

    Raises:
        UsageError: with every problem, before anything is trained.
    """
    things = Things(installed_plugins())
    words = [things.name("rules", rule) for rule in rules]
    common = [Leaf("task", things.name("tasks", task), "compare")]
    common += [] if network is None else [Leaf("network", things.name("networks", network), "compare")]
    common += leaves_of(settings or {}, "", "compare")
    study = comparison(words, common, seeds=seeds, references=references, registry=things.registry)
    return _run(cells.plan(study, [_output(output)], registry=things.registry), output, jobs, progress)


def run_study(
    study: Study,
    *,
    settings: Mapping[str, Any] | None = None,
    output: str | Path = "runs",
    jobs: int | None = None,
    progress: bool = True,
) -> Report:
    """Run the unfinished cells of a study, and report on it.

    Args:
        study: of a file (:func:`bpfree.study.file.find_study`), or made of :class:`bpfree.study.model.Row`.
        settings: of all cells, over those of the study.
        output: folder of runs.
        jobs: cells at a time; ``None``: what the study says.
        progress: as in :func:`compare`.

    Returns:
        The report; ``.text()`` gives it as the terminal would show it.

    Raises:
        UsageError: with every problem, before anything is trained.
    """
    overrides = [*leaves_of(settings or {}, "", "run_study"), _output(output)]
    return _run(cells.plan(study, overrides), output, jobs, progress)


def _output(folder: str | Path) -> Leaf:
    return Leaf("output", str(folder), "output")


def _run(plan: cells.Plan, output: str | Path, jobs: int | None, progress: bool) -> Report:
    worklist = Worklist(plan)
    shown = StudyProgress(plan.study.title, worklist.count(), worklist.left(), quiet=False) if progress else None
    display: Callable[[int], command.Display] = (lambda slots: _Logged()) if shown is None else shown.of
    live = progress and sys.stderr.isatty() and not in_notebook()  # elsewhere the lines of each cell's own progress would be too many
    options = command.Options(jobs=jobs, quiet=not live)
    report, page = command.run(worklist, [_output(output)], [], options, display)
    logger.info("the report is %s", page) if shown is None else shown.say(f"report: {page}")
    return report


class _Logged:
    """Logs the cells that have ended without a result."""

    def started(self, cell: Cell, before: CellRecord | None) -> None:
        """Do nothing: only failures are logged."""

    def waiting(self, cells: Sequence[Cell], epoch: Callable[[Cell], str]) -> None:
        """Do nothing: only failures are logged."""

    def ended(self, cell: Cell, record: CellRecord | None, left: int) -> None:
        """Log a cell that has ended without a result."""
        if record is not None and record.status != "finished":
            logger.warning("%s: %s: %s", cell.key.label, record.status, record.reason)

    def say(self, text: str) -> None:
        """Log any other message."""
        logger.info("%s", text)
