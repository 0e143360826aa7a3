"""Write a figure as a self-contained SVG file, with its title and legend."""

from __future__ import annotations

from collections.abc import Sequence

from bpfree.document.charts import escape, look, number, swatch
from bpfree.document.content import Figure, Key
from bpfree.document.style import CHART_STYLE

__all__ = ["svg_file"]

GAP, MARGIN, LINE, LETTER, BAND = 16, 10, 19, 6.6, 160
MOST_KEYS = 12
"""Largest number of ordered items in a legend; for more it shows a band of colours from the first to the last."""


def svg_file(title: str, figure: Figure) -> str:
    """Draw a figure's panels side by side, below title and legend; the caption is for readers who cannot see the figure."""
    inner = sum(panel.width for panel in figure.panels) + GAP * (len(figure.panels) - 1)
    width = max(inner, 9 * len(title)) + 2 * MARGIN
    legend, top = _legend(figure.keys, width, 2 * MARGIN + LINE if title else MARGIN)
    parts, x = [*legend], MARGIN
    for panel in figure.panels:
        box = f'x="{x}" y="{number(top)}" width="{panel.width}" height="{panel.height}" viewBox="0 0 {panel.width} {panel.height}"'
        parts.append(f'<svg class="panel" {box} role="img" aria-label="{escape(panel.label)}">{panel.body}</svg>')
        x += panel.width + GAP
    height = top + max(panel.height for panel in figure.panels) + MARGIN
    size = f'viewBox="0 0 {width} {number(height)}" width="{width}" height="{number(height)}"'
    head = f'<text class="title" x="{MARGIN}" y="{MARGIN + 14}">{escape(title)}</text>' if title else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(title or figure.caption)}">'
        f"<desc>{escape(figure.caption)}</desc><style>{CHART_STYLE}</style>"
        f'<rect class="ground" width="100%" height="100%"/>{head}{"".join(parts)}</svg>\n'
    )


def _legend(keys: Sequence[Key], width: float, top: float) -> tuple[list[str], float]:
    """Draw the legend; return its elements and the height at which they end."""
    if not keys:
        return [], top
    parts: list[str] = []
    x, y = float(MARGIN), top + LINE / 2
    ordered = [key for key in keys if key.colour]
    if len(ordered) > MOST_KEYS:
        parts, x = _range(ordered, y)
        keys = [key for key in keys if not key.colour]
    for key in keys:
        wide = 34 + LETTER * len(key.label)
        if x > MARGIN and x + wide > width - MARGIN:
            x, y = MARGIN, y + LINE
        parts.append(f'{swatch(key, x, y)}<text class="item" x="{number(x + 31)}" y="{number(y + 4)}">{escape(key.label)}</text>')
        x += wide + GAP
    return parts, y + LINE / 2 + 4


def _range(keys: Sequence[Key], y: float) -> tuple[list[str], float]:
    """Draw a band of colours between the names of the first and last key; return its elements and the height at which they end."""
    first, last = keys[0].label, keys[-1].label
    x, wide = MARGIN + 8 + LETTER * len(first), BAND / len(keys)
    parts = [f'<text class="item" x="{MARGIN}" y="{number(y + 4)}">{escape(first)}</text>']
    for place, key in enumerate(keys):
        at = f'x="{number(x + place * wide)}" y="{number(y - 5)}" width="{number(wide + 0.2)}" height="10"'
        parts.append(f'<g {look(key)}><rect class="dot" {at}><title>{escape(key.label)}</title></rect></g>')
    parts.append(f'<text class="item" x="{number(x + BAND + 8)}" y="{number(y + 4)}">{escape(last)}</text>')
    return parts, x + BAND + 8 + LETTER * len(last) + GAP
