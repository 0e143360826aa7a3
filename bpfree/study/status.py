"""The table of ``bpfree study status``: the state of each cell of a study."""

from __future__ import annotations

import datetime
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpfree.kept import kept
from bpfree.redaction import redacted
from bpfree.study.store import CellKey, CellRecord, CellStore
from bpfree.system import processors
from bpfree.yaml_values import text_of

if TYPE_CHECKING:
    from bpfree.study.rows import Cell, TableRow
    from bpfree.study.worklist import Worklist

__all__ = ["epoch_of", "status_table"]

TERMINAL = ("COLUMNS", "LINES", "OLDPWD", "PWD", "SHLVL", "_")
"""Environment variables that differ between terminals and do not affect a plan; settings may refer to any other one."""


def status_table(planned: Callable[[], Worklist], folder: Path, words: Any) -> tuple[list[dict[str, Any]], str]:
    """Describe each cell by plain values, and sum up.

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
    parts += [f"{later} follow when {plan['waits_for']}"] if later else []
    here = store.others({key.id for key, _ in known} | {record.key.id for _, record in known if record is not None})
    summary = [f"{len(known) + later} cells: {', '.join(parts)}", *_variants(here, plan["settings"])]
    return [_status_of(key, record) for key, record in known], "\n".join(summary)


def _variants(others: list[CellRecord], planned: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Name the settings of finished cells that are not in the plan, as the words to repeat."""
    found = Counter(_differing(record.seen().config, planned.get(record.key.row, {})) for record in others if record.key.trial is None)
    for words, count in found.most_common():
        what = f"{count} finished cell{'s' * (count > 1)} of a variant"
        yield (
            f"{what}: repeat {' '.join(words)} to see {'them' if count > 1 else 'it'}"
            if words
            else f"{what} with other seeds, rows or sources"
        )


def _differing(config: Mapping[str, Any], planned: Mapping[str, Any]) -> tuple[str, ...]:
    """List as words the settings in which a run differs from its row; what the plan leaves open differs only in a budget."""
    open_values: tuple[Any, ...] = (None, "auto", [], {})
    differing = {
        key: value
        for key, value in config.items()
        if key in planned and planned[key] != value and (planned[key] not in open_values or key.startswith("budget."))
    }
    return tuple(f"{key}={text_of(value)}" for key, value in differing.items() if value is not None)


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
        "settings": {row.written.label: _scientific(row) for row in worklist.plan.rows},
    }
    return found, {study.path, *files} if fixed and files is not None and study.path is not None else None


def _scientific(row: TableRow) -> dict[str, Any]:
    """Select the settings of a row's runs that its results depend on, except the seed."""
    from bpfree.study.cells import is_scientific

    flat: dict[str, Any] = redacted(row.recipe.flat())
    return {key: value for key, value in flat.items() if is_scientific(key) and key not in ("seed", "stream")}


def _older(worklist: Worklist, cell: Cell) -> str:
    known = worklist.older(cell)
    return "" if known is None else known.key.id


def _status_of(key: CellKey, record: CellRecord | None) -> dict[str, Any]:
    about = {"row": key.row, "column": key.column, "seed": key.seed, "trial": key.trial, "cell": key.id}
    if record is None:
        return {**about, "state": "not run", "reason": "", "epoch": "", "seconds": None, "validation": None, "shown": "", "run": ""}
    scores = record.seen().scores("val")
    return {
        **about,
        "state": record.status,
        "reason": record.reason,
        "epoch": epoch_of(record),
        "seconds": _elapsed(record),
        "validation": scores[0][1] if scores else None,
        "shown": scores[0][0].text(scores[0][1]) if scores else "",
        "run": record.run,
    }


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
