"""The end of a report: what failed, where it ran, how rows differ in their settings, and how to run it again."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from bpfree.study.cells import is_scientific, word
from bpfree.study.report.content import Code, Folded, Part, Section, Table, Text
from bpfree.study.report.remarks import environments, failures
from bpfree.study.report.view import View
from bpfree.study.rows import TableRow

__all__ = ["again", "differences", "failed", "places"]


def failed(view: View) -> Iterator[Section]:
    """Cells that ended without a result, or with a part of it missing."""
    rows = [
        [line.written.label, *([line.column] if view.labelled else []), f"{record.key.seed}", record.status, record.reason]
        for line, record in failures(view.lines)
    ]
    if rows:
        headers = ["row", *(["column"] if view.labelled else []), "seed", "status", "reason"]
        words = [place for place, header in enumerate(headers) if header != "seed"]
        yield Section("What failed", [Table(headers, rows, words, "Failures")])


def differences(view: View) -> Iterator[Section]:
    """The settings in which the rows of a column differ."""
    parts: list[Part] = []
    for column in view.columns:
        lines = view.of(column)
        flat = [_settings(line) for line in lines]
        keys = [key for key in dict.fromkeys(key for one in flat for key in one) if len({repr(one.get(key)) for one in flat}) > 1]
        if not keys:
            continue
        cells = [
            [line.written.label, " ".join(word(key, one[key]) for key in keys if key in one)] for line, one in zip(lines, flat, strict=True)
        ]
        if view.labelled:
            parts.append(Text(f"{column}:"))
        parts.append(Table(["row", "settings that are not the same in all rows"], cells, [1], f"Settings {column}".strip()))
    if parts:
        yield Section("How the rows differ", [Folded("Settings that differ between rows; all others are the same", parts)])


def _settings(line: TableRow) -> dict[str, Any]:
    """Those that can change a number; the seed aside."""
    flat = line.cells[0].recipe.flat()
    return {key: value for key, value in flat.items() if is_scientific(key) and key != "seed" and value is not None}


def places(view: View) -> Iterator[Section]:
    """Devices and versions of finished cells, and the plugins of their rules."""
    found = environments(view.lines)
    if not found:
        return
    rows = [[text, f"{count}"] for text, count in found.items()]
    parts: list[Part] = [Table(["environment", "cells"], rows, [], "Environments")]
    plugins = sorted(
        {
            f"{record.tags['plugin']} {record.tags.get('plugin_version', '')}".strip()
            for line in view.lines
            for record in line.finished
            if record.tags.get("plugin")
        }
    )
    if plugins:
        parts.append(Text(f"Rules from: {', '.join(plugins)}."))
    yield Section("Environment", parts)


def again(view: View, command: str) -> Section:
    """The command of the study, and that of each cell."""
    runs = [_one_run(line) for line in view.lines]
    return Section("Run it again", [Code([command]), Folded("Each cell as a run of its own (first seed)", [Code(runs)])])


def _one_run(line: TableRow) -> str:
    return f"{line.label}: {shlex.join(['bpfree', 'train', *line.cells[0].words])}"
