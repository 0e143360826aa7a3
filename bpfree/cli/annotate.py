"""Comment a printed configuration with the meaning of each key."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bpfree.options import bounded_help

if TYPE_CHECKING:
    from bpfree.recipe import Recipe

__all__ = ["annotate"]


def annotate(recipe: Recipe) -> str:
    """Write the recipe as YAML with each key's meaning as a comment."""
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
        lines.append(f"{line.ljust(36)}  # {meaning}" if meaning else line)
    return "\n".join(lines) + "\n"


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
