"""Runs of bpfree 0.1, whose weights and results can be read, but which cannot be resumed."""

from __future__ import annotations

from pathlib import Path

from bpfree.errors import UsageError

__all__ = ["is_of_version_1", "refuse_version_1"]


def is_of_version_1(folder: Path) -> bool:
    """Tell whether a run's folder is of bpfree 0.1, which kept a record of the run and no log of its events."""
    return (folder / "run.json").is_file() and not (folder / "events.jsonl").is_file()


def refuse_version_1(folder: Path, what: str) -> None:
    """Refuse to continue a run of bpfree 0.1.

    Args:
        folder: of the run.
        what: the request, such as ``resumed``.

    Raises:
        UsageError: it is one.
    """
    if is_of_version_1(folder):
        fix = "finish it with bpfree 0.1, or start a new run"
        raise UsageError(f"a run of bpfree 0.1 cannot be {what} by this version", where=str(folder), fix=fix)
