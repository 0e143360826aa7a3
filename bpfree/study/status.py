"""How the cells of a study stand, and what those that are left will cost: the tables of ``status`` and ``--dry-run``."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from bpfree import runner
from bpfree.study.estimate import Estimate, estimate
from bpfree.study.rows import Cell, TableRow
from bpfree.study.store import CellRecord
from bpfree.study.worklist import Worklist

__all__ = ["costs", "epoch_of", "status_table"]

SOURCES = {
    "cells": "cells that are done",
    "steps": "a few steps timed here on random numbers, without evaluation",
    "budget": "the budget",
}


def _number(cell: Cell) -> str:
    return str(cell.key.seed) if cell.key.trial is None else f"trial {cell.key.trial}"


# --- status -----------------------------------------------------------------------------------------------------------


def status_table(worklist: Worklist) -> tuple[list[list[Any]], str]:
    """A row of text for each cell, and a sentence."""
    known = [(cell, worklist.store.seen(cell.key.id)) for cell in worklist.cells()]
    counts = Counter("not run" if record is None else record.status for _, record in known)
    later = worklist.count() - len(known)
    parts = [f"{count} {each}" for each, count in counts.most_common()]
    parts += [f"{later} follow when {_when(worklist)}" if later else ""]
    return [_status_of(worklist, cell, record) for cell, record in known], f"{worklist.count()} cells: {', '.join(filter(None, parts))}"


def _when(worklist: Worklist) -> str:
    """What cells wait for that are not known yet."""
    study = worklist.plan.study
    return " and ".join([*(["tuning has chosen"] if study.tune else []), *(["their rows have ended"] if study.equal_budget else [])])


def _status_of(worklist: Worklist, cell: Cell, record: CellRecord | None) -> list[Any]:
    if record is None:
        return [cell.key.row, cell.key.column, _number(cell), "not run", "", "", "", cell.key.id]
    return [
        cell.key.row,
        cell.key.column,
        _number(cell),
        f"{record.status}: {record.reason}" if record.reason else record.status,
        epoch_of(worklist, record),
        f"{_elapsed(record) / 60:.1f}",
        _score(record),
        cell.key.id,
    ]


def _elapsed(record: CellRecord) -> float:
    """Seconds so far: a running cell's record is as old as its last change."""
    if record.status != "running" or not record.updated:
        return record.elapsed
    since = datetime.datetime.now().astimezone() - datetime.datetime.fromisoformat(record.updated)
    return record.elapsed + max(0.0, since.total_seconds())


def epoch_of(worklist: Worklist, record: CellRecord | None) -> str:
    """How far a cell is; empty if that is not known."""
    if record is None or not record.run:
        return ""
    if record.is_final:
        return f"{record.history[-1].get('epoch', 0):g}" if record.history else ""
    ended = runner.ended_as(worklist.plan.output / record.run)
    total = ended.get("total_epochs")
    return f"{ended.get('epoch', 0)}{f' of {total}' if total else ''}"


def _score(record: CellRecord) -> str:
    last = record.history[-1] if record.history else {}
    if "val/accuracy" in last:
        return f"{100 * last['val/accuracy']:.2f} %"
    return f"{last['val/loss']:.4g}" if "val/loss" in last else ""


# --- the cost ---------------------------------------------------------------------------------------------------------


def costs(worklist: Worklist) -> tuple[list[list[Any]], str]:
    """A row of text for each cell, and what is left in sentences. A few steps are timed where nothing is known."""
    cells = worklist.cells()
    lines = {(line.written.label, line.column): line for line in worklist.table()}
    found: dict[Any, Estimate] = {}
    table, total, unknown = [], 0.0, Counter[str]()
    for cell in cells:
        record = worklist.store.seen(cell.key.id)
        state = "not run" if record is None else record.status
        shown = ""
        if worklist.to_do(cell):
            cost = found.get(_kind(cell)) or estimate(cell, _done(lines, cell))
            found[_kind(cell)] = cost
            shown = "?" if cost.seconds is None else f"{cost.seconds / 60:.1f}"
            total += cost.seconds or 0.0
            unknown.update([cost.reason] if cost.seconds is None else [])
        table.append([cell.key.row, cell.key.column, _number(cell), state, shown, cell.key.id])
    return table, "\n".join(_summary(worklist, cells, total, found, unknown))


def _kind(cell: Cell) -> Any:
    """Cells that cost the same: one estimate is enough."""
    return cell.key.row, cell.key.column, cell.key.trial is None, str(cell.recipe.settings.budget), cell.recipe.settings.batch_size


def _done(lines: dict[tuple[str, str], TableRow], cell: Cell) -> list[CellRecord]:
    line = lines.get((cell.key.row, cell.key.column))  # a twin is no line of the table
    return line.finished if cell.key.trial is None and line is not None else []


def _summary(worklist: Worklist, cells: Sequence[Cell], total: float, found: dict[Any, Estimate], unknown: Counter[str]) -> Iterable[str]:
    left = sum(map(worklist.to_do, cells))
    later = worklist.count() - len(cells)
    yield f"{left + later} of {worklist.count()} cells would be run" + (f", {later} of them when {_when(worklist)}" if later else "")
    used = dict.fromkeys(SOURCES[each.source] for each in found.values() if each.source)
    if used:
        yield f"about {_duration(total)} of training on one worker, by {' and '.join(used)}" + (
            f", without those that wait until {_when(worklist)}" if later else ""
        )
    for reason, count in unknown.items():
        yield f"not known for {count} cells: {reason}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
