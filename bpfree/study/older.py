"""Find finished cells of other sources or versions, which reports show with a remark; they do not replace training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from bpfree.config import resolve
from bpfree.errors import BpfreeError
from bpfree.leaves import Leaf
from bpfree.study.cells import is_scientific
from bpfree.study.rows import Cell, TableRow
from bpfree.study.store import CellRecord, CellStore

__all__ = ["OlderCells", "older_cells"]

MEASURED_BESIDE = "evaluation.protocols"
"""Setting of measurements at the end of a run, which change none of its other results."""

Place = tuple[str, str, int, int | None]


class OlderCells:
    """The finished cells of a study's folder by their place in its table.

    Args:
        store: of the study.
    """

    def __init__(self, store: CellStore) -> None:
        self._store = store

    def find(self, cell: Cell) -> CellRecord | None:
        """Return the latest record of the same row, column, seed and trial, with the same data and settings; ``None`` if there is none."""
        key = cell.key
        known = self._by_place.get((key.row, key.column, key.seed, key.trial), ())
        return next((record for record in known if _is_same(record, cell)), None)

    @cached_property
    def _by_place(self) -> Mapping[Place, Sequence[CellRecord]]:
        found: dict[Place, list[CellRecord]] = {}
        for record in sorted(self._finished(), key=lambda record: record.updated, reverse=True):
            found.setdefault((record.key.row, record.key.column, record.key.seed, record.key.trial), []).append(record)
        return found

    def _finished(self) -> Iterator[CellRecord]:
        for path in self._store.folder.glob("cells/*.json"):
            record = self._store.read(path.stem)
            if record is not None and record.status == "finished":
                yield record


def _is_same(record: CellRecord, cell: Cell) -> bool:
    then, now = record.key.identity, cell.key.identity
    if then.get("data") and now["data"] and then["data"] != now["data"]:
        return False
    leaves = [Leaf(key, value, "an older cell", shared=True) for key, value in then.get("config", {}).items()]
    try:  # former names of settings are read, and settings that are new have their defaults
        recipe = resolve(leaves, cell.recipe.registry, spec=cell.recipe.spec())
    except BpfreeError:
        return False
    return _compared(recipe.flat()) == _compared(now["config"])


def _compared(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if is_scientific(key) and key != MEASURED_BESIDE}


def older_cells(rows: Sequence[TableRow]) -> dict[str, int]:
    """Count the shown cells of other sources by the version of bpfree that measured them."""
    counts: dict[str, int] = {}
    for each in (part for row in rows for part in (row, row.twin) if part is not None):
        for cell, record in zip(each.cells, each.records, strict=True):
            if record is not None and record.key.id != cell.key.id:
                version = record.tags.get("bpfree", "an unknown version")
                counts[version] = counts.get(version, 0) + 1
    return counts
