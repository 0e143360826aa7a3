"""Shell completion of the names of installed rules, networks, tasks and so on."""

from __future__ import annotations

from collections.abc import Callable

import click
from click.shell_completion import CompletionItem

__all__ = ["names_of", "setting"]

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]
SECTIONS = {"rule": "rules", "network": "networks", "program": "programs", "task": "tasks"}


def names_of(kind: str) -> Complete:
    """Complete the names of a kind, with their summaries."""
    return lambda context, parameter, incomplete: _items(kind, "", incomplete)


def setting(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the name behind ``rule=``, ``network=`` or ``task=``; bash treats it as a separate word."""
    section, sign, name = incomplete.partition("=")
    if sign:
        return _items(SECTIONS[section], f"{section}=", name) if section in SECTIONS else []
    return [CompletionItem(f"{each}=") for each in SECTIONS if each.startswith(incomplete)]


def _items(kind: str, before: str, incomplete: str) -> list[CompletionItem]:
    from bpfree.plugins import plugin_index

    found = plugin_index().summaries[kind]
    return [CompletionItem(f"{before}{name}", help=summary) for name, _, summary in found if name.startswith(incomplete)]
