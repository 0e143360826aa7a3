"""The cells of a study: which exist, how they stand, which can run now. Tuning and twins add cells as results come in."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence

from bpfree.errors import UsageError, nearest
from bpfree.leaves import Leaf
from bpfree.study.cells import Plan, cell_of, recipe_with
from bpfree.study.older import OlderCells
from bpfree.study.pruning import Decision
from bpfree.study.rows import Cell, TableRow
from bpfree.study.store import CellRecord, CellStore
from bpfree.study.tuning import Tuner, check_tuning

__all__ = ["Worklist"]


class Worklist:
    """The cells of a study and how they stand.

    Args:
        plan: the study, resolved.
        rows, columns: only these are run; ``None``: all.
        retry: statuses that are run again.
        older: whether finished cells of other sources or versions stand for those that are missing: for reports alone.

    Attributes:
        store: where cells are noted; it is read again at each question.

    Raises:
        UsageError: labels that the study does not have, settings that cannot be tuned, or rows whose twin cannot be given operations.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        rows: Sequence[str] | None = None,
        columns: Sequence[str] | None = None,
        retry: Iterable[str] = (),
        older: bool = False,
    ) -> None:
        study = plan.study
        _check_labels(rows, [row.label for row in study.rows], "rows")
        _check_labels(columns, [column.label for column in study.columns], "columns")
        check_tuning(plan)
        _check_twins(plan.rows)
        self.plan, self.store, self.retry = plan, CellStore.of(plan.output, study.name, study.path), frozenset(retry)
        self._chosen = [
            row for row in plan.rows if (rows is None or row.written.label in rows) and (columns is None or row.column in columns)
        ]
        self._tuners = {
            each: Tuner(each, study.tune, plan.fingerprints, self._settled)
            for row in plan.rows
            for each in (row, row.twin)
            if each is not None and study.tune is not None and each.written.space
        }
        self._twins: dict[tuple[TableRow, str], Cell] = {}
        self._done: dict[str, CellRecord] = {}
        self._older = OlderCells(self.store) if older else None
        self._tried: set[str] = set()

    def _known(self, cell: Cell) -> CellRecord | None:
        """The record of a cell; a finished one is read once."""
        if cell.key.id in self._done:
            return self._done[cell.key.id]
        record = self.store.read(cell.key.id) or self.older(cell)
        if record is not None and record.status == "finished":
            self._done[cell.key.id] = record
        return record

    def older(self, cell: Cell) -> CellRecord | None:
        """Find the record that stands for a missing one, of other sources or another version."""
        return None if self._older is None else self._older.find(cell)

    def _shown(self, cells: Iterable[Cell]) -> list[CellRecord | None]:
        return [self.store.seen(cell.key.id) or self.older(cell) for cell in cells]

    def _settled(self, cell: Cell) -> CellRecord | None:
        """The record of a cell for tuning, which waits for a trial that is run again."""
        record = self._known(cell)
        again = record is not None and record.status in self.retry and cell.key.id not in self._tried
        return None if again else record

    def _tuners_of(self, row: TableRow) -> list[Tuner]:
        """The tuners of a row and of its twin."""
        return [self._tuners[each] for each in (row, row.twin) if each in self._tuners]

    def _final(self, row: TableRow) -> Sequence[Cell]:
        """The cells that are tested, one per seed; none as long as the row is tuned."""
        if (tuner := self._tuners.get(row)) is None:
            return row.cells
        return tuner.final(self.plan.seeds) if tuner.tuned().complete else []

    def _twins_of(self, row: TableRow) -> list[Cell]:
        """The twin of each seed whose cell is finished: with as many operations as that took, and the best of its own trials."""
        tuner = None if row.twin is None else self._tuners.get(row.twin)
        if row.twin is None or (tuner is not None and not tuner.tuned().complete):
            return []
        settings = {} if tuner is None else tuner.best
        found = []
        for cell in self._final(row):
            operations = self._operations(cell)
            if not operations:
                continue
            key = row.twin, json.dumps([cell.key.seed, operations, settings], default=str)
            if key not in self._twins:
                leaves = [Leaf(name, value, "tuning") for name, value in settings.items()]
                leaves.append(Leaf("budget.operations", operations, "twin"))
                self._twins[key] = cell_of(row.twin, cell.key.seed, self.plan.fingerprints, leaves)
            found.append(self._twins[key])
        return found

    def _operations(self, cell: Cell) -> float:
        """What the training of a finished cell took; 0 where there is no result, or nothing was measured."""
        record = self._known(cell)
        return record.result.get("train/operations", 0.0) if record is not None and record.status == "finished" else 0.0

    # --- questions --------------------------------------------------------------------------------------------------

    def cells(self) -> list[Cell]:
        """All cells that are known so far: trials first, then seeds as the outer loop. Those of a row that is still being tuned come
        when its trials have ended."""
        return list({cell.key.id: cell for cell in reversed(self._listed())}.values())[::-1]

    def _listed(self) -> list[Cell]:
        """The same, a cell as often as rows share it."""
        trials = [cell for row in self._chosen for tuner in self._tuners_of(row) for cell in tuner.cells()]
        final = [self._final(row) for row in self._chosen]
        twins = [cell for row in self._chosen for cell in self._twins_of(row)]
        return trials + [cells[number] for number in range(len(self.plan.seeds)) for cells in final if cells] + twins

    def all_cells(self) -> list[Cell]:
        """The cells of all rows and columns, whatever was chosen."""
        trials = [cell for row in self.plan.rows for tuner in self._tuners_of(row) for cell in tuner.cells()]
        return trials + [cell for row in self.plan.rows for cell in [*self._final(row), *self._twins_of(row)]]

    def count(self) -> int:
        """Cells in all, those included that tuning will make, and twins but those of cells that ended without a result."""
        tune = self.plan.study.tune
        trials = sum(tune.trials * len(tune.seeds) for row in self._chosen for _ in self._tuners_of(row)) if tune else 0
        rows = sum(1 + (row.twin is not None) for row in self._chosen)
        shared = len(self._listed()) - len(self.cells())
        ended = [cell for row in self._chosen if row.twin is not None for cell in self._final(row) if not self.to_do(cell)]
        return trials + len(self.plan.seeds) * rows - shared - sum(not self._operations(cell) for cell in ended)

    def waits_for(self) -> str:
        """What cells wait for that are not known yet."""
        study = self.plan.study
        return " and ".join([*(["tuning has chosen"] if study.tune else []), *(["their rows have ended"] if study.equal_budget else [])])

    def _decisions(self, cell: Cell) -> list[Decision]:
        """What the tuners that have a cell among their trials have decided of it."""
        found = [tuner.limits.get(cell.key.id) for tuner in self._tuners.values()] if cell.key.trial is not None else []
        return [decision for decision in found if decision is not None]

    def until(self, cell: Cell) -> int | None:
        """After how many epochs a trial is to pause; ``None``: it trains to its end."""
        rungs = [decision.rung for decision in self._decisions(cell) if decision.state == "train"]
        return None if None in rungs else max((rung for rung in rungs if rung is not None), default=None)

    def _is_pruned(self, cell: Cell) -> bool:
        decisions = self._decisions(cell)
        return bool(decisions) and all(decision.state == "pruned" for decision in decisions)

    def _may_train(self, cell: Cell) -> bool:
        """Whether a cell waits for no other."""
        decisions = self._decisions(cell)
        return not decisions or any(decision.state == "train" for decision in decisions)

    def to_do(self, cell: Cell) -> bool:
        """Whether a cell is to be run, now or when those that it waits for have come as far."""
        record = self._known(cell)
        if self._is_pruned(cell):
            return False
        return cell.key.id not in self._tried and (record is None or not record.is_final or record.status in self.retry)

    def ready(self) -> list[Cell]:
        """The cells that can be run now; trials that are pruned are noted as such."""
        cells = self.cells()
        for cell in cells:
            if self._is_pruned(cell):
                self._note_pruned(cell)
        return [cell for cell in cells if self.to_do(cell) and self._may_train(cell)]

    def _note_pruned(self, cell: Cell) -> None:
        record = self.store.read(cell.key.id)
        if record is not None and record.status == "paused":
            rung = self._decisions(cell)[0].rung
            record.status, record.reason = "pruned", f"after epoch {rung} not among the best of the trials so far"
            self.store.write(record)

    def to_retry(self) -> bool:
        """Whether any cell has ended so that it is to be run again."""
        return any(record.status in self.retry for cell in self.cells() if (record := self._known(cell)) is not None)

    def take(self, record: CellRecord) -> None:
        """Note a record that comes from a machine which does not share the folder."""
        known = self.store.read(record.key.id)
        if known is None or (record.is_final and known.status != record.status):
            self.store.write(record)

    def tried(self, cell: str) -> None:
        """Mark a cell as attempted by this call, whatever became of it."""
        self._tried.add(cell)

    def has_paused(self, cell: str) -> bool:
        """Whether a trial has paused at a rung, as its record and its log here say, so that it may go on."""
        record = self.store.read(cell)
        return record is not None and record.status == "paused" and bool(record.history)

    def left(self) -> int:
        """How many cells are still to be run, those included that tuning will make."""
        return self.count() - sum(not self.to_do(cell) for cell in self.cells())

    def finished(self, cells: Iterable[Cell]) -> bool:
        """Whether all of these are finished."""
        return all((known := self._known(cell)) is not None and known.status == "finished" for cell in cells)

    def complete(self) -> bool:
        """Whether every cell that was chosen is finished; of trials it is enough that they have ended."""
        final = [self._final(row) for row in self._chosen]
        twins = [cell for row in self._chosen for cell in self._twins_of(row)]
        return all(cells and self.finished(cells) for cells in final) and self.finished(twins)

    def table(self) -> list[TableRow]:
        """All rows and columns with what is known of them now."""
        return [self._filled(row) for row in self.plan.rows]

    def _filled(self, row: TableRow) -> TableRow:
        tuned = self._tuners[row].tuned() if row in self._tuners else None
        cells, twins = self._final(row) or row.cells, self._twins_of(row)
        records = self._shown(cells) if tuned is None or tuned.complete else [None] * len(cells)
        twin = row.twin and dataclasses.replace(row.twin, cells=twins, records=self._shown(twins))
        return dataclasses.replace(row, cells=cells, records=records, tuned=tuned, twin=twin)

    def hidden(self) -> int:
        """Finished cells that lie here and are none of these."""
        cells = [*self.all_cells(), *self.plan.cells]
        return self.store.others({known.key.id for cell in cells if (known := self._known(cell))} | {cell.key.id for cell in cells})


def _check_twins(rows: Sequence[TableRow]) -> None:
    """Refuse before anything runs what would otherwise fail only after the first row."""
    found: dict[str, list[str]] = {}
    for row in rows:
        try:
            if row.twin is not None:
                recipe_with(row.twin, [Leaf("budget.operations", 1.0, "twin")])
        except UsageError as error:
            for problem in error.problems:
                found.setdefault(problem, []).append(row.written.label)
    if found:
        problems = [f"{problem} (row {', '.join(dict.fromkeys(labels))})" for problem, labels in found.items()]
        what = f"no twin can have as many operations as its row: {'; '.join(problems)}"
        raise UsageError(what, where="equal_budget", fix="leave equal_budget out", problems=problems)


def _check_labels(given: Sequence[str] | None, labels: Sequence[str], kind: str) -> None:
    wrong = [label for label in given or () if label not in labels]
    if wrong:
        guesses = [guess for label in wrong if (guess := nearest(label, labels))]
        fix = f"did you mean {', '.join(map(repr, guesses))}? " if guesses else ""
        what = f"the study has no {kind} {', '.join(map(repr, wrong))}"
        raise UsageError(what, where=f"--{kind}", fix=f"{fix}known: {', '.join(filter(None, labels)) or 'none'}")
