"""What a report consists of, before it is a page or Markdown: sections of texts, tables, figures and lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Bullets", "Code", "Figure", "Folded", "Part", "Picture", "Section", "Table", "Text"]


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
    """A cell of a table that is drawn; Markdown has its text."""

    svg: str
    text: str = ""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        headers: of the columns.
        rows: cells, as many as headers.
        words: columns of words, which stand to the left; the first always does. Numbers stand to the right.
        name: what it shows, for those who cannot see it.
        styles: for each row the number of its colour, where the table is the key to a figure.
        tints: for each cell a share of colour from 0 to 1, where the table is a map.
    """

    headers: Sequence[str | Picture]
    rows: Sequence[Sequence[str | Picture]]
    words: Sequence[int] = ()
    name: str = ""
    styles: Sequence[int] = ()
    tints: Sequence[Sequence[float | None]] = ()


@dataclass(frozen=True)
class Figure:
    """Panels side by side, with the legend of their rows.

    Attributes:
        panels: SVG elements.
        caption: what is drawn, and of what.
        legend: HTML, made by :func:`bpfree.study.report.svg.legend`.
    """

    panels: Sequence[str]
    caption: str
    legend: str = ""


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
