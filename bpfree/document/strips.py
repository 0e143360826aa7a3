"""Draw strips in tables: interval, mean and single runs of a row, on an axis that all rows of the table share."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bpfree.document.axes import Axis, linear
from bpfree.document.charts import escape, look, number
from bpfree.document.content import Key

__all__ = ["Strip", "near_the_best", "shared_axis", "strip", "strip_axis"]

WIDTH, HEIGHT, MARGIN = 300, 26, 8


@dataclass(frozen=True)
class Strip:
    """The values in the strip of a row.

    Attributes:
        key: of the row.
        values: of single runs.
        interval: of their mean.
        published: the paper's number.
        said: description in words.
    """

    key: Key
    values: Sequence[float]
    interval: tuple[float, float] | None
    published: float | None
    said: str


def shared_axis(rows: Sequence[Strip], *, greater: bool) -> Axis:
    """Make the axis over all rows without values far off (a floor, a run that failed to learn), so that other rows remain readable.

    See :func:`near_the_best`.
    """
    means = [statistics.fmean(row.values) for row in rows if row.values and all(map(math.isfinite, row.values))]
    drawn = [value for row in rows for value in (*row.values, *(row.interval or ())) if math.isfinite(value)]
    drawn += [row.published for row in rows if row.published is not None]
    return linear(near_the_best(drawn, means, greater=greater), "", pad=0.02)


def near_the_best(values: Sequence[float], means: Sequence[float], *, greater: bool) -> list[float]:
    """Select the values that are at most twice as far from the best mean as the first three quarters of the means."""
    if len(means) < 4:
        return list(values)
    ordered, sign = sorted(means, reverse=greater), 1 if greater else -1
    best = ordered[0]
    room = 2 * abs(best - ordered[3 * (len(ordered) - 1) // 4])
    kept = [value for value in values if sign * (best - value) <= room]
    return kept if room and kept else list(values)


def strip_axis(axis: Axis) -> str:
    """Draw the ticks of the axis for the head of the table."""
    ticks = _few(axis)
    texts = "".join(
        f'<path class="axis" d="M{number(_x(axis, value))} 16v4"/>'
        f'<text class="tick" x="{number(_x(axis, value))}" y="12" text-anchor="middle">{escape(text)}</text>'
        for value, text in ticks
    )
    line = f'<path class="axis" d="M{MARGIN} 20H{WIDTH - MARGIN}"/>'
    return f'<svg class="strip" viewBox="0 0 {WIDTH} 21" width="{WIDTH}" height="21" aria-hidden="true">{texts}{line}</svg>'


def _few(axis: Axis) -> list[tuple[float, str]]:
    ticks = [tick for tick in axis.ticks if 14 < _x(axis, tick[0]) < WIDTH - 14]
    return ticks[:: max(1, math.ceil(len(ticks) / 5))]


def strip(row: Strip, axis: Axis) -> str:
    """Draw the strip of a row in its colour; a triangle at the edge marks values beyond the axis."""
    middle = HEIGHT / 2
    grid = "".join(f'<path class="grid" d="M{number(_x(axis, value))} 0V{HEIGHT}"/>' for value, _ in _few(axis))
    parts = [
        f'<svg class="strip" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{escape(row.said)}">'
    ]
    parts.append(f"<title>{escape(row.said)}</title>{grid}<g {look(row.key)}>")
    finite = [value for value in row.values if math.isfinite(value)]
    if row.interval is not None and row.interval[0] <= axis.high and row.interval[1] >= axis.low:
        left, right = (_x(axis, end) for end in row.interval)
        parts.append(
            f'<rect class="range" x="{number(left)}" y="{middle - 5:g}" width="{number(max(right - left, 1))}" height="10" rx="2"/>'
        )
    parts += [
        f'<circle class="run" cx="{number(_x(axis, value))}" cy="{middle:g}" r="3"/>' for value in finite if axis.low <= value <= axis.high
    ]
    if finite and axis.low <= (mean := statistics.fmean(finite)) <= axis.high:
        parts.append(f'<path class="mean" d="M{number(_x(axis, mean))} {middle - 9:g}V{middle + 9:g}"/>')
    parts.append("</g>")
    if row.published is not None and axis.low <= row.published <= axis.high:
        parts.append(f'<path class="published" d="M{number(_x(axis, row.published))} {middle:g}m0 -6l5 6l-5 6l-5 -6Z"/>')
    if any(value < axis.low for value in finite):
        parts.append(f'<path class="beyond" d="M1 {middle:g}l6 -4v8Z"/>')
    if any(value > axis.high for value in finite):
        parts.append(f'<path class="beyond" d="M{WIDTH - 1} {middle:g}l-6 -4v8Z"/>')
    return "".join(parts) + "</svg>"


def _x(axis: Axis, value: float) -> float:
    return MARGIN + (WIDTH - 2 * MARGIN) * axis.share(value)
