"""How the cells of a study stand."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bpfree.study.store import CellKey, CellRecord, CellStore
from bpfree.tracking.journal import ended_as

__all__ = ["epoch_of", "status_table"]


def status_table(store: CellStore, keys: Sequence[CellKey], later: int = 0, waits_for: str = "") -> tuple[list[list[Any]], str]:
    """A row of text for each cell, and a sentence.

    Args:
        store: of what is known.
        keys: of the cells that are known so far.
        later: how many are not.
        waits_for: what those wait for.
    """
    known = [(key, store.seen(key.id)) for key in keys]
    counts = Counter("not run" if record is None else record.status for _, record in known)
    parts = [f"{count} {each}" for each, count in counts.most_common()]
    parts += [f"{later} follow when {waits_for}"] if later else []
    return [_status_of(store.output, key, record) for key, record in known], f"{len(known) + later} cells: {', '.join(parts)}"


def _status_of(output: Path, key: CellKey, record: CellRecord | None) -> list[Any]:
    if record is None:
        return [key.row, key.column, key.number, "not run", "", "", "", key.id]
    return [
        key.row,
        key.column,
        key.number,
        f"{record.status}: {record.reason}" if record.reason else record.status,
        epoch_of(output, record),
        f"{_elapsed(record) / 60:.1f}",
        _score(record),
        key.id,
    ]


def _elapsed(record: CellRecord) -> float:
    """Seconds so far: a running cell's record is as old as its last change."""
    if record.status != "running" or not record.updated:
        return record.elapsed
    since = datetime.datetime.now().astimezone() - datetime.datetime.fromisoformat(record.updated)
    return record.elapsed + max(0.0, since.total_seconds())


def epoch_of(output: Path, record: CellRecord | None) -> str:
    """How far a cell is; empty if that is not known."""
    if record is None or not record.run:
        return ""
    if record.is_final:
        return f"{record.history[-1].get('epoch', 0):g}" if record.history else ""
    ended = ended_as(output / record.run)
    total = ended.get("total_epochs")
    return f"{ended.get('epoch', 0)}{f' of {total}' if total else ''}"


def _score(record: CellRecord) -> str:
    last = record.history[-1] if record.history else {}
    if "val/accuracy" in last:
        return f"{100 * last['val/accuracy']:.2f} %"
    return f"{last['val/loss']:.4g}" if "val/loss" in last else ""
