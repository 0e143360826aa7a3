"""How the cells of a study stand, and what those that are left will cost: the tables of ``status`` and ``--dry-run``."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from bpfree import runner
from bpfree.study.agenda import Agenda
from bpfree.study.cells import Cell
from bpfree.study.estimate import Estimate, estimate
from bpfree.study.line import Line
from bpfree.study.state import Outcome

__all__ = ["costs", "epoch_of", "standing"]

SOURCES = {
    "cells": "cells that are done",
    "steps": "a few steps timed here on random numbers, without evaluation",
    "budget": "the budget",
}


def _number(cell: Cell) -> str:
    return str(cell.seed) if cell.trial is None else f"trial {cell.trial}"


# --- status -----------------------------------------------------------------------------------------------------------


def standing(agenda: Agenda) -> tuple[list[list[Any]], str]:
    """A row of text for each cell, and a sentence."""
    known = [(cell, agenda.state.seen(cell.id)) for cell in agenda.cells()]
    counts = Counter("not run" if outcome is None else outcome.status for _, outcome in known)
    later = agenda.count() - len(known)
    parts = [f"{count} {status}" for status, count in counts.most_common()]
    parts += [f"{later} follow when {_when(agenda)}" if later else ""]
    return [_standing(agenda, cell, outcome) for cell, outcome in known], f"{agenda.count()} cells: {', '.join(filter(None, parts))}"


def _when(agenda: Agenda) -> str:
    """What cells wait for that are not known yet."""
    study = agenda.plan.study
    return " and ".join([*(["tuning has chosen"] if study.tune else []), *(["their rows have ended"] if study.equal_budget else [])])


def _standing(agenda: Agenda, cell: Cell, outcome: Outcome | None) -> list[Any]:
    if outcome is None:
        return [cell.row, cell.column, _number(cell), "not run", "", "", "", cell.id]
    return [
        cell.row,
        cell.column,
        _number(cell),
        f"{outcome.status}: {outcome.reason}" if outcome.reason else outcome.status,
        epoch_of(agenda, outcome),
        f"{_elapsed(outcome) / 60:.1f}",
        _score(outcome),
        cell.id,
    ]


def _elapsed(outcome: Outcome) -> float:
    """Seconds so far: a running cell's record is as old as its last change."""
    if outcome.status != "running" or not outcome.updated:
        return outcome.elapsed
    since = datetime.datetime.now().astimezone() - datetime.datetime.fromisoformat(outcome.updated)
    return outcome.elapsed + max(0.0, since.total_seconds())


def epoch_of(agenda: Agenda, outcome: Outcome | None) -> str:
    """How far a cell is; empty if that is not known."""
    if outcome is None or not outcome.run:
        return ""
    if outcome.is_final:
        return f"{outcome.history[-1].get('epoch', 0):g}" if outcome.history else ""
    record = runner.ended_as(agenda.plan.output / outcome.run)
    total = record.get("total_epochs")
    return f"{record.get('epoch', 0)}{f' of {total}' if total else ''}"


def _score(outcome: Outcome) -> str:
    last = outcome.history[-1] if outcome.history else {}
    if "val/accuracy" in last:
        return f"{100 * last['val/accuracy']:.2f} %"
    return f"{last['val/loss']:.4g}" if "val/loss" in last else ""


# --- the cost ---------------------------------------------------------------------------------------------------------


def costs(agenda: Agenda, cells: Sequence[Cell]) -> tuple[list[list[Any]], str]:
    """A row of text for each cell, and what is left in sentences. A few steps are timed where nothing is known."""
    lines = {(line.row.label, line.column): line for line in agenda.lines()}
    found: dict[Any, Estimate] = {}
    table, total, unknown = [], 0.0, Counter[str]()
    for cell in cells:
        outcome = agenda.state.seen(cell.id)
        state = "not run" if outcome is None else outcome.status
        shown = ""
        if agenda.to_do(cell):
            cost = found.get(_kind(cell)) or estimate(cell, _done(lines, cell))
            found[_kind(cell)] = cost
            shown = "?" if cost.seconds is None else f"{cost.seconds / 60:.1f}"
            total += cost.seconds or 0.0
            unknown.update([cost.reason] if cost.seconds is None else [])
        table.append([cell.row, cell.column, _number(cell), state, shown, cell.id])
    return table, "\n".join(_summary(agenda, cells, total, found, unknown))


def _kind(cell: Cell) -> Any:
    """Cells that cost the same: one estimate is enough."""
    return cell.row, cell.column, cell.trial is None, str(cell.recipe.settings.budget), cell.recipe.settings.batch_size


def _done(lines: dict[tuple[str, str], Line], cell: Cell) -> list[Outcome]:
    line = lines.get((cell.row, cell.column))  # a twin is no line of the table
    return line.finished if cell.trial is None and line is not None else []


def _summary(agenda: Agenda, cells: Sequence[Cell], total: float, found: dict[Any, Estimate], unknown: Counter[str]) -> Iterable[str]:
    left = sum(map(agenda.to_do, cells))
    later = agenda.count() - len(cells)
    yield f"{left + later} of {agenda.count()} cells would be run" + (f", {later} of them when {_when(agenda)}" if later else "")
    used = dict.fromkeys(SOURCES[each.source] for each in found.values() if each.source)
    if used:
        yield f"about {_duration(total)} of training on one worker, by {' and '.join(used)}" + (
            f", without those that wait until {_when(agenda)}" if later else ""
        )
    for reason, count in unknown.items():
        yield f"not known for {count} cells: {reason}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
