"""Format tables as lines of text for a terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from itertools import chain

__all__ = ["markdown_table", "text_pairs", "text_table"]

GAP = "  "


def text_table(headers: Sequence[object], rows: Iterable[Sequence[object]], right: Container[int] = ()) -> list[str]:
    """Return the lines of a table with a rule below its head; columns in ``right`` are aligned to the right."""
    texts = [[str(cell) for cell in row] for row in chain([headers], rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    texts.insert(1, ["-" * width for width in widths])
    return [_line(row, widths, right) for row in texts]


def text_pairs(pairs: Iterable[tuple[str, object]]) -> list[str]:
    """Return lines of names and values, without those whose value is empty; a value may have several lines."""
    lines = [(name if number == 0 else "", line) for name, value in pairs for number, line in enumerate(str(value).splitlines())]
    width = max((len(name) for name, _ in lines), default=0)
    return [_line(pair, (width, 0), ()) for pair in lines]


def _line(cells: Sequence[str], widths: Sequence[int], right: Container[int]) -> str:
    sized = enumerate(zip(cells, widths, strict=True))
    padded = [cell.rjust(width) if place in right else cell.ljust(width) for place, (cell, width) in sized]
    return GAP.join(padded).rstrip()


def markdown_table(headers: Sequence[object], rows: Iterable[Sequence[object]], right: Container[int] = ()) -> str:
    """Return a table in GitHub's dialect; columns in ``right`` are aligned to the right. Cells may hold markup; each is put on one line."""
    rules = ["---:" if place in right else "---" for place in range(len(headers))]
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in chain([headers, rules], rows))


def _cell(cell: object) -> str:
    return " ".join(str(cell).split()).replace("|", "\\|")
