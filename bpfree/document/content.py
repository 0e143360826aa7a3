"""The content of a document, independent of HTML and Markdown: sections of texts, tables, figures and lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = [
    "Aside",
    "Bullets",
    "Cell",
    "Code",
    "Datum",
    "Figure",
    "Folded",
    "Key",
    "Noted",
    "Panel",
    "Part",
    "Picture",
    "Section",
    "Table",
    "Text",
]


@dataclass(frozen=True)
class Text:
    """A paragraph.

    Attributes:
        kind: ``""``, ``quote`` (the paragraph to quote), ``lead``, ``changed`` (an important warning), ``note`` (small print), ``notes``
            (line breaks are kept).
    """

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Picture:
    """A cell of a table that is drawn; Markdown leaves its column out."""

    svg: str


@dataclass(frozen=True)
class Noted:
    """A cell of a table with small print below it, one line each.

    Attributes:
        kind: ``""``, ``good``, ``bad`` or ``open``, which determines the colour of the text.
    """

    text: str
    notes: Sequence[str] = ()
    kind: str = ""


Cell = str | Picture | Noted


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        headers: of the columns; empty: the table has no head.
        rows: cells, as many as headers.
        words: columns of words, aligned to the left like the first column; numbers are aligned to the right.
        name: description for readers who cannot see it.
        styles: for each row the number of its colour, if the table is the legend of a figure.
        tints: for each cell a share of colour from 0 to 1, if the table is a map.
    """

    headers: Sequence[str | Picture]
    rows: Sequence[Sequence[Cell]]
    words: Sequence[int] = ()
    name: str = ""
    styles: Sequence[int] = ()
    tints: Sequence[Sequence[float | None]] = ()


@dataclass(frozen=True)
class Key:
    """The look of an item in all charts.

    Attributes:
        style: number that determines colour, dash pattern and marker.
        label: its name in a legend.
        colour: replaces the style's colour.
        faint: whether it stays in the background, since too many items are drawn.
    """

    style: int
    label: str
    colour: str = ""
    faint: bool = False


class Datum(NamedTuple):
    """A point that a chart draws: whose, where, and the ranges of its error bars or its band."""

    name: str
    x: float
    y: float
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        width, height: of its view box.
        label: description for readers who cannot see it.
        body: SVG elements.
        title: of the chart.
        data: what it draws.
    """

    width: int
    height: int
    label: str
    body: str
    title: str = ""
    data: Sequence[Datum] = ()


@dataclass(frozen=True)
class Figure:
    """Panels side by side, with a legend.

    Attributes:
        caption: describes the panels.
        keys: of the legend.
    """

    panels: Sequence[Panel]
    caption: str = ""
    keys: Sequence[Key] = ()


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Code:
    """Lines of code or commands."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Folded:
    """Parts that the reader can unfold."""

    summary: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Aside:
    """Parts beside the text where the page is wide enough, before it otherwise."""

    parts: Sequence[Part]


Part = Text | Table | Figure | Bullets | Code | Folded | Aside


@dataclass
class Section:
    """A heading with its parts.

    Attributes:
        title: of the heading.
        parts: in their order.
        level: 2, or 3 for a subsection of the preceding section.
    """

    title: str
    parts: list[Part] = field(default_factory=list)
    level: int = 2
