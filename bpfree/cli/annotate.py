"""Comment a printed configuration with the meaning of each key."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bpfree.document.terminal import LEAST
from bpfree.options import bounded_help

if TYPE_CHECKING:
    from bpfree.recipe import Recipe

__all__ = ["annotate"]


COMMENTS = 36
"""Column of the comments."""


def annotate(recipe: Recipe, width: int | None = None) -> str:
    """Write the recipe as YAML with each key's meaning as a comment, which wraps to a width if one is given."""
    column = COMMENTS if width is None else min(COMMENTS, width // 2)
    meanings = dict(_meanings(recipe))
    path: list[str] = []
    lines = []
    for line in recipe.to_yaml().splitlines():
        key = line.strip().split(":", 1)[0]
        if line.lstrip().startswith("-"):
            lines.append(line)
            continue
        path = [*path[: (len(line) - len(line.lstrip())) // 2], key]
        meaning = meanings.get(".".join(path))
        lines += _commented(line, meaning, column, width) if meaning else [line]
    return "\n".join(lines) + "\n"


def _commented(line: str, meaning: str, column: int, width: int | None) -> list[str]:
    parts = [meaning] if width is None else textwrap.wrap(meaning, max(LEAST, width - column - 4), break_on_hyphens=False)
    starts = [line.ljust(column), *(" " * column for _ in parts[1:])]
    if width is not None and len(line) > column and len(line) + 4 + len(parts[0]) > width:
        parts, starts = ["", *parts], [line, *(" " * column for _ in parts)]
    return [f"{start}  # {part}" if part else start for start, part in zip(starts, parts, strict=True)]


def _meanings(recipe: Recipe) -> Iterator[tuple[str, str]]:
    for kind, options in recipe.options.items():
        yield f"{kind}.name", f"bpfree {kind}s lists them"
        yield from _fields(options, f"{kind}.")
    yield from _fields(recipe.task, "task.")
    yield from _fields(recipe.settings, "")


def _fields(config: Any, prefix: str) -> Iterator[tuple[str, str]]:
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        yield f"{prefix}{item.name}", bounded_help(item)
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{prefix}{item.name}.")
