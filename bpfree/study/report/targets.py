"""Time to target: when the primary metric on validation first reaches the target of the study.

The time of a run is that of the first epoch whose end finds it at the target, so that its resolution is an epoch. A run that ended
without reaching it, for whatever reason, takes infinitely long, and medians count it as such.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from bpfree.document.content import Part, Section, Table, Text
from bpfree.study.report.view import WAITED, View, aligned, compact
from bpfree.study.rows import TableRow
from bpfree.study.statistics import first_reached, median_with_misses
from bpfree.study.store import CellRecord

__all__ = ["reached", "time_to_target", "times"]

COLUMNS = (
    ("seconds", "seconds"),
    ("processor_seconds", "processor seconds"),
    ("samples", "examples drawn"),
    ("epoch", "epochs"),
    ("forwards", "passes"),
    ("operations", "operations"),
    ("peak_memory_mb", "memory, MiB"),
)


def ended(row: TableRow) -> list[CellRecord]:
    """List the records of cells that have ended: finished, diverged, failed, timed out."""
    return [record for record in row.records if record is not None and record.is_final]


def _waited(row: TableRow) -> bool:
    """Tell whether a row has cells whose seconds cannot be compared."""
    return not all(record.comparable for record in ended(row))


def reached(view: View, row: TableRow) -> list[tuple[CellRecord, Mapping[str, float] | None]]:
    """Pair each cell that ended with the epoch in which it reached the target; ``None``: never."""
    target = view.plan.study.targets.get(row.column)
    measure = view.validation(view.of(row.column))
    if target is None or measure is None:
        return []
    aim, greater = target / measure.metric.factor, measure.metric.greater
    return [(record, first_reached(record.history, measure.key, aim, greater=greater)) for record in ended(row)]


def times(view: View, row: TableRow, key: str) -> list[float]:
    """Return the cost of each cell that ended, up to the target; infinite for misses."""
    return [math.inf if epoch is None else _at(record, epoch, key) for record, epoch in reached(view, row)]


def _at(record: CellRecord, epoch: Mapping[str, float], key: str) -> float:
    """Return the cost up to an epoch; operations are passes times the operations of a pass."""
    if key == "operations":
        return epoch.get("forwards", math.nan) * record.result.get("forward_operations", math.nan)
    return epoch.get(key, math.nan)


def time_to_target(view: View) -> Iterator[Section]:
    """Make a table for each column that has a target."""
    legend = (
        "Median over the cells that ended, to the end of the first epoch at the target; a cell that never reaches it counts as infinite. "
        "inf: at least half of the cells never reach it. Memory: the peak up to that epoch."
    )
    if any(_waited(row) for row in view.rows):
        legend += f" * Not comparable for at least one cell: {WAITED}."
    return view.by_column("Time to target", lambda column: _parts(view, column), Text(legend, "note"))


def _parts(view: View, column: str) -> list[Part]:
    return [Text(_aim(view, column)), _table(view, column)] if any(reached(view, row) for row in view.of(column)) else []


def _aim(view: View, column: str) -> str:
    target, measure = view.plan.study.targets[column], view.validation(view.of(column))
    assert measure is not None
    name, direction = measure.metric.name.replace("_", " "), "more" if measure.metric.greater else "less"
    return f"Target: validation {name} of {target:g}{measure.unit} or {direction}."


def _table(view: View, column: str) -> Table:
    rows = sorted((row for row in view.of(column) if ended(row)), key=lambda row: _order(view, row))
    headers, cells = ["row", "reached"], [[view.label(row) for row in rows], [_reached(view, row) for row in rows]]
    for key, name in COLUMNS:
        medians = [median_with_misses(times(view, row, key)) for row in rows]
        if any(map(math.isfinite, medians)):
            headers.append(name)
            cells.append(_texts(medians, rows, key))
    texts = [list(each) for each in zip(*cells, strict=True)]
    return Table(headers, texts, [1], f"Time to target {column}".strip(), [view.style(row) for row in rows])


def _order(view: View, row: TableRow) -> float:
    median = median_with_misses(times(view, row, "epoch" if _waited(row) else "seconds"))
    return math.inf if math.isnan(median) else median


def _reached(view: View, row: TableRow) -> str:
    found = [epoch for _, epoch in reached(view, row)]
    hits = sum(epoch is not None for epoch in found)
    return f"all {hits}" if hits == len(found) else f"{hits or 'none'} of {len(found)}"


def _texts(medians: Sequence[float], rows: Sequence[TableRow], key: str) -> list[str]:
    finite = [median if math.isfinite(median) else None for median in medians]
    large = key in ("samples", "forwards", "operations")
    if key == "epoch":
        texts = ["" if value is None else f"{value:g}" for value in finite]
    else:
        texts = ["" if value is None else compact(value) for value in finite] if large else aligned(finite)
    texts = [text or ("inf" if math.isinf(median) else "") for text, median in zip(texts, medians, strict=True)]
    if key != "seconds":
        return texts
    waited = [_waited(row) for row in rows]
    return [f"{text}*" if text and mark else text + "\u2007" * any(waited) for text, mark in zip(texts, waited, strict=True)]
