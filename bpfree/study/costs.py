"""Estimate what the remaining cells of a study will cost: the table of ``--dry-run``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from bpfree.study.estimate import Estimate, estimate
from bpfree.study.rows import Cell, TableRow
from bpfree.study.store import CellRecord
from bpfree.study.worklist import Worklist

__all__ = ["costs"]

SOURCES = {
    "cells": "finished cells",
    "steps": "a few steps timed on random data; excludes evaluation",
    "budget": "the budget",
}


def costs(worklist: Worklist) -> tuple[list[list[Any]], str]:
    """Make a row of text for each cell, and sentences on the remaining cost; time a few steps where no measurement exists."""
    cells = worklist.cells()
    rows = {(row.written.label, row.column): row for row in worklist.table()}
    found: dict[Any, Estimate] = {}
    table, total, unknown = [], 0.0, Counter[str]()
    for cell in cells:
        record = worklist.store.seen(cell.key.id)
        state = "not run" if record is None else record.status
        shown = ""
        if worklist.to_do(cell):
            cost = found.get(_kind(cell)) or estimate(cell, _done(rows, cell))
            found[_kind(cell)] = cost
            shown = "?" if cost.seconds is None else f"{cost.seconds / 60:.1f}"
            total += cost.seconds or 0.0
            unknown.update([cost.reason] if cost.seconds is None else [])
        table.append([cell.key.row, cell.key.column, cell.key.number, state, shown, cell.key.id])
    return table, "\n".join(_summary(worklist, cells, total, found, unknown))


def _kind(cell: Cell) -> Any:
    """Return a key that cells of equal cost share, so that one estimate serves all of them."""
    return cell.key.row, cell.key.column, cell.key.trial is None, str(cell.recipe.settings.budget), cell.recipe.settings.batch_size


def _done(rows: dict[tuple[str, str], TableRow], cell: Cell) -> list[CellRecord]:
    row = rows.get((cell.key.row, cell.key.column))  # a twin is not a row of the table
    return row.finished if cell.key.trial is None and row is not None else []


def _summary(worklist: Worklist, cells: Sequence[Cell], total: float, found: dict[Any, Estimate], unknown: Counter[str]) -> Iterable[str]:
    left = sum(map(worklist.to_do, cells))
    later = worklist.count() - len(cells)
    yield f"{left + later} of {worklist.count()} cells would be run" + (f", {later} of them when {worklist.waits_for()}" if later else "")
    used = dict.fromkeys(SOURCES[each.source] for each in found.values() if each.source)
    if used:
        yield f"about {_duration(total)} of training on one worker, estimated from {' and '.join(used)}" + (
            f"; excludes the cells that run when {worklist.waits_for()}" if later else ""
        )
    tune = worklist.plan.study.tune
    if tune is not None and tune.pruning:
        yield f"pruned trials will cost less: {tune.pruning}"
    for reason, count in unknown.items():
        yield f"no estimate for {count} cells: {reason}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
