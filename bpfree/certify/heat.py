"""Heat maps of dependence, as charts and as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bpfree.document.charts import Shade, shades
from bpfree.document.content import Figure, Panel
from bpfree.document.tables import text_table

__all__ = ["figure", "heat_map", "text_map"]

TITLES = {"dependence": "all parameters changed", "downstream_weights": "weights changed, values held"}
CAPTION = (
    "Each entry is the relative change of a block's update (row) when another block's parameters (column) are changed, in double "
    "precision; empty: none, ?: could not be measured. In the second kind the change lies in the null space of the layer's inputs, so "
    "that no forward value moves: what shows there is weight transport."
)
WHOLE_CAPTION = (
    " In whole runs an entry says what a block learns of the weights of one above: r, it reads them; c, as they were at construction; e, "
    "it finds them out by executing; s, a statistic of them; b, blocks in between read them; empty, nothing, bit for bit."
)
SHADES: dict[str, tuple[float | None, str]] = {
    "none": (0.0, ""),
    "reads": (1.0, "r"),
    "at construction": (0.8, "c"),
    "executes": (0.6, "e"),
    "passed on": (0.4, "b"),
    "statistics": (0.2, "s"),
    "unmeasured": (None, "?"),
}
"""How dark each verdict of a whole run is, and its letter."""
LEAST = 1e-9
"""Relative change at the light end of the scale; 1 is the dark end."""

Rows = Sequence[Sequence[float | None]]


def figure(properties: Mapping[str, Any]) -> Figure:
    """Draw heat maps of the measured dependences; without any, the figure has no panels."""
    panels = [
        heat_map(f"{kind} network", title, matrix["blocks"], matrix["rows"], silent=matrix["silent"], above=key == "downstream_weights")
        for key, title in TITLES.items()
        for kind, matrix in properties.get(key, {}).get("matrices", {}).items()
    ]
    reading = properties.get("whole_runs", {}).get("reading", {})
    if len(reading.get("blocks", ())) > 1:
        panels.insert(0, _verdict_map(reading))
    return Figure(panels, CAPTION + (WHOLE_CAPTION if reading else ""))


def _verdict_map(reading: Mapping[str, Any]) -> Panel:
    """Draw what whole runs say of each pair: a word where the weights above count."""
    blocks, cells = reading["blocks"], list[list[Shade | None]]()
    for i, below in enumerate(blocks):
        row: list[Shade | None] = []
        for j, above in enumerate(blocks):
            verdict = reading["cells"].get(below, {}).get(above, {}).get("verdict", "none")
            strength, word = SHADES[verdict]
            row.append(None if j <= i else Shade(strength, word, f"what {below} learns of the weights of {above}: {verdict}"))
        cells.append(row)
    title, subtitle = "whole runs", f"{reading['steps']} steps on {reading['task']}, other weights, same values"
    small = dict.fromkeys(reading["silent"], "no update")
    return shades(title, subtitle, blocks, cells, small=small, axes="rows: learning of; columns: weights of")


def heat_map(title: str, changed: str, blocks: Sequence[str], rows: Rows, *, silent: Sequence[str] = (), above: bool = False) -> Panel:
    """Draw a row per update, and a column per block whose weights were changed.

    Args:
        title, changed: above it, the latter says what was done to the columns' blocks.
        blocks: names, first to last.
        rows: relative changes; 0: none, ``None``: not measured.
        silent: blocks whose update is zero; their rows say so.
        above: only draw what lies above the diagonal: weights of blocks that come later.
    """
    cells = [
        [None if above and j <= i else _shade(update, block, value) for j, (block, value) in enumerate(zip(blocks, row, strict=True))]
        for i, (update, row) in enumerate(zip(blocks, rows, strict=True))
    ]
    return shades(title, changed, blocks, cells, small=dict.fromkeys(silent, "no update"), axes="rows: update of; columns: weights of")


def _shade(update: str, changed: str, value: float | None) -> Shade:
    said = f"update of {update} when {changed} changes: {_number(value) or 'none'}"
    return Shade(None if value is None else _strength(value), _number(value), said)


def _strength(value: float) -> float:
    """Scale a relative change to 0 (none) to 1; the smallest that shows is just above 0."""
    return min(1.0, max(0.01, 1 - math.log10(min(1.0, max(value, LEAST))) / math.log10(LEAST))) if value else 0.0


def _number(value: float | None) -> str:
    if value is None:
        return "?"
    if not value:
        return ""
    return f"{value:.2f}" if value >= 0.01 else f"{value:.0e}".replace("e-0", "e-")


def text_map(matrix: Mapping[str, Any]) -> list[str]:
    """Return the entries above the diagonal as lines of text: ``.`` for no change, ``?`` for not measured."""
    blocks = matrix["blocks"]
    cells = [
        [name, *((_number(value) or ".") if j > i else "" for j, value in enumerate(row))]
        for i, (name, row) in enumerate(zip(blocks, matrix["rows"], strict=True))
    ]
    return text_table(["", *blocks], cells, range(len(blocks) + 1))
