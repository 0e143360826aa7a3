"""Format tables as lines of text for a terminal, and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence
from itertools import chain, zip_longest

from bpfree.document.terminal import indented

__all__ = ["markdown_table", "text_pairs", "text_table"]

GAP = "  "
WORD = re.compile(r"\S+")
PIECE = re.compile(r"[^\s/=,_.-]*[/=,_.-]|[^\s/=,_.-]+")
"""Where the name of a rule or a folder can be broken."""


def text_table(
    headers: Sequence[object], rows: Iterable[Sequence[object]], right: Container[int] = (), width: int | None = None
) -> list[str]:
    """Return the lines of a table with a rule below its head.

    Args:
        headers: of the columns.
        rows: of as many cells.
        right: numbers of the columns that are aligned to the right; below their headers, their cells are not wrapped.
        width: that all lines must have at most; ``None``: any. Cells wrap; where the columns cannot be made narrow enough, each row
            becomes a list of its headers and cells.
    """
    texts = [[str(cell) for cell in row] for row in chain([headers], rows)]
    natural = [max(map(len, column)) for column in zip(*texts, strict=True)]
    widths = natural if width is None else _fitting(texts, natural, right, width - len(GAP) * (len(natural) - 1))
    if not widths:
        cards = [text_pairs(zip(texts[0], row, strict=True), width) for row in texts[1:]]
        return [line for card in cards for line in ([""] if card is not cards[0] else []) + card] or [" ".join(texts[0])]
    texts.insert(1, ["-" * each for each in widths])
    return [line for row in texts for line in _lines(row, widths, right)]


def _fitting(texts: list[list[str]], natural: list[int], right: Container[int], room: int) -> list[int]:
    """Return widths of columns that fit into the room, the widest made narrower first; none where there is too little room."""
    if sum(natural) <= room:
        return natural
    columns = list(zip(*texts, strict=True))
    numbers = [max(map(len, column[1:]), default=0) if place in right else 0 for place, column in enumerate(columns)]
    for piece, readable in ((WORD, 20), (PIECE, 14)):  # a word is broken, after a hyphen, only where it must be
        longest = [max(len(part) for cell in column for part in (piece.findall(cell) or [""])) for column in columns]
        kept = [numbers[place] if place in right else min(size, readable) for place, size in enumerate(natural)]
        least = list(map(max, longest, kept))
        if sum(least) <= room:
            widths = list(natural)
            while sum(widths) > room:
                widest = max((place for place in range(len(widths)) if widths[place] > least[place]), key=widths.__getitem__)
                widths[widest] -= 1
            return widths
    return []


def _lines(row: Sequence[str], widths: Sequence[int], right: Container[int]) -> list[str]:
    """Write a row, in as many lines as its longest cell needs."""
    cells = [[cell] if len(cell) <= width else _wrapped(cell, width) for cell, width in zip(row, widths, strict=True)]
    return [_line(parts, widths, right) for parts in zip_longest(*cells, fillvalue="")]


def _wrapped(cell: str, width: int) -> list[str]:
    """Break a cell between words; inside a word only where that is longer than the column."""
    lines = [""]
    for word in cell.split():
        parts = [word] if len(word) <= width else PIECE.findall(word)
        parts = [part[start : start + width] for part in parts for start in range(0, len(part), width)]
        for number, part in enumerate(parts):
            gap = " " if lines[-1] and not number else ""
            if len(lines[-1]) + len(gap) + len(part) <= width:
                lines[-1] += gap + part
            else:
                lines.append(part)
    return lines


def text_pairs(pairs: Iterable[tuple[str, object]], width: int | None = None) -> list[str]:
    """Return lines of names and values, without those whose value is empty; a value may have several lines, which wrap to the width."""
    lines = [(name if number == 0 else "", line) for name, value in pairs for number, line in enumerate(str(value).splitlines())]
    names = max((len(name) for name, _ in lines), default=0)
    return [line for pair in lines for line in indented(_line(pair, (names, 0), ()), width, names + len(GAP))]


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
