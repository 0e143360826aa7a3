"""Running cells, one after the other: what is finished stays, what was interrupted goes on, what fails is a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bpfree import runner, scoring
from bpfree.config import Leaf, Recipe
from bpfree.errors import BpfreeError
from bpfree.hooks import hookimpl
from bpfree.step import Phase
from bpfree.study.cells import Cell, is_scientific
from bpfree.study.file import Study
from bpfree.study.state import Outcome, State
from bpfree.tasks.task import Task
from bpfree.training import environment
from bpfree.training.run import Run
from bpfree.training.trainer import Interrupted

__all__ = ["execute", "to_do"]


def to_do(outcome: Outcome | None, *, retry_failed: bool = False) -> bool:
    """Whether a cell is to be run."""
    return outcome is None or not outcome.is_final or (retry_failed and outcome.status != "finished")


def execute(
    study: Study,
    cells: Sequence[Cell],
    state: State,
    *,
    overrides: Sequence[Leaf] = (),
    retry_failed: bool = False,
    quiet: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Run what is not done. Another process that does the same takes other cells.

    Args:
        study: whose cells they are.
        cells: in the order of running.
        state: where their outcomes are noted.
        overrides: of the command line; those that say where and how reach a resumed run too.
        retry_failed: run failed and diverged cells again, anew.
        quiet: no progress display.
        say: told of what is not shown by a run itself.

    Raises:
        Interrupted: the run in progress was asked to stop. The next call goes on with it.
    """
    worker = _Worker(study, state, [leaf for leaf in overrides if not is_scientific(leaf.key)], quiet, say)
    for number, cell in enumerate(cells, start=1):
        with state.lock(cell.id) as mine:
            label = f"[{number}/{len(cells)}] {cell.label}"
            if not mine:
                say(f"{label}: another process runs it")
            elif to_do(before := state.read(cell.id), retry_failed=retry_failed):
                anew = retry_failed and before is not None and before.status == "refused"  # a checkpoint that cannot be read, perhaps
                worker.run(cell, state.begin(cell, before, anew=anew), label)


class _Worker:
    """Runs single cells."""

    def __init__(self, study: Study, state: State, changes: Sequence[Leaf], quiet: bool, say: Callable[[str], None]) -> None:
        self._study, self._state, self._changes, self._quiet, self._say = study, state, changes, quiet, say
        self._tasks = _Tasks()

    def run(self, cell: Cell, outcome: Outcome, label: str) -> None:
        """Run a cell and note how it ended, whatever a plugin's rule may raise."""
        watch = _Watch(self._study, outcome, self._state)
        try:
            run = self._train(cell, outcome, watch, label)
            folder = run.folder or Path()
            outcome.result, outcome.reason = dict(run.result), run.reason
            outcome.tags = run.tags or runner.ended_as(folder).get("tags", {})
            if run.status == "finished" and self._study.publishes("train"):
                self._score_training(cell, outcome, folder)
            outcome.status = "finished" if run.status == "finished" else "diverged"
        except Interrupted as error:
            outcome.status, outcome.reason = "interrupted", error.what
            raise
        except Exception as error:
            outcome.status = "refused" if isinstance(error, BpfreeError) and not watch.began else "failed"
            outcome.reason = _reason(error)
            self._say(f"{label}: {outcome.reason}")
        finally:
            self._state.write(outcome)

    def _train(self, cell: Cell, outcome: Outcome, watch: _Watch, label: str) -> Run:
        folder = Path(cell.recipe.settings.output) / outcome.run
        if outcome.run and (folder / "checkpoints" / "last.pt").is_file():
            # a run that had finished before this was noted must not be tested again
            changes = [] if runner.ended_as(folder).get("status") == "finished" else self._changes
            self._say(f"{label}: goes on with {folder}")
            return runner.resume(str(folder), output=str(folder.parent), changes=changes, quiet=self._quiet, observers=[watch])
        return runner.run(cell.recipe, quiet=self._quiet, label=label, observers=[watch], task=self._tasks.get(cell.recipe))

    def _score_training(self, cell: Cell, outcome: Outcome, folder: Path) -> None:
        """Loss and accuracy over all examples of the training split, by the weights that were tested."""
        settings = cell.recipe.settings
        try:
            with environment.numerics(threads=settings.threads, deterministic=settings.deterministic):
                _, scores = scoring.score(str(folder), split="train", output=str(folder.parent))
            outcome.result.update({f"train/{name}": scores[name] for name in ("loss", "accuracy") if name in scores})
        except Exception as error:  # the test result stands without it
            outcome.reason = f"the training split could not be scored: {_reason(error)}"
            self._say(f"{cell.label}: {outcome.reason}")


class _Watch:
    """Notes where a run lies as soon as it begins, so that it can go on after whatever ends this process."""

    def __init__(self, study: Study, outcome: Outcome, state: State) -> None:
        self._study, self._outcome, self._state = study, outcome, state
        self.began = False

    @hookimpl
    def run_start(self, run: Run) -> None:
        """Note the run's folder in the cell, and the cell in the run's record."""
        self._outcome.run = run.folder.name if run.folder is not None else ""
        self._state.write(self._outcome)
        run.tags.update(study=self._study.name, study_row=self._outcome.row, study_column=self._outcome.column)

    @hookimpl
    def phase_start(self, run: Run, phase: Phase) -> None:
        """Training begins: what fails from here on is a failure of the cell."""
        self.began = True


class _Tasks:
    """The task that was used last, as cells that follow each other often share it; and the sets that cannot be had."""

    def __init__(self) -> None:
        self._key: Any = None
        self._task: Task | None = None
        self._missing: list[tuple[Any, BpfreeError]] = []

    def get(self, recipe: Recipe) -> Task:
        """Load it, unless it is there.

        Raises:
            BpfreeError: it cannot be loaded; asked again, it is not tried again.
        """
        key = (recipe.names["task"], recipe.options["task"], recipe.task, recipe.root())
        for other, error in self._missing:
            if other == key:
                raise error
        if self._task is None or self._key != key:
            self._task = None  # two large sets need not be in memory at once
            try:
                self._key, self._task = key, recipe.build_task()
            except BpfreeError as error:
                self._missing.append((key, error))
                raise
        return self._task


def _reason(error: Exception) -> str:
    if isinstance(error, BpfreeError):
        return " ".join(f"{error.what} ({error.where})".split()) if error.where else " ".join(error.what.split())
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
