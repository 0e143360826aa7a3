"""Convert a document to a page: one self-contained HTML file that opens offline."""

from __future__ import annotations

from collections.abc import Sequence

from bpfree.document.charts import escape, look, marker, swatch
from bpfree.document.content import Aside, Bullets, Cell, Code, Figure, Folded, Key, Noted, Panel, Part, Picture, Section, Table, Text
from bpfree.document.data import figure_csv
from bpfree.document.style import PAGE_STYLE, SCRIPT

__all__ = ["html_page", "html_parts"]

LONG, LONG_LABEL = 40, 30
"""Lengths in characters above which a cell of words is wide, and a row's label wraps."""
LONG_NOTE = 360
"""Length in characters above which small print is set in columns."""
FEW = 8
"""Number of items above which the panels of a figure are larger, and its legend has buttons that show and hide all."""


def html_page(title: str, sections: Sequence[Section]) -> str:
    """Write a document as an HTML page.

    Args:
        title: of the document.
        sections: a first one without a title is the head, before the table of contents.
    """
    head, *others = sections
    body = "".join(_section(section, number) for number, section in enumerate(others))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{PAGE_STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<header>{"".join(map(_part, head.parts))}</header>
{_contents(others)}
{body}<script>{SCRIPT}</script></body></html>
"""


def html_parts(parts: Sequence[Part]) -> str:
    """Write parts as HTML; its classes need the style of a page or a view."""
    return "".join(map(_part, parts))


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
            return _figure(part)
        case Bullets():
            return f'<ul class="said">{"".join(f"<li>{_words(item)}</li>" for item in part.items)}</ul>\n'
        case Code():
            lines = "\n".join(map(escape, part.lines))
            return f"<pre>{lines}</pre>\n"
        case Folded():
            return f"<details><summary>{escape(part.summary)}</summary>{''.join(map(_part, part.parts))}</details>\n"
        case Aside():
            return f"<aside>{''.join(map(_part, part.parts))}</aside>\n"


def _figure(figure: Figure) -> str:
    many = len(figure.keys) > FEW
    kind = ' class="many"' if many else ""
    panels = "".join(_panel(panel, 1.8 if many else 1.35) for panel in figure.panels)
    caption = f"<figcaption>{_words(figure.caption)}</figcaption>" if figure.caption else ""
    return f'<figure{kind}>{_legend(figure.keys)}<div class="panels">{panels}</div>{caption}{_data(figure)}</figure>\n'


def _data(figure: Figure) -> str:
    text = figure_csv(figure)
    return f'<details class="data"><summary>Data of this figure</summary><pre>{escape(text)}</pre></details>' if text else ""


def _panel(panel: Panel, most: float) -> str:
    """Embed a panel that fills its place, up to ``most`` times its size, with letters of about equal size in all panels."""
    box = f'viewBox="0 0 {panel.width} {panel.height}" style="max-width:{most * panel.width:g}px"'
    return f'<svg class="panel" {box} role="img" aria-label="{escape(panel.label)}">{panel.body}</svg>'


def _legend(keys: Sequence[Key]) -> str:
    """List the lines and markers of a legend, whose items the script turns into switches that hide rows."""
    items = (
        f'<li data-row="{key.style}"{_faint(key)}><svg class="key" viewBox="0 0 28 12" width="28" height="12" aria-hidden="true">'
        f"{swatch(key, 1, 6)}</svg><span>{escape(key.label)}</span></li>"
        for key in keys
    )
    return f'<ul class="legend">{"".join(items)}</ul>' if keys else ""


def _faint(key: Key) -> str:
    return ' class="faint"' if key.faint else ""


def _text(part: Text) -> str:
    kind = f"{part.kind} long" if part.kind == "note" and len(part.text) > LONG_NOTE else part.kind
    attribute = f' class="{kind}"' if kind else ""
    return f"<p{attribute}>{_words(part.text)}</p>\n" if part.text else ""


def _words(text: str) -> str:
    return escape(text.replace(" +- ", " ± "))


# --- tables -------------------------------------------------------------------------------------------------------------


def _table(table: Table) -> str:
    head = "".join(_head(cell, place in table.words) for place, cell in enumerate(table.headers))
    head = f"<thead><tr>{head}</tr></thead>\n" if head else ""
    rows = "".join(_row(table, number) for number in range(len(table.rows)))
    said = f' aria-label="{escape(table.name)}"' if table.name else ""
    facts = not head or any(isinstance(cell, Noted) for row in table.rows for cell in row)
    kind = ' class="facts"' if facts else ""
    return f'<div class="scroll" tabindex="0" role="region"{said}><table{kind}>{head}<tbody>{rows}</tbody></table></div>\n'


def _head(cell: str | Picture, words: bool) -> str:
    return f"<th{_kind(words)}>{cell.svg if isinstance(cell, Picture) else _words(cell)}</th>"


def _row(table: Table, number: int) -> str:
    cells = []
    for place, cell in enumerate(table.rows[number]):
        words = place in table.words
        key = _key(table.styles[number]) if place == 0 and table.styles else ""
        tint = table.tints[number][place] if table.tints else None
        length = max(map(len, _lines(cell)))
        long = length > (LONG_LABEL if place == 0 else LONG) and (words or place == 0)
        cells.append(f"<td{_kind(words, long=long, tint=tint)}>{key}{_inside(cell)}</td>")
    return f"<tr>{''.join(cells)}</tr>\n"


def _lines(cell: Cell) -> Sequence[str]:
    return (cell.text, *cell.notes) if isinstance(cell, Noted) else ("" if isinstance(cell, Picture) else cell,)


def _inside(cell: Cell) -> str:
    if isinstance(cell, Picture):
        return cell.svg
    if isinstance(cell, str):
        return _words(cell)
    text = f'<span class="{cell.kind}">{_words(cell.text)}</span>' if cell.kind else _words(cell.text)
    return text + "".join(f'<p class="note">{_words(note)}</p>' for note in cell.notes)


def _kind(words: bool, *, long: bool = False, tint: float | None = None) -> str:
    """Return the attributes of a cell: words are aligned to the left; a tint is blue above one half and orange below."""
    if tint is not None:
        return f' class="{"up" if tint >= 0.5 else "down"}" style="--t:{abs(2 * tint - 1):.2f}"'
    kinds = [*(["words"] if words else []), *(["long"] if long else [])]
    return f' class="{" ".join(kinds)}"' if kinds else ""


def _key(style: int) -> str:
    """Draw a row's colour and marker, for the place before its label."""
    return (
        f'<svg class="key" viewBox="0 0 12 12" width="12" height="12" aria-hidden="true"><g {look(Key(style, ""))}>'
        f'<g class="dot">{marker(style, 6, 6, 4)}</g></g></svg>'
    )
