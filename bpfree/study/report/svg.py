"""Figures of a report as SVG elements: panels with axes, lines, bands, points and error bars.

Colours are classes that the page's style gives a meaning (:mod:`bpfree.study.report.style`), so that one figure does for light and
dark pages and for paper. A row has the same colour, dash pattern and marker in every figure.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from bpfree.study.report.axes import Axis

__all__ = ["COLOURS", "Mark", "Series", "escape", "legend", "marker", "number", "panel", "style_of", "thinned"]

COLOURS, DASHES, MARKERS = 8, 4, 4
"""How many there are of each; the style has the colours."""
MOST_POINTS = 120
"""Of a curve: more cannot be told apart at the size of a panel."""

WIDTH, HEIGHT = 400, 280
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 30, 44


@dataclass(frozen=True)
class Mark:
    """A marker with optional error bars, and the text that shows when the pointer rests on it."""

    x: float
    y: float
    title: str
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Series:
    """What one row draws in a panel.

    Attributes:
        style: number of the row, which decides on colour, dash pattern and marker.
        label: of the row.
        line: (x, y) in order.
        band: (x, low, high) in order.
        points: markers.
        colour: instead of the row's.
    """

    style: int
    label: str
    line: Sequence[tuple[float, float]] = ()
    band: Sequence[tuple[float, float, float]] = ()
    points: Sequence[Mark] = field(default_factory=tuple)
    colour: str = ""


def escape(text: str) -> str:
    """For texts and attributes."""
    return html.escape(text, quote=True)


def number(value: float) -> str:
    """A coordinate, to a tenth of a pixel."""
    text = f"{value:z.1f}"
    return text[:-2] if text.endswith(".0") else text


def style_of(index: int) -> str:
    """Classes of a row: eight colours, and beyond them the same with other dashes."""
    return f"s c{index % COLOURS} d{index // COLOURS % DASHES}"


def thinned(points: Sequence[tuple[float, ...]], most: int = MOST_POINTS) -> list[tuple[float, ...]]:
    """Evenly chosen ones, with the first and the last."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def marker(index: int, x: float, y: float, size: float = 4.0) -> str:
    """A circle, square, triangle or diamond; rows of one colour have different ones."""
    kind = (index % COLOURS + index // COLOURS) % MARKERS
    if kind == 0:
        return f'<circle cx="{number(x)}" cy="{number(y)}" r="{number(size)}"/>'
    corners = {
        1: [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        2: [(0, -1.15), (1.1, 0.85), (-1.1, 0.85)],
        3: [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
    }[kind]
    return f'<polygon points="{" ".join(f"{number(x + size * a)},{number(y + size * b)}" for a, b in corners)}"/>'


def legend(rows: Iterable[tuple[int, str]]) -> str:
    """A list of rows with their lines and markers; without a script it is only read, with one it hides rows."""
    items = (
        f'<li data-row="{index}"><svg class="key {style_of(index)}" viewBox="0 0 28 12" width="28" height="12" aria-hidden="true">'
        f'<path class="line" d="M1 6H27"/><g class="dot">{marker(index, 14, 6, 3.5)}</g></svg><span>{escape(label)}</span></li>'
        for index, label in rows
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


class _Frame:
    """From values to pixels."""

    def __init__(self, x: Axis, y: Axis, width: int, height: int) -> None:
        self.x_axis, self.y_axis, self.width, self.height = x, y, width, height
        self.right, self.bottom = width - RIGHT, height - BOTTOM

    def x(self, value: float) -> float:
        return LEFT + (self.right - LEFT) * self.x_axis.share(value)

    def y(self, value: float) -> float:
        return self.bottom - (self.bottom - TOP) * self.y_axis.share(value)

    def visible(self, x: float, y: float) -> bool:
        """Whether a point can be drawn at all."""
        positive = (not self.x_axis.log or x > 0) and (not self.y_axis.log or y > 0)
        return positive and math.isfinite(x) and math.isfinite(y)


def panel(
    title: str,
    x: Axis,
    y: Axis,
    series: Sequence[Series],
    *,
    rules: Sequence[tuple[float, str]] = (),
    width: int = WIDTH,
    height: int = HEIGHT,
) -> str:
    """An SVG element.

    Args:
        title: above it; where there is none, what y shows.
        x, y: axes.
        series: drawn in this order.
        rules: horizontal lines with their texts, such as a target.
        width, height: of the view box.
    """
    frame = _Frame(x, y, width, height)
    said = f"{title or y.label} against {x.label}: {', '.join(dict.fromkeys(one.label for one in series if one.label))}"
    parts = [
        f'<svg class="panel" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(said)}">',
        f'<text class="head" x="{4 if len(title or y.label) > 44 else LEFT - 6}" y="16">{escape(title or y.label)}</text>',
        *_axes(frame),
        *_rules(frame, rules),
        *(_series(frame, one) for one in series),
        "</svg>",
    ]
    return "".join(parts)


def _axes(frame: _Frame) -> Iterator[str]:
    for value, text in frame.y_axis.ticks:
        at = number(frame.y(value))
        yield f'<path class="grid" d="M{LEFT} {at}H{number(frame.right)}"/>'
        yield f'<text class="tick" x="{LEFT - 6}" y="{number(frame.y(value) + 4)}" text-anchor="end">{escape(text)}</text>'
    for value, text in _apart(frame):
        at = number(frame.x(value))
        yield f'<path class="axis" d="M{at} {number(frame.bottom)}v4"/>'
        yield f'<text class="tick" x="{at}" y="{number(frame.bottom + 17)}" text-anchor="middle">{escape(text)}</text>'
    yield f'<path class="axis" d="M{LEFT} {number(frame.bottom)}H{number(frame.right)}"/>'
    middle = number((LEFT + frame.right) / 2)
    yield f'<text class="name" x="{middle}" y="{number(frame.height - 8)}" text-anchor="middle">{escape(frame.x_axis.label)}</text>'


def _apart(frame: _Frame) -> Iterator[tuple[float, str]]:
    """Ticks whose texts do not touch the one before."""
    end = -math.inf
    for value, text in frame.x_axis.ticks:
        half = 3.6 * len(text)
        if frame.x(value) - half > end:
            end = frame.x(value) + half + 4
            yield value, text


def _rules(frame: _Frame, rules: Sequence[tuple[float, str]]) -> Iterator[str]:
    for value, text in rules:
        at = frame.y(value)
        yield f'<path class="rule" d="M{LEFT} {number(at)}H{number(frame.right)}"/>'
        yield f'<text class="note" x="{number(frame.right - 3)}" y="{number(at + 12)}" text-anchor="end">{escape(text)}</text>'


def _series(frame: _Frame, one: Series) -> str:
    colour = f' style="--c:{escape(one.colour)}"' if one.colour else ""
    parts = [f'<g class="{style_of(one.style)}" data-row="{one.style}"{colour}>']
    band = [(x, low, high) for x, low, high in thinned(one.band) if frame.visible(x, low) and frame.visible(x, high)]  # type: ignore[misc]
    if len(band) > 1:
        edge = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
        parts.append(f'<path class="band" d="{_path(frame, edge)}Z"/>')
    line = [(x, y) for x, y in thinned(one.line) if frame.visible(x, y)]  # type: ignore[misc]
    if len(line) > 1:
        parts.append(f'<path class="line" d="{_path(frame, line)}"><title>{escape(one.label)}</title></path>')
    elif line:  # a line of one point is invisible
        (x, y) = line[0]
        parts.append(f'<g class="dot"><title>{escape(one.label)}</title>{marker(one.style, frame.x(x), frame.y(y))}</g>')
    parts.extend(_point(frame, one.style, point) for point in one.points if frame.visible(point.x, point.y))
    return "".join(parts) + "</g>"


def _path(frame: _Frame, points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{number(frame.x(x))} {number(frame.y(y))}" for x, y in points)


def _point(frame: _Frame, style: int, point: Mark) -> str:
    x, y = frame.x(point.x), frame.y(point.y)
    bars = ""
    if point.y_range:
        bars += f'<path class="bar" d="M{number(x)} {number(frame.y(point.y_range[0]))}V{number(frame.y(point.y_range[1]))}"/>'
    if point.x_range:
        bars += f'<path class="bar" d="M{number(frame.x(point.x_range[0]))} {number(y)}H{number(frame.x(point.x_range[1]))}"/>'
    return f'<g class="dot"><title>{escape(point.title)}</title>{bars}{marker(style, x, y)}</g>'
