"""What of a study is to be run: all of it, in order, as far as it is known; tuning makes more of it as it goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from bpfree.errors import UsageError, nearest
from bpfree.leaves import Leaf
from bpfree.study.cells import Cell, Place, Plan, cell_of, recipe_with, twin_of
from bpfree.study.line import Line
from bpfree.study.state import Outcome, State
from bpfree.study.tunable import check_tuning
from bpfree.study.tuning import Tuner

__all__ = ["Agenda"]


@dataclass
class _Post:
    """A place with its cells, and its trials if it is tuned; the same for its own-prediction twin, where the study asks for it."""

    place: Place
    cells: list[Cell]
    tuner: Tuner | None
    twin: Place | None = None
    twin_tuner: Tuner | None = None
    twins: dict[str, Cell] = field(default_factory=dict)

    @property
    def tuners(self) -> list[Tuner]:
        """Of the row and of its twin."""
        return [tuner for tuner in (self.tuner, self.twin_tuner) if tuner is not None]


class Agenda:
    """The cells of a study and how they stand.

    Args:
        plan: the study, resolved.
        state: where outcomes are noted; it is read again at each question.
        rows, columns: only these are run; ``None``: all.
        retry: statuses that are run again.

    Raises:
        UsageError: labels that the study does not have, settings that cannot be tuned, or rows whose twin cannot be given operations.
    """

    def __init__(
        self,
        plan: Plan,
        state: State,
        *,
        rows: Sequence[str] | None = None,
        columns: Sequence[str] | None = None,
        retry: Iterable[str] = (),
    ) -> None:
        study = plan.study
        _check_labels(rows, [row.label for row in study.rows], "rows")
        _check_labels(columns, [column.label for column in study.columns], "columns")
        check_tuning(plan)
        self.plan, self.state, self.retry = plan, state, frozenset(retry)
        self._rows, self._columns = rows, columns
        self._done: dict[str, Outcome] = {}
        self._tried: set[str] = set()
        self._posts = [self._post(place) for place in plan.places]
        _check_twins(self._posts)

    def _post(self, place: Place) -> _Post:
        cells = [cell for cell in self.plan.cells if (cell.row, cell.column) == (place.row.label, place.column.label)]
        twin = twin_of(place) if self.plan.study.equal_budget else None
        return _Post(place, cells, self._tuner(place), twin, None if twin is None else self._tuner(twin))

    def _tuner(self, place: Place) -> Tuner | None:
        tune = self.plan.study.tune
        return Tuner(self.plan, place, tune, self._settled) if tune is not None and place.row.space else None

    def _known(self, cell: str) -> Outcome | None:
        """The outcome of a cell; a finished one is read once."""
        if cell in self._done:
            return self._done[cell]
        outcome = self.state.read(cell)
        if outcome is not None and outcome.status == "finished":
            self._done[cell] = outcome
        return outcome

    def _settled(self, cell: str) -> Outcome | None:
        """The same for tuning, which waits for a trial that is run again."""
        outcome = self._known(cell)
        again = outcome is not None and outcome.status in self.retry and cell not in self._tried
        return None if again else outcome

    def _chosen(self) -> list[_Post]:
        return [
            post
            for post in self._posts
            if (self._rows is None or post.place.row.label in self._rows)
            and (self._columns is None or post.place.column.label in self._columns)
        ]

    # --- questions --------------------------------------------------------------------------------------------------

    def cells(self) -> list[Cell]:
        """All cells that are settled so far: trials first, then seeds as the outer loop. Those of a row that is still being tuned come
        when its trials have ended."""
        trials = [cell for post in self._chosen() for tuner in post.tuners for cell in tuner.cells()]
        final = [self._final(post) for post in self._chosen()]
        twins = [cell for post in self._chosen() for cell in self._twins(post)]
        return trials + [cells[number] for number in range(len(self.plan.seeds)) for cells in final if cells] + twins

    def all_cells(self) -> list[Cell]:
        """The same of all rows and columns."""
        trials = [cell for post in self._posts for tuner in post.tuners for cell in tuner.cells()]
        return trials + [cell for post in self._posts for cell in [*self._final(post), *self._twins(post)]]

    def _final(self, post: _Post) -> list[Cell]:
        if post.tuner is None:
            return post.cells
        return post.tuner.final(self.plan.seeds) if post.tuner.tuned().complete else []

    def _twins(self, post: _Post) -> list[Cell]:
        """The twin of each seed whose cell is finished: with as many operations as that took, and the best of its own trials."""
        if post.twin is None or (post.twin_tuner is not None and not post.twin_tuner.tuned().complete):
            return []
        settings = {} if post.twin_tuner is None else post.twin_tuner.best
        found = []
        for cell in self._final(post):
            operations = self._operations(cell)
            if not operations:
                continue
            key = json.dumps([cell.seed, operations, settings], default=str)
            if key not in post.twins:
                leaves = [Leaf(name, value, "tuning") for name, value in settings.items()]
                post.twins[key] = cell_of(post.twin, cell.seed, self.plan.book, [*leaves, Leaf("budget.operations", operations, "twin")])
            found.append(post.twins[key])
        return found

    def _operations(self, cell: Cell) -> float:
        """What the training of a finished cell took; 0 where there is no result, or nothing was measured."""
        outcome = self._known(cell.id)
        return outcome.result.get("train/operations", 0.0) if outcome is not None and outcome.status == "finished" else 0.0

    def count(self) -> int:
        """Cells in all, those included that tuning will make, and twins but those of cells that ended without a result."""
        tune = self.plan.study.tune
        trials = sum(tune.trials * len(tune.seeds) for post in self._chosen() for _ in post.tuners) if tune else 0
        rows = sum(1 + (post.twin is not None) for post in self._chosen())
        ended = [cell for post in self._chosen() if post.twin is not None for cell in self._final(post) if not self.to_do(cell)]
        return trials + len(self.plan.seeds) * rows - sum(not self._operations(cell) for cell in ended)

    def to_do(self, cell: Cell) -> bool:
        """Whether a cell is to be run."""
        outcome = self._known(cell.id)
        return cell.id not in self._tried and (outcome is None or not outcome.is_final or outcome.status in self.retry)

    def ready(self) -> list[Cell]:
        """The cells that can be run now."""
        found: dict[str, Cell] = {}
        for cell in self.cells():
            if cell.id not in found and self.to_do(cell):
                found[cell.id] = cell
        return list(found.values())

    def take(self, outcome: Outcome) -> None:
        """Note an outcome that comes from a machine which does not share the folder."""
        known = self.state.read(outcome.cell)
        if known is None or (outcome.is_final and known.status != outcome.status):
            self.state.write(outcome)

    def tried(self, cell: str) -> None:
        """This call has done with a cell, whatever became of it."""
        self._tried.add(cell)

    def left(self) -> int:
        """How many cells are still to be run, those included that tuning will make."""
        return self.count() - sum(not self.to_do(cell) for cell in self.cells())

    def finished(self, cells: Iterable[Cell]) -> bool:
        """Whether all of these are finished."""
        return all((known := self._known(cell.id)) is not None and known.status == "finished" for cell in cells)

    def complete(self) -> bool:
        """Whether every cell that was chosen is finished; of trials it is enough that they have ended."""
        final = [self._final(post) for post in self._chosen()]
        twins = [cell for post in self._chosen() for cell in self._twins(post)]
        return all(cells and self.finished(cells) for cells in final) and self.finished(twins)

    def lines(self) -> list[Line]:
        """The lines of the table, of all rows and columns, with what is known of them now."""
        return [self._line(post) for post in self._posts]

    def _line(self, post: _Post) -> Line:
        tuned = None if post.tuner is None else post.tuner.tuned()
        cells = self._final(post) or post.cells
        known = [self.state.seen(cell.id) if tuned is None or tuned.complete else None for cell in cells]
        twins = {cell.seed: self.state.seen(cell.id) for cell in self._twins(post)}
        return Line(post.place.row, post.place.column.label, cells, known, tuned, twins)

    def hidden(self) -> int:
        """Finished cells that lie here and are none of these."""
        return self.state.others({*(cell.id for cell in self.all_cells()), *(cell.id for post in self._posts for cell in post.cells)})


def _check_twins(posts: Sequence[_Post]) -> None:
    """Refuse before anything runs what would otherwise fail only after the first row."""
    found: dict[str, list[str]] = {}
    for post in posts:
        try:
            if post.twin is not None:
                recipe_with(post.twin, [Leaf("budget.operations", 1.0, "twin")])
        except UsageError as error:
            for problem in error.problems:
                found.setdefault(problem, []).append(post.place.row.label)
    if found:
        problems = [f"{problem} (row {', '.join(dict.fromkeys(rows))})" for problem, rows in found.items()]
        what = f"no twin can have as many operations as its row: {'; '.join(problems)}"
        raise UsageError(what, where="equal_budget", fix="leave equal_budget out", problems=problems)


def _check_labels(given: Sequence[str] | None, labels: Sequence[str], kind: str) -> None:
    wrong = [label for label in given or () if label not in labels]
    if wrong:
        guesses = [guess for label in wrong if (guess := nearest(label, labels))]
        fix = f"did you mean {', '.join(map(repr, guesses))}? " if guesses else ""
        what = f"the study has no {kind} {', '.join(map(repr, wrong))}"
        raise UsageError(what, where=f"--{kind}", fix=f"{fix}known: {', '.join(filter(None, labels)) or 'none'}")
