"""The table of ``bpfree study status``: the state of each cell of a study."""

from __future__ import annotations

import datetime
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpfree.kept import kept
from bpfree.study.store import CellKey, CellRecord, CellStore
from bpfree.system import processors

if TYPE_CHECKING:
    from bpfree.study.rows import Cell
    from bpfree.study.worklist import Worklist

__all__ = ["epoch_of", "status_table"]

TERMINAL = ("COLUMNS", "LINES", "OLDPWD", "PWD", "SHLVL", "_")
"""Environment variables that differ between terminals and do not affect a plan; settings may refer to any other one."""


def status_table(planned: Callable[[], Worklist], folder: Path, words: Any) -> tuple[list[list[Any]], str]:
    """Make a row of text for each cell, and a summary.

    The list of cells is cached in the folder of studies until anything changes that their identities depend on. With tuning or
    twins of equal operations it also depends on results, and is planned each time.

    Args:
        planned: function that plans the study.
        folder: of all studies.
        words: of the command line, on which the plan depends.
    """
    gpus = sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))
    found = sorted(path.name for path in folder.glob("*/cells/*.json"))  # a cell of other sources may stand for one of the plan
    under = [found, sorted(set(os.environ.items()) - {(key, os.environ.get(key)) for key in TERMINAL}), gpus, processors()]
    plan: dict[str, Any] = kept(".cells", lambda: _plain(planned()), words=[os.getcwd(), words], under=under, folder=folder)
    store, later = CellStore(Path(plan["output"]), plan["study"]), plan["later"]
    known = [(CellKey(*each), store.seen(each[0]) or (store.read(older) if older else None)) for *each, older in plan["cells"]]
    counts = Counter("not run" if record is None else record.status for _, record in known)
    parts = [f"{count} {each}" for each, count in counts.most_common()]
    others = sum(record is not None and record.key.id != key.id for key, record in known)
    parts += [f"{others} of them from other sources, which `bpfree study run` would compute again"] if others else []
    here = store.others({key.id for key, _ in known} | {record.key.id for _, record in known if record is not None})
    parts += [f"{here} more finished cells have other settings: repeat the settings of their command to see them"] if here else []
    parts += [f"{later} follow when {plan['waits_for']}"] if later else []
    return [_status_of(key, record) for key, record in known], f"{len(known) + later} cells: {', '.join(parts)}"


def _plain(worklist: Worklist) -> tuple[dict[str, Any], set[Path] | None]:
    """Convert a study's cells to plain values, with the files that they depend on (``None``: they must be planned each time)."""
    study, files, keys = (
        worklist.plan.study,
        worklist.plan.fingerprints.files,
        [(cell.key, _older(worklist, cell)) for cell in worklist.cells()],
    )
    fixed = worklist.plan.rows[0].recipe.registry.keepable and not study.tune and not study.equal_budget
    found = {
        "output": str(worklist.store.output),
        "study": worklist.store.study,
        "cells": [[key.id, key.row, key.column, key.seed, key.trial, older] for key, older in keys],
        "later": worklist.count() - len(keys),
        "waits_for": worklist.waits_for(),
    }
    return found, {study.path, *files} if fixed and files is not None and study.path is not None else None


def _older(worklist: Worklist, cell: Cell) -> str:
    known = worklist.older(cell)
    return "" if known is None else known.key.id


def _status_of(key: CellKey, record: CellRecord | None) -> list[Any]:
    if record is None:
        return [key.row, key.column, key.number, "not run", "", "", "", key.id]
    return [
        key.row,
        key.column,
        key.number,
        f"{record.status}: {record.reason}" if record.reason else record.status,
        epoch_of(record),
        f"{_elapsed(record) / 60:.1f}",
        _score(record),
        key.id,
    ]


def _elapsed(record: CellRecord) -> float:
    """Return a cell's seconds so far, with the time since the last change of a running cell's record."""
    if record.status != "running" or not record.updated:
        return record.elapsed
    since = datetime.datetime.now().astimezone() - datetime.datetime.fromisoformat(record.updated)
    return record.elapsed + max(0.0, since.total_seconds())


def epoch_of(record: CellRecord | None) -> str:
    """Format a cell's current epoch, such as ``3 of 10``; empty if unknown."""
    if record is None or not record.run:
        return ""
    if record.is_final:
        return f"{record.history[-1].get('epoch', 0):g}" if record.history else ""
    run = record.seen()
    return f"{run.epoch}{f' of {run.total_epochs}' if run.total_epochs else ''}"


def _score(record: CellRecord) -> str:
    return next((metric.text(value) for metric, value in record.seen().scores("val")), "")
