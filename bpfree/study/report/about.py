"""Final sections of a report: failed cells, environments, differences of settings, and commands to run the study again."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from bpfree.document.content import Code, Folded, Part, Section, Table, Text
from bpfree.study.cells import is_scientific, word
from bpfree.study.report.remarks import environments, failures
from bpfree.study.report.view import View
from bpfree.study.rows import TableRow

__all__ = ["again", "differences", "failed", "places"]


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
    """List the settings in which the rows of a column differ."""
    parts: list[Part] = []
    for column in view.columns:
        rows = view.of(column)
        flat = [_settings(row) for row in rows]
        keys = [key for key in dict.fromkeys(key for one in flat for key in one) if len({repr(one.get(key)) for one in flat}) > 1]
        if not keys:
            continue
        cells = [
            [row.written.label, " ".join(word(key, one[key]) for key in keys if key in one)] for row, one in zip(rows, flat, strict=True)
        ]
        if view.labelled:
            parts.append(Text(f"{column}:"))
        parts.append(Table(["row", "settings that differ between rows"], cells, [1], f"Settings {column}".strip()))
    if parts:
        yield Section("Settings that differ between rows", [Folded("All other settings are equal in all rows", parts)])


def _settings(row: TableRow) -> dict[str, Any]:
    """Return a row's settings that can change a result, without the seed."""
    flat = row.cells[0].settings
    return {key: value for key, value in flat.items() if is_scientific(key) and key != "seed" and value is not None}


def places(view: View) -> Iterator[Section]:
    """List devices and versions of finished cells, and the plugins of their rules."""
    found = environments(view.rows)
    if not found:
        return
    cells = [[text, f"{count}"] for text, count in found.items()]
    parts: list[Part] = [Table(["environment", "cells"], cells, [], "Environments")]
    plugins = sorted(
        {
            f"{record.tags['plugin']} {record.tags.get('plugin_version', '')}".strip()
            for row in view.rows
            for record in row.finished
            if record.tags.get("plugin")
        }
    )
    if plugins:
        parts.append(Text(f"Rules from: {', '.join(plugins)}."))
    yield Section("Environment", parts)


def again(view: View, command: str) -> Section:
    """List the command of the study, and that of each cell."""
    runs = [_one_run(row) for row in view.rows]
    return Section("Run it again", [Code([command]), Folded("Each cell as a run of its own (first seed)", [Code(runs)])])


def _one_run(row: TableRow) -> str:
    return f"{row.label}: {shlex.join(['bpfree', 'train', *row.cells[0].words])}"
