"""Print tables and results of runs."""

from __future__ import annotations

import json
import math
import sys
import textwrap
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import click

from bpfree.document.tables import text_pairs, text_table
from bpfree.document.terminal import fitted, width_of
from bpfree.hooks import hookimpl
from bpfree.outcome import outcome
from bpfree.run import Run

__all__ = ["PlanDisplay", "exit_code", "json_option", "print_json", "print_pairs", "print_result", "print_table", "say"]


class PlanDisplay:
    """Shows a run's ``plan.txt``, if it has one, on standard error before training begins."""

    @hookimpl(tryfirst=True)
    def run_start(self, run: Run) -> None:
        """Show the plan."""
        if "plan.txt" in run.artifacts:
            click.echo(run.artifacts["plan.txt"].read_text(encoding="utf-8"), err=True)


def print_table(headers: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Container[int] = ()) -> None:
    """Print a plain table that fits the terminal; columns in ``right`` are aligned to the right, and empty ones left out."""
    listed = [list(map(str, row)) for row in rows]
    used = [place for place in range(len(headers)) if not listed or any(row[place] for row in listed)]
    lines = [[row[place] for place in used] for row in listed]
    numbers = [number for number, place in enumerate(used) if place in right]
    click.echo("\n".join(text_table([headers[place] for place in used], lines, numbers, width_of(sys.stdout))))


def print_pairs(pairs: Iterable[tuple[str, Any]]) -> None:
    """Print names and values, a line each, without those whose value is empty."""
    click.echo("\n".join(text_pairs(pairs, width_of(sys.stdout))))


def say(text: str, *, err: bool = False) -> None:
    """Print text that fits the terminal."""
    click.echo(fitted(text, width_of(sys.stderr if err else sys.stdout)), err=err)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
"""The option of every listing."""


def print_json(content: Any) -> None:
    """Print JSON, with ``null`` for numbers that JSON does not have."""
    click.echo(json.dumps(finite(content), indent=2, ensure_ascii=False, default=str))


def finite(content: Any) -> Any:
    """Replace NaN and infinite numbers by ``None``."""
    if isinstance(content, Mapping):
        return {str(key): finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def print_result(run: Run) -> None:
    """Print the outcome of a run; commands that do not fit go on behind a backslash, so that they can be copied."""
    lines, width = outcome(run), width_of(sys.stdout)
    room = None if width is None else width - 2 - max(len(name) for name, _ in lines) - len(" \\")
    print_pairs((name, _continued(text, room) if name == "next" else text) for name, text in lines)


def _continued(commands: str, room: int | None) -> str:
    if room is None:
        return commands
    wrapped = [textwrap.wrap(line, room, break_long_words=False, break_on_hyphens=False) for line in commands.splitlines()]
    return "\n".join(" \\\n".join(parts) for parts in wrapped)


def exit_code(run: Run) -> int:
    """Return the exit code of a run: 0 if it finished, 1 if it diverged."""
    return 0 if run.status == "finished" else 1
