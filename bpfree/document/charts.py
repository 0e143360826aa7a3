"""Charts as SVG elements: panels with axes, lines, bands, points and error bars, and maps of cells.

Colours are classes to which :mod:`bpfree.document.style` gives a meaning, so that one chart serves light and dark pages and
paper. Elements with the same :class:`Key` have the same colour, dash pattern and marker in every chart.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bpfree.document.axes import Axis
from bpfree.document.content import Datum, Key, Panel

__all__ = ["Mark", "Series", "Shade", "escape", "in_order", "look", "marker", "natural", "number", "panel", "shades", "swatch", "thinned"]

COLOURS, DASHES, MARKERS = 8, 4, 4
"""Number of colours, dash patterns and markers; the style defines the colours."""
ORDERED = ((0xE6, 0x9F, 0x00), (0x00, 0x9E, 0x73), (0x00, 0x72, 0xB2))
"""Colours of ordered items: first, middle, last; they are visible on light and dark pages."""
APART = (9, 11, 14, 15)
"""Styles, with dashes, of items without a number among ordered ones."""
MOST_POINTS = 120
"""Largest number of points of a curve: more cannot be distinguished at the size of a panel."""

WIDTH, HEIGHT = 400, 280
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 30, 44


@dataclass(frozen=True)
class Mark:
    """A marker with optional error bars, and the text that shows when the pointer rests on it; ``ringed`` if it was chosen."""

    x: float
    y: float
    title: str
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    ringed: bool = False


@dataclass(frozen=True)
class Series:
    """The elements of a panel that share a key.

    Attributes:
        key: its name and look.
        line: (x, y) in order.
        band: (x, low, high) in order.
        points: markers.
    """

    key: Key
    line: Sequence[tuple[float, float]] = ()
    band: Sequence[tuple[float, float, float]] = ()
    points: Sequence[Mark] = ()


def escape(text: str) -> str:
    """Escape text for elements and attributes."""
    return html.escape(text, quote=True)


def number(value: float) -> str:
    """Format a coordinate to a tenth of a pixel."""
    text = f"{value:z.1f}"
    return text[:-2] if text.endswith(".0") else text


def look(key: Key) -> str:
    """Return the attributes of a group of elements: one of eight colours, with other dashes from the ninth key on."""
    colour = f' style="color:{escape(key.colour)}"' if key.colour else ""
    return f'class="c{key.style % COLOURS} d{key.style // COLOURS % DASHES}{" faint" if key.faint else ""}"{colour}'


def in_order(labels: Sequence[str]) -> list[Key]:
    """Make keys of ordered items, such as blocks, with colours from orange (first) to blue (last).

    If any names end in a number, these are ordered by it; other names, such as ``readout`` or ``mean``, and a single name have dashes and
    other colours.
    """
    ordered = [label for label in labels if label[-1:].isdigit()] or (list(labels) if len(labels) > 1 else [])
    apart = [label for label in labels if label not in ordered]
    keys = {label: Key(0, label, _between(place / max(1, len(ordered) - 1))) for place, label in enumerate(ordered)}
    keys |= {label: Key(APART[place % len(APART)], label) for place, label in enumerate(apart)}
    return [keys[label] for label in labels]


def natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts ``b2`` before ``b10``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def _between(share: float) -> str:
    low, high, rest = (ORDERED[0], ORDERED[1], 2 * share) if share <= 0.5 else (ORDERED[1], ORDERED[2], 2 * share - 1)
    return "#" + "".join(f"{round(a + (b - a) * rest):02x}" for a, b in zip(low, high, strict=True))


def thinned(points: Sequence[tuple[float, ...]], most: int = MOST_POINTS) -> list[tuple[float, ...]]:
    """Select ``most`` evenly spaced points, including the first and the last."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def marker(index: int, x: float, y: float, size: float = 4.0) -> str:
    """Draw a circle, square, triangle or diamond; rows of one colour have different markers."""
    kind = (index % COLOURS + index // COLOURS) % MARKERS
    if kind == 0:
        return f'<circle cx="{number(x)}" cy="{number(y)}" r="{number(size)}"/>'
    corners = {
        1: [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        2: [(0, -1.15), (1.1, 0.85), (-1.1, 0.85)],
        3: [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
    }[kind]
    return f'<polygon points="{" ".join(f"{number(x + size * a)},{number(y + size * b)}" for a, b in corners)}"/>'


def swatch(key: Key, x: float, y: float) -> str:
    """Draw line and marker of a key, 26 wide, centred at height ``y``."""
    return f'<g {look(key)}><path class="line" d="M{number(x)} {number(y)}h26"/><g class="dot">{marker(key.style, x + 13, y, 3.5)}</g></g>'


class _Frame:
    """Converts values to pixels."""

    def __init__(self, x: Axis, y: Axis, width: int, height: int) -> None:
        self.x_axis, self.y_axis, self.width, self.height = x, y, width, height
        self.right, self.bottom = width - RIGHT, height - BOTTOM

    def x(self, value: float) -> float:
        return LEFT + (self.right - LEFT) * self.x_axis.share(value)

    def y(self, value: float) -> float:
        return self.bottom - (self.bottom - TOP) * self.y_axis.share(value)

    def visible(self, x: float, y: float) -> bool:
        """Tell whether a point can be drawn: it is finite, and within the axes."""
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
) -> Panel:
    """Draw series over two axes.

    Args:
        title: above it; by default the label of y.
        x, y: axes.
        series: drawn in this order.
        rules: horizontal lines with their texts, such as a target.
        width, height: of the view box.
    """
    frame = _Frame(x, y, width, height)
    said = f"{title or y.label} against {x.label}: {', '.join(dict.fromkeys(one.key.label for one in series if one.key.label))}"
    head = f'<text class="head" x="{4 if len(title or y.label) > 44 else LEFT - 6}" y="16">{escape(title or y.label)}</text>'
    parts = [head, *_axes(frame), *_rules(frame, rules), *(_series(frame, one) for one in series)]
    return Panel(width, height, said, "".join(parts), title or y.label, [datum for one in series for datum in _data(one)])


def _data(one: Series) -> Iterator[Datum]:
    """List what a series draws: its markers, or the points of its line with its band."""
    if one.points:
        yield from (Datum(one.key.label, point.x, point.y, point.x_range, point.y_range) for point in one.points)
        return
    band = {x: (low, high) for x, low, high in one.band}
    yield from (Datum(one.key.label, x, y, None, band.get(x)) for x, y in thinned(one.line))  # type: ignore[misc]


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
    """Select ticks whose texts do not touch the one before."""
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
    title = f"<title>{escape(one.key.label)}</title>"
    parts = [f'<g {look(one.key)} data-row="{one.key.style}">']
    band = [(x, low, high) for x, low, high in thinned(one.band) if frame.visible(x, low) and frame.visible(x, high)]  # type: ignore[misc]
    if len(band) > 1:
        edge = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
        parts.append(f'<path class="band" d="{_path(frame, edge)}Z"/>')
    line = [(x, y) for x, y in thinned(one.line) if frame.visible(x, y)]  # type: ignore[misc]
    if len(line) > 1:
        parts.append(f'<path class="line" d="{_path(frame, line)}">{title}</path>')
    elif line and not one.points:  # a line of a single point would be invisible
        (x, y) = line[0]
        parts.append(f'<g class="dot">{title}{marker(one.key.style, frame.x(x), frame.y(y))}</g>')
    parts.extend(_point(frame, one.key.style, point) for point in one.points if frame.visible(point.x, point.y))
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
    ring = f'<circle class="ring" cx="{number(x)}" cy="{number(y)}" r="8"/>' if point.ringed else ""
    return f'<g class="dot"><title>{escape(point.title)}</title>{bars}{marker(style, x, y)}{ring}</g>'


# --- maps ---------------------------------------------------------------------------------------------------------------

CELL, NAMES, HEAD, LEAST_WIDTH = 44, 74, 58, 190


class Shade(NamedTuple):
    """A cell of a map: its share of colour from 0 (none) to 1 (``None``: unknown), the text in it, and the one for the pointer."""

    share: float | None
    text: str
    title: str


def shades(
    title: str, below: str, names: Sequence[str], rows: Sequence[Sequence[Shade | None]], *, small: Mapping[str, str], axes: str
) -> Panel:
    """Draw a square map, a row and a column for each name.

    Args:
        title: above it, with ``below`` in smaller print.
        names: of rows and columns, with ``small`` print below those of rows; ``axes`` names the two axes.
        rows: cells; nothing is drawn for ``None``.
    """
    size = len(names) * CELL
    width = NAMES + max(size, LEAST_WIDTH, 6 * len(below) - NAMES) + 8
    parts = [f'<text class="head" x="4" y="14">{escape(title)}</text><text class="name" x="4" y="29">{escape(below)}</text>']
    parts += [_shade(one, NAMES + j * CELL, HEAD + i * CELL) for i, row in enumerate(rows) for j, one in enumerate(row) if one is not None]
    for place, name in enumerate(names):
        middle = place * CELL + CELL // 2
        shown = escape(name if len(name) < 9 else f"{name[:8]}…")
        parts.append(f'<text class="item" x="{NAMES - 6}" y="{HEAD + middle + 3}" text-anchor="end">{shown}</text>')
        parts.append(f'<text class="item" x="{NAMES + middle - 1}" y="{HEAD - 6}" text-anchor="middle">{shown}</text>')
        if name in small:
            parts.append(f'<text class="note" x="{NAMES - 6}" y="{HEAD + middle + 15}" text-anchor="end">{escape(small[name])}</text>')
    parts.append(f'<text class="note" x="{NAMES}" y="{HEAD + size + 16}">{escape(axes)}</text>')
    return Panel(width, HEAD + size + 30, f"{title}: {below}", "".join(parts))


def _shade(one: Shade, x: int, y: int) -> str:
    """Draw a cell, never so dark that its text becomes illegible."""
    kind = "unknown" if one.share is None else "cell" if one.share else "none"
    opacity = f' fill-opacity="{0.08 + 0.47 * one.share:.3f}"' if one.share else ""
    box = f'x="{x}" y="{y}" width="{CELL - 2}" height="{CELL - 2}" rx="3"{opacity}'
    text = f'<text class="item" x="{x + CELL // 2 - 1}" y="{y + CELL // 2 + 3}" text-anchor="middle">{escape(one.text)}</text>'
    return f'<g><title>{escape(one.title)}</title><rect class="{kind}" {box}/>{text}</g>'
