"""Text that fits the width of a terminal.

The width is that of the terminal to which a stream leads. The environment variable ``COLUMNS`` goes before it. Without either, in a pipe
or a file, nothing is wrapped: a row of a table is a line, as ``grep`` and ``awk`` expect.
"""

from __future__ import annotations

import os
import re
import textwrap
from typing import TextIO

__all__ = ["duration", "fitted", "indented", "width_of"]

LEAST = 20
"""Columns below which nothing is wrapped further."""
HANGING = re.compile(r" *(?:- |(?:where|fix|known):\s+|\S+(?: \S+)*? {2,})?")
"""The part of a line below which its continuation is not written: bullets, labels, and the first column of a table."""


def width_of(stream: TextIO) -> int | None:
    """Return the number of columns for a stream; ``None``: lines of any length."""
    given = os.environ.get("COLUMNS", "")
    if given.isdecimal() and int(given):
        return max(LEAST, int(given))
    try:
        return max(LEAST, os.get_terminal_size(stream.fileno()).columns or 80) if stream.isatty() else None
    except (OSError, ValueError, AttributeError):  # a stream without a file
        return None


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it: ``4.2 s``, ``45 s``, ``3.1 min``, ``2.0 h``."""
    for unit, size in (("s", 1), ("min", 60)):
        if (amount := seconds / size) < 99.5:
            return f"{amount:.{0 if amount >= 9.95 or not amount else 1 if amount >= 0.095 else 2}f} {unit}"
    return f"{seconds / 3600:.1f} h"


def indented(text: str, width: int | None, indent: int) -> list[str]:
    """Break one line of text between words; a word that is too long, such as a path, has a line of its own and can be copied.

    Args:
        text: with what stands before it on its first line.
        width: of all lines; ``None``: any.
        indent: of the continuations; ``text`` is not broken before it.
    """
    if width is None or len(text) <= width:
        return [text]
    indent = min(indent, max(0, width - LEAST // 2))
    broken = textwrap.wrap(text[indent:], width - indent, break_long_words=False, break_on_hyphens=False)
    return [f"{text[:indent]}{broken[0]}", *(" " * indent + line for line in broken[1:])] if broken else [text]


def fitted(text: str, width: int | None) -> str:
    """Wrap the lines of a text that are too long, below what they begin with."""
    lines = []
    for line in text.splitlines():
        found, spaces = HANGING.match(line), len(line) - len(line.lstrip())
        start = found.end() if found else spaces
        lines += indented(line.rstrip(), width, start if width is None or start <= max(LEAST, width // 3) else spaces + 2)
    return "\n".join(lines)
