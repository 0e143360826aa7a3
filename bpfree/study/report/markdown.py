"""A report as Markdown in GitHub's dialect: the same texts and tables, without figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bpfree.study.report.content import Bullets, Code, Figure, Folded, Part, Picture, Section, Table, Text

__all__ = ["markdown"]


def markdown(title: str, sections: Sequence[Section]) -> str:
    """The whole as one text. A section of which only figures are left is left out."""
    blocks = [f"# {_plain(title)}"]
    for number, section in enumerate(sections):
        parts = [text for part in section.parts for text in _part(part)]
        has_more = number + 1 < len(sections) and sections[number + 1].level > section.level
        if section.title and (parts or has_more) and any(not isinstance(part, Figure) for part in section.parts):
            blocks.append(f"{'#' * section.level} {_plain(section.title)}")
        blocks += parts
    return "\n\n".join(blocks) + "\n"


def _part(part: Part) -> Iterator[str]:
    match part:
        case Text(text, "changed"):
            yield f"> **{_plain(text)}**"
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
        case _:
            return


def _table(table: Table) -> str:
    kept = [place for place, header in enumerate(table.headers) if not isinstance(header, Picture)]
    rules = ["---" if place == 0 or place in table.words else "---:" for place in kept]
    rows = [[table.headers[place] for place in kept], *([row[place] for place in kept] for row in table.rows)]
    texts = [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows]
    return "\n".join([texts[0], f"| {' | '.join(rules)} |", *texts[1:]])


def _cell(cell: str | Picture) -> str:
    text = cell.text if isinstance(cell, Picture) else cell
    return _plain(" ".join(text.split())).replace("|", "\\|")


def _plain(text: str) -> str:
    """What people write as labels is no markup."""
    for character in "\\`*_<[":
        text = text.replace(character, f"\\{character}")
    return text.replace(" +- ", " ± ")
