"""Time to target: when the validation accuracy first reaches what the study asks for.

The time of a run is that of the first epoch whose end finds it at the target, so that its resolution is an epoch. A run that ended
without reaching it, for whatever reason, takes infinitely long, and medians count it as such.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from bpfree.study.report.content import Part, Section, Table, Text
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


def ended(line: TableRow) -> list[CellRecord]:
    """Cells that will not go on: finished, diverged, failed, out of time."""
    return [record for record in line.records if record is not None and record.is_final]


def _waited(line: TableRow) -> bool:
    """Whether its seconds cannot be compared."""
    return not all(record.comparable for record in ended(line))


def reached(view: View, line: TableRow) -> list[tuple[CellRecord, Mapping[str, float] | None]]:
    """Each cell that ended, with the epoch at which it was at the target; ``None``: never."""
    target = view.plan.study.targets.get(line.column)
    metric = view.validation(view.of(line.column))
    if target is None or not metric:
        return []
    greater = metric.endswith("accuracy")
    aim = target / 100 if greater else target
    return [(record, first_reached(record.history, metric, aim, greater=greater)) for record in ended(line)]


def times(view: View, line: TableRow, key: str) -> list[float]:
    """What each cell that ended took; infinite for misses."""
    return [math.inf if epoch is None else _at(record, epoch, key) for record, epoch in reached(view, line)]


def _at(record: CellRecord, epoch: Mapping[str, float], key: str) -> float:
    """What was spent by an epoch; operations are passes times those of one pass."""
    if key == "operations":
        return epoch.get("forwards", math.nan) * record.result.get("forward_operations", math.nan)
    return epoch.get(key, math.nan)


def time_to_target(view: View) -> Iterator[Section]:
    """A table for each column that has a target."""
    columns = [column for column in view.columns if any(reached(view, line) for line in view.of(column))]
    if not columns:
        return
    legend = (
        "Median over the cells that ended, to the end of the first epoch at the target; a cell that misses it takes infinitely long. "
        "inf: half of them or more miss it. Memory: the peak up to then."
    )
    if any(_waited(line) for line in view.lines):
        legend += f" * Of one cell or more these seconds cannot be compared: {WAITED}."
    parts: list[Part] = [Text(legend, "note")]
    if not view.labelled:
        yield Section("Time to target", [Text(_aim(view, columns[0])), _table(view, columns[0]), *parts])
        return
    yield Section("Time to target", parts)
    for column in columns:
        yield Section(column, [Text(_aim(view, column)), _table(view, column)], level=3)


def _aim(view: View, column: str) -> str:
    target, accuracy = view.plan.study.targets[column], view.validation(view.of(column)).endswith("accuracy")
    return f"Target: validation accuracy of {target:g} % or more." if accuracy else f"Target: validation loss of {target:g} or less."


def _table(view: View, column: str) -> Table:
    lines = sorted((line for line in view.of(column) if ended(line)), key=lambda line: _order(view, line))
    headers, cells = ["row", "reached"], [[view.label(line) for line in lines], [_reached(view, line) for line in lines]]
    for key, name in COLUMNS:
        medians = [median_with_misses(times(view, line, key)) for line in lines]
        if any(map(math.isfinite, medians)):
            headers.append(name)
            cells.append(_texts(medians, lines, key))
    rows = [list(row) for row in zip(*cells, strict=True)]
    return Table(headers, rows, [1], f"Time to target {column}".strip(), [view.style(line) for line in lines])


def _order(view: View, line: TableRow) -> float:
    median = median_with_misses(times(view, line, "epoch" if _waited(line) else "seconds"))
    return math.inf if math.isnan(median) else median


def _reached(view: View, line: TableRow) -> str:
    found = [epoch for _, epoch in reached(view, line)]
    hits = sum(epoch is not None for epoch in found)
    return f"all {hits}" if hits == len(found) else f"{hits or 'none'} of {len(found)}"


def _texts(medians: Sequence[float], lines: Sequence[TableRow], key: str) -> list[str]:
    finite = [median if math.isfinite(median) else None for median in medians]
    large = key in ("samples", "forwards", "operations")
    if key == "epoch":
        texts = ["" if value is None else f"{value:g}" for value in finite]
    else:
        texts = ["" if value is None else compact(value) for value in finite] if large else aligned(finite)
    texts = [text or ("inf" if math.isinf(median) else "") for text, median in zip(texts, medians, strict=True)]
    if key != "seconds":
        return texts
    waited = [_waited(line) for line in lines]
    return [f"{text}*" if text and mark else text + "\u2007" * any(waited) for text, mark in zip(texts, waited, strict=True)]
