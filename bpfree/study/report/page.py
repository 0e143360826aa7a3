"""A report as a page: one self-contained HTML file that opens offline."""

from __future__ import annotations

from collections.abc import Sequence

from bpfree.study.report.content import Bullets, Code, Figure, Folded, Part, Picture, Section, Table, Text
from bpfree.study.report.style import SCRIPT, STYLE
from bpfree.study.report.svg import escape, marker, style_of

__all__ = ["html_page"]

LONG, LONG_LABEL = 40, 30
"""Characters from which a cell of words, and a row's label, may break their lines."""


def html_page(title: str, sections: Sequence[Section]) -> str:
    """The page.

    Args:
        title: of the study.
        sections: the first without a title is the head, before the contents.
    """
    head, *others = sections
    body = "".join(_section(section, number) for number, section in enumerate(others))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{escape(title)}</h1>
{"".join(map(_part, head.parts))}{_contents(others)}
{body}<script>{SCRIPT}</script></body></html>
"""


def _contents(sections: Sequence[Section]) -> str:
    links = [f'<a href="#s{number}">{escape(section.title)}</a> ' for number, section in enumerate(sections) if section.level == 2]
    return f'<nav aria-label="contents">{"".join(links)}</nav>' if len(links) > 2 else ""


def _section(section: Section, number: int) -> str:
    tag = f"h{section.level}"
    return f'<{tag} id="s{number}">{escape(section.title)}</{tag}>\n{"".join(map(_part, section.parts))}'


def _part(part: Part) -> str:
    match part:
        case Text():
            return _text(part)
        case Table():
            return _table(part)
        case Figure():
            caption = f"<figcaption>{_words(part.caption)}</figcaption>" if part.caption else ""
            return f'<figure>{part.legend}<div class="panels">{"".join(part.panels)}</div>{caption}</figure>\n'
        case Bullets():
            return f'<ul class="said">{"".join(f"<li>{_words(item)}</li>" for item in part.items)}</ul>\n'
        case Code():
            lines = "\n".join(map(escape, part.lines))
            return f"<pre>{lines}</pre>\n"
        case Folded():
            return f"<details><summary>{escape(part.summary)}</summary>{''.join(map(_part, part.parts))}</details>\n"


def _text(part: Text) -> str:
    attribute = f' class="{part.kind}"' if part.kind else ""
    return f"<p{attribute}>{_words(part.text)}</p>\n" if part.text else ""


def _words(text: str) -> str:
    return escape(text.replace(" +- ", " ± "))


# --- tables -------------------------------------------------------------------------------------------------------------


def _table(table: Table) -> str:
    head = "".join(_head(cell, place in table.words) for place, cell in enumerate(table.headers))
    rows = "".join(_row(table, number) for number in range(len(table.rows)))
    said = f' aria-label="{escape(table.name)}"' if table.name else ""
    return (
        f'<div class="scroll" tabindex="0" role="region"{said}><table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>\n'
    )


def _head(cell: str | Picture, words: bool) -> str:
    return f"<th{_kind(words)}>{cell.svg if isinstance(cell, Picture) else _words(cell)}</th>"


def _row(table: Table, number: int) -> str:
    cells = []
    for place, cell in enumerate(table.rows[number]):
        words = place in table.words
        key = _key(table.styles[number]) if place == 0 and table.styles else ""
        tint = table.tints[number][place] if table.tints else None
        if isinstance(cell, Picture):
            cells.append(f"<td{_kind(words)}>{cell.svg}</td>")
        else:
            long = len(cell) > (LONG_LABEL if place == 0 else LONG) and (words or place == 0)
            cells.append(f"<td{_kind(words, long=long, tint=tint)}>{key}{_words(cell)}</td>")
    return f"<tr>{''.join(cells)}</tr>\n"


def _kind(words: bool, *, long: bool = False, tint: float | None = None) -> str:
    """Attributes of a cell: words stand to the left; a tint is blue above one half and orange below."""
    if tint is not None:
        return f' class="{"up" if tint >= 0.5 else "down"}" style="--t:{abs(2 * tint - 1):.2f}"'
    kinds = [*(["words"] if words else []), *(["long"] if long else [])]
    return f' class="{" ".join(kinds)}"' if kinds else ""


def _key(style: int) -> str:
    """The row's colour and marker, before its label."""
    return (
        f'<svg class="key {style_of(style)}" viewBox="0 0 12 12" width="12" height="12" aria-hidden="true">'
        f'<g class="dot">{marker(style, 6, 6, 4)}</g></svg>'
    )
