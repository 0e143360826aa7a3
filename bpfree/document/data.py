"""The numbers behind a figure, as comma-separated values."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from bpfree.document.content import Datum, Figure

__all__ = ["figure_csv"]

HEADERS = ("chart", "name", "x", "x_low", "x_high", "y", "y_low", "y_high")


def figure_csv(figure: Figure) -> str:
    """Write a line for each point that a figure draws, without columns that no point needs; the empty string without points."""
    rows = [_row(panel.title, datum) for panel in figure.panels for datum in panel.data]
    if not rows:
        return ""
    kept = [place for place in range(len(HEADERS)) if any(row[place] for row in rows)]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([row[place] for place in kept] for row in (HEADERS, *rows))
    return buffer.getvalue()


def _row(title: str, datum: Datum) -> Sequence[str]:
    x_low, x_high = _ends(datum.x_range)
    y_low, y_high = _ends(datum.y_range)
    return [title, datum.name, _text(datum.x), x_low, x_high, _text(datum.y), y_low, y_high]


def _ends(ends: tuple[float, float] | None) -> tuple[str, str]:
    return ("", "") if ends is None else (_text(ends[0]), _text(ends[1]))


def _text(value: float) -> str:
    return f"{value:.6g}"
