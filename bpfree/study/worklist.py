"""The cells of a study: which exist, how they stand, which can run now. Tuning and twins add cells as results come in."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence

from bpfree.errors import UsageError, did_you_mean
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
        """Read the record of a cell; keep it in memory once it is finished."""
        if cell.key.id in self._done:
            return self._done[cell.key.id]
        record = self.store.read(cell.key.id) or self.older(cell)
        if record is not None and record.status == "finished":
            self._done[cell.key.id] = record
        return record

    def older(self, cell: Cell) -> CellRecord | None:
        """Find a record from other sources or another version that stands for a missing one."""
        return None if self._older is None else self._older.find(cell)

    def _shown(self, cells: Iterable[Cell]) -> list[CellRecord | None]:
        return [self.store.seen(cell.key.id) or self.older(cell) for cell in cells]

    def _settled(self, cell: Cell) -> CellRecord | None:
        """Return the record of a cell for tuning; ``None`` while its trial is to be run again."""
        record = self._known(cell)
        again = record is not None and record.status in self.retry and cell.key.id not in self._tried
        return None if again else record

    def _tuners_of(self, row: TableRow) -> list[Tuner]:
        """Return the tuners of a row and of its twin."""
        return [self._tuners[each] for each in (row, row.twin) if each in self._tuners]

    def _final(self, row: TableRow) -> Sequence[Cell]:
        """Return the cells that are tested, one per seed; none while the row is being tuned."""
        if (tuner := self._tuners.get(row)) is None:
            return row.cells
        return tuner.final(self.plan.seeds) if tuner.tuned().complete else []

    def _twins_of(self, row: TableRow) -> list[Cell]:
        """Make the twin of each finished cell, with as many operations as the cell took and the best settings of the twin's trials."""
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
        """Return the operations of a finished cell's training; 0 without a result or a measurement."""
        record = self._known(cell)
        return record.result.get("train/operations", 0.0) if record is not None and record.status == "finished" else 0.0

    # --- questions --------------------------------------------------------------------------------------------------

    def cells(self) -> list[Cell]:
        """Return all cells that are known so far: trials first, then seeds as the outer loop.

        The cells of a row that is still being tuned are added when its trials have ended.
        """
        return list({cell.key.id: cell for cell in reversed(self._listed())}.values())[::-1]

    def _listed(self) -> list[Cell]:
        """List all cells that are known so far, a shared cell once for each row that has it."""
        trials = [cell for row in self._chosen for tuner in self._tuners_of(row) for cell in tuner.cells()]
        final = [self._final(row) for row in self._chosen]
        twins = [cell for row in self._chosen for cell in self._twins_of(row)]
        return trials + [cells[number] for number in range(len(self.plan.seeds)) for cells in final if cells] + twins

    def all_cells(self) -> list[Cell]:
        """Return the cells of all rows and columns, also those that are not selected."""
        trials = [cell for row in self.plan.rows for tuner in self._tuners_of(row) for cell in tuner.cells()]
        return trials + [cell for row in self.plan.rows for cell in [*self._final(row), *self._twins_of(row)]]

    def count(self) -> int:
        """Count all cells, including those that tuning will add; twins of cells that ended without a result do not count."""
        tune = self.plan.study.tune
        trials = sum(tune.trials * len(tune.seeds) for row in self._chosen for _ in self._tuners_of(row)) if tune else 0
        rows = sum(1 + (row.twin is not None) for row in self._chosen)
        shared = len(self._listed()) - len(self.cells())
        ended = [cell for row in self._chosen if row.twin is not None for cell in self._final(row) if not self.to_do(cell)]
        return trials + len(self.plan.seeds) * rows - shared - sum(not self._operations(cell) for cell in ended)

    def later(self) -> Iterator[tuple[Cell, str]]:
        """Yield cells like those that will be added, with the settings of their rows as written, and the condition that they wait for."""
        for row in self._chosen:
            final = self._final(row)
            yield from ((cell, "tuning") for cell in (row.cells if not final else ()))
            if row.twin is None:
                continue
            known = {cell.key.seed for cell in self._twins_of(row)}
            for cell in final or row.cells:
                comes = not final or self.to_do(cell) or self._operations(cell) > 0
                if comes and cell.key.seed not in known:
                    yield dataclasses.replace(cell, key=dataclasses.replace(cell.key, row=row.twin.written.label)), "its row"

    def waits_for(self) -> str:
        """Name the condition that cells which are not known yet wait for."""
        study = self.plan.study
        return " and ".join([*(["tuning has finished"] if study.tune else []), *(["their rows have ended"] if study.equal_budget else [])])

    def _decisions(self, cell: Cell) -> list[Decision]:
        """Return the decisions on a cell of all tuners that have it as a trial."""
        found = [tuner.limits.get(cell.key.id) for tuner in self._tuners.values()] if cell.key.trial is not None else []
        return [decision for decision in found if decision is not None]

    def until(self, cell: Cell) -> int | None:
        """Return the epoch after which a trial is to pause; ``None``: it trains to its end."""
        rungs = [decision.rung for decision in self._decisions(cell) if decision.state == "train"]
        return None if None in rungs else max((rung for rung in rungs if rung is not None), default=None)

    def _is_pruned(self, cell: Cell) -> bool:
        decisions = self._decisions(cell)
        return bool(decisions) and all(decision.state == "pruned" for decision in decisions)

    def _may_train(self, cell: Cell) -> bool:
        """Tell whether a cell can train without waiting for other cells."""
        decisions = self._decisions(cell)
        return not decisions or any(decision.state == "train" for decision in decisions)

    def to_do(self, cell: Cell) -> bool:
        """Tell whether a cell is to be run, now or when the trials that it waits for have reached its rung."""
        record = self._known(cell)
        if self._is_pruned(cell):
            return False
        return cell.key.id not in self._tried and (record is None or not record.is_final or record.status in self.retry)

    def ready(self) -> list[Cell]:
        """Return the cells that can be run now, and record trials that are pruned."""
        cells = self.cells()
        for cell in cells:
            if self._is_pruned(cell):
                self._note_pruned(cell)
        return [cell for cell in cells if self.to_do(cell) and self._may_train(cell)]

    def _note_pruned(self, cell: Cell) -> None:
        record = self.store.read(cell.key.id)
        if record is not None and record.status == "paused":
            rung = self._decisions(cell)[0].rung
            record.status, record.reason = "pruned", f"not among the best trials so far after epoch {rung}"
            self.store.write(record)

    def to_retry(self) -> bool:
        """Tell whether any cell has ended with a status that is to be run again."""
        return any(record.status in self.retry for cell in self.cells() if (record := self._known(cell)) is not None)

    def take(self, record: CellRecord) -> None:
        """Save a record from a machine that does not share the folder."""
        known = self.store.read(record.key.id)
        if known is None or (record.is_final and known.status != record.status):
            self.store.write(record)

    def tried(self, cell: str) -> None:
        """Mark a cell as attempted by this call, whatever its result."""
        self._tried.add(cell)

    def has_paused(self, cell: str) -> bool:
        """Tell whether a trial has paused at a rung and can resume, by its record and its log on this machine."""
        record = self.store.read(cell)
        return record is not None and record.status == "paused" and bool(record.history)

    def left(self) -> int:
        """Count the cells that are still to be run, including those that tuning will add."""
        return self.count() - sum(not self.to_do(cell) for cell in self.cells())

    def finished(self, cells: Iterable[Cell]) -> bool:
        """Tell whether all given cells are finished."""
        return all((known := self._known(cell)) is not None and known.status == "finished" for cell in cells)

    def complete(self) -> bool:
        """Tell whether every selected cell is finished; trials only need to have ended."""
        final = [self._final(row) for row in self._chosen]
        twins = [cell for row in self._chosen for cell in self._twins_of(row)]
        return all(cells and self.finished(cells) for cells in final) and self.finished(twins)

    def table(self) -> list[TableRow]:
        """Return all rows and columns with their current records."""
        return [self._filled(row) for row in self.plan.rows]

    def _filled(self, row: TableRow) -> TableRow:
        tuned = self._tuners[row].tuned() if row in self._tuners else None
        cells, twins = self._final(row) or row.cells, self._twins_of(row)
        records = self._shown(cells) if tuned is None or tuned.complete else [None] * len(cells)
        twin = row.twin and dataclasses.replace(row.twin, cells=twins, records=self._shown(twins))
        return dataclasses.replace(row, cells=cells, records=records, tuned=tuned, twin=twin)

    def hidden(self) -> int:
        """Count the finished cells in the folder that do not belong to this study as planned."""
        cells = [*self.all_cells(), *self.plan.cells]
        return len(self.store.others({known.key.id for cell in cells if (known := self._known(cell))} | {cell.key.id for cell in cells}))


def _check_twins(rows: Sequence[TableRow]) -> None:
    """Refuse twins without equal operations before anything runs, because they would fail only after the first row."""
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
        known = [label for label in labels if label]
        fix = " ".join(dict.fromkeys(filter(None, (did_you_mean(label, known) for label in wrong))))
        what = f"the study has no {kind} {', '.join(map(repr, wrong))}"
        raise UsageError(what, where=f"--{kind}", fix=fix or (f"choose among its {kind}" if known else f"leave --{kind} out"), known=known)
