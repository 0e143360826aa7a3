"""Draw a confusion matrix for any number of classes: as elements that can be painted, and as a panel of a figure.

A row is a true class, a column a predicted one; the colour is the share of the row. Up to twelve classes have counts in their cells; from
there on cells shrink, down to ten pixels, so that a hundred names stay legible.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from bpfree.document.charts import escape, number
from bpfree.document.content import Panel

__all__ = ["Box", "Drawing", "Label", "confusion_panel", "drawn"]

WITH_COUNTS = 12
"""Most classes with numbers in their cells."""
SIZES = ((12, 44, 11.5), (25, 28, 11.0), (50, 17, 10.0), (10**9, 10, 8.5))
"""Most classes, size of a cell and size of names, in pixels."""
LONGEST = 22
"""Letters of a name that are shown."""
LETTER = 0.58
"""Width of a letter as a share of its size."""
GAP, MARGIN, TITLE = 6, 8, 20

Tone = Literal["none", "right", "wrong"]


@dataclass(frozen=True)
class Box:
    """A cell: its place, size, colour and how opaque it is, and what the pointer shows."""

    x: float
    y: float
    size: float
    tone: Tone
    opacity: float
    title: str


@dataclass(frozen=True)
class Label:
    """A text: its anchor point, size, side of the anchor (``start``, ``middle``, ``end``), and whether it runs upwards."""

    x: float
    y: float
    text: str
    size: float
    anchor: Literal["start", "middle", "end"]
    upwards: bool = False
    soft: bool = False


@dataclass(frozen=True)
class Drawing:
    """Boxes and labels, with the size of the whole."""

    width: int
    height: int
    boxes: Sequence[Box]
    labels: Sequence[Label]


def drawn(names: Sequence[str], counts: Sequence[Sequence[float]]) -> Drawing:
    """Lay out a matrix of counts, a row for each true class.

    Args:
        names: of the classes.
        counts: of examples; rows are true classes, columns predicted ones.
    """
    _, cell, size = next(entry for entry in SIZES if len(names) <= entry[0])
    shown = [name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…" for name in names]
    letters = max(map(len, shown), default=1)
    turned = letters * LETTER * size > cell - 4
    wide = letters * LETTER * size + GAP
    left, top = MARGIN + TITLE + wide, MARGIN + TITLE + (wide if turned else size + GAP)
    side, counted = cell * len(names), len(names) <= WITH_COUNTS
    boxes: list[Box] = []
    labels = [
        Label(left + side / 2, MARGIN + 12, "predicted", 12, "middle", soft=True),
        Label(MARGIN + 12, top + side / 2, "true", 12, "middle", upwards=True, soft=True),
    ]
    for i, row in enumerate(counts):
        total, middle = sum(row), top + (i + 0.5) * cell
        labels.append(Label(left - GAP, middle + size * 0.36, shown[i], size, "end"))
        across = left + (i + 0.5) * cell
        labels.append(
            Label(across + size * 0.36, top - GAP, shown[i], size, "start", upwards=True)
            if turned
            else Label(across, top - GAP, shown[i], size, "middle")
        )
        for j, count in enumerate(row):
            share = count / total if total else 0.0
            tone: Tone = "none" if not count else "right" if i == j else "wrong"
            x, y = left + j * cell, top + i * cell
            title, opacity = _title(names[i], names[j], count, total), _opacity(share, counted=counted)
            boxes.append(Box(x, y, cell - (2 if cell > 12 else 1), tone, opacity, title))
            if count and counted:
                labels.append(Label(x + cell / 2 - 1, y + cell / 2 + 3, text_of(count), size, "middle"))
    return Drawing(round(left + side + MARGIN), round(top + side + MARGIN), boxes, labels)


def text_of(count: float) -> str:
    """Write a count, which is a mean where a rule draws several times."""
    return f"{count:.0f}" if float(count).is_integer() else f"{count:.1f}"


def _title(true: str, predicted: str, count: float, total: float) -> str:
    share = f"{text_of(count)} of {text_of(total)} ({100 * count / total:.1f} %)" if total else "none"
    return f"{true}: {share} right" if true == predicted else f"{true} taken for {predicted}: {share}"


def confusion_panel(names: Sequence[str], counts: Sequence[Sequence[float]]) -> Panel:
    """Draw the matrix of :func:`drawn` as a panel; an empty cell of many is not drawn."""
    found = drawn(names, counts)
    every = len(names) <= SIZES[1][0]
    parts = [_box(box) for box in found.boxes if every or box.tone != "none"]
    if not every:
        first, last = found.boxes[0], found.boxes[-1]
        side = f'width="{number(last.x + last.size - first.x)}" height="{number(last.y + last.size - first.y)}"'
        parts.insert(0, f'<rect class="none" x="{number(first.x)}" y="{number(first.y)}" {side}/>')
    parts += [_label(label) for label in found.labels]
    return Panel(found.width, found.height, f"confusion matrix of {len(names)} classes", "".join(parts))


def _opacity(share: float, *, counted: bool) -> float:
    """Return how opaque a cell is: never so little that it is not seen, nor so much that its number is not read."""
    return 0.12 + 0.53 * share if counted else 0.25 + 0.75 * math.sqrt(share)


def _box(box: Box) -> str:
    place = f'x="{number(box.x)}" y="{number(box.y)}" width="{number(box.size)}" height="{number(box.size)}"'
    title = f"<title>{escape(box.title)}</title>"
    if box.tone == "none":
        return f'<rect class="none" {place}>{title}</rect>'
    colour = "c0" if box.tone == "right" else "c1"
    return f'<g class="{colour}"><rect class="dot" {place} fill-opacity="{box.opacity:.3f}">{title}</rect></g>'


def _label(label: Label) -> str:
    turn = f' transform="rotate(-90 {number(label.x)} {number(label.y)})"' if label.upwards else ""
    kind = "name" if label.soft else "item"
    place = f'x="{number(label.x)}" y="{number(label.y)}" text-anchor="{label.anchor}"'
    return f'<text class="{kind}" {place} style="font-size:{number(label.size)}px"{turn}>{escape(label.text)}</text>'
