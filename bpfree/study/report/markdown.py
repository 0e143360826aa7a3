"""A report as Markdown in GitHub's dialect: the same texts and tables, without figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bpfree.study.report.content import Bullets, Code, Figure, Folded, Part, Picture, Section, Table, Text

__all__ = ["markdown"]


def markdown(title: str, sections: Sequence[Section]) -> str:
    """The whole as one text. Sections of figures, with nothing but a few words to them, are left out."""
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
    """Each section with those that are parts of it."""
    groups: list[list[Section]] = []
    for section in sections:
        if section.level > 2 and groups:
            groups[-1].append(section)
        else:
            groups.append([section])
    return groups


def _is_drawn(section: Section) -> bool:
    """Whether nothing but figures and their small print is in it."""
    return all(isinstance(part, Figure) or (isinstance(part, Text) and part.kind != "notes") for part in section.parts) and bool(
        section.title
    )


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
