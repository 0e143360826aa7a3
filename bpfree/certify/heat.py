"""Heat maps of dependence, as SVG and as text."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["heat_map", "text_map"]

CELL, LABEL, HEAD, LEGEND = 44, 74, 58, 190
NONE, UNMEASURED = "#f1f2f4", "#ffffff"
DARK, LIGHT = (8, 69, 148), (222, 235, 247)
LEAST = 1e-9
"""Relative change at the light end of the scale; 1 is the dark end."""

Rows = Sequence[Sequence[float | None]]


def heat_map(title: str, changed: str, blocks: Sequence[str], rows: Rows, *, silent: Sequence[str] = (), above: bool = False) -> str:
    """An SVG element: one row per update, one column per block whose weights were changed.

    Args:
        title: above it.
        changed: what was done to the columns' blocks.
        blocks: names, first to last.
        rows: relative changes; 0: none, ``None``: not measured.
        silent: blocks whose update is zero; their rows say so.
        above: only draw what lies above the diagonal: weights of blocks that come later.
    """
    size = len(blocks) * CELL
    width, height = LABEL + max(size, LEGEND) + 8, HEAD + size + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{html.escape(f"{title}: {changed}")}" font-family="system-ui,sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="4" y="14" font-size="12" font-weight="600" fill="#1c1e21">{html.escape(title)}</text>',
        f'<text x="4" y="29" font-size="11" fill="#5b616b">{html.escape(changed)}</text>',
        *_cells(blocks, rows, above=above),
        *_labels(blocks, silent, size),
        "</svg>",
    ]
    return "".join(parts)


def _cells(blocks: Sequence[str], rows: Rows, *, above: bool) -> Iterator[str]:
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            if above and j <= i:
                continue
            x, y = LABEL + j * CELL, HEAD + i * CELL
            said = f"update of {blocks[i]} when {blocks[j]} changes: {_number(value) or 'none'}"
            yield (
                f'<g><title>{html.escape(said)}</title><rect x="{x}" y="{y}" width="{CELL - 2}" height="{CELL - 2}" rx="3" '
                f'fill="{_colour(value)}" stroke="{"#b6bac0" if value is None else "none"}" stroke-dasharray="3"/>'
                f'<text x="{x + CELL / 2 - 1}" y="{y + CELL / 2 + 3}" text-anchor="middle" font-size="10" fill="{_ink(value)}">'
                f"{_number(value)}</text></g>"
            )


def _labels(blocks: Sequence[str], silent: Sequence[str], size: int) -> Iterator[str]:
    grey = "#5b616b"
    for place, name in enumerate(blocks):
        middle = place * CELL + CELL / 2
        shown = html.escape(name if len(name) < 9 else f"{name[:8]}…")
        yield f'<text x="{LABEL - 6}" y="{HEAD + middle + 3}" text-anchor="end" fill="#1c1e21">{shown}</text>'
        if name in silent:
            yield f'<text x="{LABEL - 6}" y="{HEAD + middle + 14}" text-anchor="end" font-size="8" fill="{grey}">no update</text>'
        yield f'<text x="{LABEL + middle - 1}" y="{HEAD - 6}" text-anchor="middle" fill="#1c1e21">{shown}</text>'
    yield f'<text x="{LABEL}" y="{HEAD + size + 16}" font-size="10" fill="{grey}">rows: update of; columns: weights of</text>'


def _strength(value: float) -> float:
    return min(1.0, max(0.0, 1 - math.log10(min(1.0, max(value, LEAST))) / math.log10(LEAST)))


def _colour(value: float | None) -> str:
    if value is None:
        return UNMEASURED
    if not value:
        return NONE
    share = _strength(value)
    return "#" + "".join(f"{round(low + (high - low) * share):02x}" for low, high in zip(LIGHT, DARK, strict=True))


def _ink(value: float | None) -> str:
    return "#fff" if value and _strength(value) > 0.55 else "#5b616b"


def _number(value: float | None) -> str:
    if value is None:
        return "?"
    if not value:
        return ""
    return f"{value:.2f}" if value >= 0.01 else f"{value:.0e}".replace("e-0", "e-")


def text_map(matrix: Mapping[str, Any]) -> list[str]:
    """What lies above the diagonal as lines of text: ``.`` for no change, ``?`` for not measured."""
    blocks, rows = matrix["blocks"], matrix["rows"]
    width = max(6, *(len(name) for name in blocks)) + 1
    lines = [" " * width + "".join(name.rjust(width) for name in blocks)]
    for i, (name, row) in enumerate(zip(blocks, rows, strict=True)):
        cells = ((_number(value) or ".") if j > i else "" for j, value in enumerate(row))
        lines.append((name.rjust(width) + "".join(cell.rjust(width) for cell in cells)).rstrip())
    return lines
