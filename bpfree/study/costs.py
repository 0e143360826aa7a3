"""Estimate what the remaining cells of a study will cost: the table of ``--dry-run``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from bpfree.document.terminal import duration
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


def costs(worklist: Worklist) -> tuple[list[dict[str, Any]], str]:
    """Describe each cell by plain values, and sum up the remaining cost; time a few steps where no measurement exists.

    The cells that tuning or twins will add are among them, with the cost of their rows and no identifier yet.
    """
    rows = {(row.written.label, row.column): row for row in worklist.table()}
    found: dict[Any, Estimate] = {}

    def cost(cell: Cell) -> Estimate:
        kind = _kind(cell)
        found[kind] = found.get(kind) or estimate(cell, _done(rows, cell))
        return found[kind]

    table = []
    for cell in worklist.cells():
        record = worklist.store.seen(cell.key.id)
        state = "not run" if record is None else record.status
        table.append(_described(cell, state, cost(cell) if worklist.to_do(cell) else None))
    for cell, waits_for in worklist.later():
        table.append({**_described(cell, f"after {waits_for}", cost(cell)), "cell": ""})
    return table, "\n".join(_summary(worklist, table, found))


def _described(cell: Cell, state: str, cost: Estimate | None) -> dict[str, Any]:
    key = cell.key
    about = {"row": key.row, "column": key.column, "seed": key.seed, "trial": key.trial, "state": state, "to_run": cost is not None}
    return {**about, "seconds": cost and cost.seconds, "reason": cost.reason if cost else "", "cell": key.id}


def _kind(cell: Cell) -> Any:
    """Return a key that cells of equal cost share, so that one estimate serves all of them."""
    return cell.key.row, cell.key.column, cell.key.trial is None, str(cell.recipe.settings.budget), cell.recipe.settings.batch_size


def _done(rows: dict[tuple[str, str], TableRow], cell: Cell) -> list[CellRecord]:
    row = rows.get((cell.key.row, cell.key.column))  # a twin is not a row of the table
    return row.finished if cell.key.trial is None and row is not None else []


def _summary(worklist: Worklist, table: Sequence[dict[str, Any]], found: dict[Any, Estimate]) -> Iterable[str]:
    left = [line for line in table if line["to_run"]]
    trials = sum(line["trial"] is not None for line in left)
    yield f"{len(left)} of {len(table)} cells to run" + (
        f": {trials} tuning trials, then {len(left) - trials} final runs" if trials else ""
    )
    used = dict.fromkeys(SOURCES[each.source] for each in found.values() if each.source)
    if used:
        total = sum(line["seconds"] or 0.0 for line in left)
        yield f"about {duration(total)} of training on one worker, estimated from {' and '.join(used)}"
    tune = worklist.plan.study.tune
    if tune is not None and tune.pruning:
        yield f"pruned trials will cost less: {tune.pruning}"
    for reason, count in Counter(line["reason"] for line in left if line["seconds"] is None).items():
        yield f"no estimate for {count} cells: {reason}"
