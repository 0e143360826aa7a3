"""Options and names for code in files, on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from bpfree.plugins import Plugins

__all__ = ["allow_code", "named"]

allow_code = click.option(
    "--allow-code",
    multiple=True,
    metavar="FILE",
    help="Allow the execution of this code file, if a configuration, study or run names it (repeatable).",
)


def named(kind: str, name: str, settings: Sequence[str] = (), files: Sequence[str] = ()) -> tuple[str, Plugins]:
    """Resolve a typed name, and return it with its registry; ``FILE.py:NAME`` allows the file and gets a short name.

    Args:
        kind: ``rules``, ``networks`` or ``tasks``.
        name: as typed.
        settings: other words, which allow the files that they name.
        files: additional allowed files.

    Raises:
        UsageError: the code cannot be used.
    """
    from bpfree.code_files import CodeName
    from bpfree.config import allowing
    from bpfree.leaves import Leaf, leaf_at, parse_words

    leaf = leaf_at(Leaf(kind.removesuffix("s"), name, "command line", word=True))
    registry = allowing([leaf, *parse_words(settings)], files)
    code = CodeName.parse(str(leaf.value))
    if code is None:
        return name, registry
    return code.short, registry.knowing(kind, code.short, *registry.coded(kind, code, where="command line"))
