"""Final sections of a report: failed cells, differences of settings, and commands to run the study again."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bpfree.document.content import Code, Folded, Part, Section, Table, Text
from bpfree.study.cells import is_scientific, word
from bpfree.study.report.remarks import failures
from bpfree.study.report.view import View
from bpfree.study.rows import TableRow

__all__ = ["again", "differences", "failed"]


def failed(view: View) -> Iterator[Section]:
    """List the cells that ended without a result, or with a part of it missing."""
    cells = [
        [row.written.label, *([row.column] if view.labelled else []), f"{record.key.seed}", record.status, record.reason]
        for row, record in failures(view.rows)
    ]
    if cells:
        headers = ["row", *(["column"] if view.labelled else []), "seed", "status", "reason"]
        words = [place for place, header in enumerate(headers) if header != "seed"]
        yield Section("What failed", [Table(headers, cells, words, "Failures")])


def differences(view: View) -> Iterator[Section]:
    """List the settings in which the rows of a column differ: those of most rows once, then what each row has of its own."""
    parts: list[Part] = []
    for column in view.columns:
        rows = view.of(column)
        flat = [_settings(row) for row in rows]
        keys = [key for key in dict.fromkeys(key for one in flat for key in one) if len({repr(one.get(key)) for one in flat}) > 1]
        if not keys:
            continue
        usual = _usual(flat, keys)
        cells = [["most rows", " ".join(word(key, value) for key, value in usual.items())]] if usual else []
        for row, one in zip(rows, flat, strict=True):
            own = [key for key in keys if key in one and (key not in usual or repr(one[key]) != repr(usual[key]))]
            cells.append([row.written.label, " ".join(word(key, one[key]) for key in own)])
        if view.labelled:
            parts.append(Text(f"{column}:"))
        parts.append(Table(["row", "settings that differ between rows"], cells, [1], f"Settings {column}".strip()))
    if parts:
        yield Section(
            "Settings that differ between rows",
            [Folded("Of each row what it has otherwise than most; all other settings are equal", parts)],
        )


def _usual(flat: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, Any]:
    """Return the settings that more than half of the rows share."""
    found = {}
    for key in keys:
        values = {repr(one[key]): one[key] for one in flat if key in one}
        most, count = Counter(repr(one[key]) for one in flat if key in one).most_common(1)[0]
        if 2 * count > len(flat):
            found[key] = values[most]
    return found


def _settings(row: TableRow) -> dict[str, Any]:
    """Return a row's settings that can change a result, without the seed, and without the stream where it is the rule's name."""
    flat = row.cells[0].settings
    hidden = {"seed", *(["stream"] if flat.get("stream") == flat.get("rule.name") else [])}
    return {key: value for key, value in flat.items() if is_scientific(key) and key not in hidden and value is not None}


def again(view: View, command: str) -> Section:
    """List the command of the study, and that of each cell."""
    runs = [_one_run(row) for row in view.rows]
    return Section("Run it again", [Code([command]), Folded("Each cell as a run of its own (first seed)", [Code(runs)])])


def _one_run(row: TableRow) -> str:
    remark = "" if row.tuned is None or row.tuned.complete else " (its tuning has not finished: the settings as written)"
    return f"{row.label}{remark}: {shlex.join(['bpfree', 'train', *row.cells[0].words])}"
