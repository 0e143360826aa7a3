"""Convert a document to Markdown in GitHub's dialect, without figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bpfree.document.content import Aside, Bullets, Cell, Code, Figure, Folded, Noted, Part, Picture, Section, Table, Text
from bpfree.document.tables import markdown_table

__all__ = ["markdown"]


def markdown(title: str, sections: Sequence[Section]) -> str:
    """Convert a document to Markdown; sections with nothing but figures and their notes are left out."""
    blocks = [f"# {_plain(title)}"]
    for group in _groups(sections):
        if all(map(_is_drawn, group)):
            continue
        for section in group:
            if section is group[0] or not _is_drawn(section):
                blocks += [f"{'#' * section.level} {_plain(section.title)}"] if section.title else []
                blocks += [text for part in section.parts for text in _part(part)]
    return "\n\n".join(blocks) + "\n"


def _groups(sections: Sequence[Section]) -> list[list[Section]]:
    """Group each section with its subsections."""
    groups: list[list[Section]] = []
    for section in sections:
        if section.level > 2 and groups:
            groups[-1].append(section)
        else:
            groups.append([section])
    return groups


def _is_drawn(section: Section) -> bool:
    """Tell whether a section has nothing but figures and their notes."""
    return all(isinstance(part, Figure) or (isinstance(part, Text) and part.kind != "notes") for part in section.parts) and bool(
        section.title
    )


def _part(part: Part) -> Iterator[str]:
    match part:
        case Text(text, "changed"):
            yield f"> **{_plain(text)}**"
        case Text(text, "quote") if text:
            yield f"> {_plain(text)}"
        case Text(text) if text:
            yield _plain(text)
        case Table():
            yield _table(part)
        case Bullets(items):
            yield "\n".join(f"- {_plain(item)}" for item in items)
        case Code(lines):
            yield "\n".join(["```text", *lines, "```"])
        case Folded(summary, parts):
            yield f"{_plain(summary)}:"
            for inner in parts:
                yield from _part(inner)
        case Aside(parts):
            for inner in parts:
                yield from _part(inner)
        case _:
            return


def _table(table: Table) -> str:
    headers = table.headers or [""] * len(table.rows[0])
    kept = [place for place, header in enumerate(headers) if not isinstance(header, Picture)]
    right = [number for number, place in enumerate(kept) if place and place not in table.words]
    return markdown_table([_cell(headers[place]) for place in kept], ([_cell(row[place]) for place in kept] for row in table.rows), right)


def _cell(cell: Cell) -> str:
    if isinstance(cell, Noted):
        return "<br>".join(map(_plain, (cell.text, *cell.notes)))
    return "" if isinstance(cell, Picture) else _plain(cell)


def _plain(text: str) -> str:
    """Escape markup in a label."""
    for character in "\\`*_<[":
        text = text.replace(character, f"\\{character}")
    return text.replace(" +- ", " ± ")
