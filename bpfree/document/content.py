"""What a document consists of, before it is a page or Markdown: sections of texts, tables, figures and lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Bullets", "Cell", "Code", "Figure", "Folded", "Key", "Noted", "Panel", "Part", "Picture", "Section", "Table", "Text"]


@dataclass(frozen=True)
class Text:
    """A paragraph.

    Attributes:
        kind: ``""``, ``lead``, ``changed`` (what no reader may miss), ``note`` (small print), ``notes`` (line breaks are kept).
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
        kind: ``""``, ``good``, ``bad`` or ``open``, which decides on the colour of the text.
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
        words: columns of words, which stand to the left; the first always does. Numbers stand to the right.
        name: what it shows, for those who cannot see it.
        styles: for each row the number of its colour, where the table is the key to a figure.
        tints: for each cell a share of colour from 0 to 1, where the table is a map.
    """

    headers: Sequence[str | Picture]
    rows: Sequence[Sequence[Cell]]
    words: Sequence[int] = ()
    name: str = ""
    styles: Sequence[int] = ()
    tints: Sequence[Sequence[float | None]] = ()


@dataclass(frozen=True)
class Key:
    """How something looks wherever it is drawn.

    Attributes:
        style: number that decides on colour, dash pattern and marker.
        label: its name in a legend.
        colour: instead of the style's.
    """

    style: int
    label: str
    colour: str = ""


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        width, height: of its view box.
        label: what it shows, for those who cannot see it.
        body: SVG elements.
    """

    width: int
    height: int
    label: str
    body: str


@dataclass(frozen=True)
class Figure:
    """Panels side by side, with the legend of what they show.

    Attributes:
        caption: what is drawn, and of what.
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
    """Lines to be typed."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Folded:
    """Parts that are shown when asked for."""

    summary: str
    parts: Sequence[Part]


Part = Text | Table | Figure | Bullets | Code | Folded


@dataclass
class Section:
    """A heading with what follows it.

    Attributes:
        title: of the heading.
        parts: in their order.
        level: 2, or 3 for a part of the section before.
    """

    title: str
    parts: list[Part] = field(default_factory=list)
    level: int = 2
