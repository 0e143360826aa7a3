"""Show the progress of a study: a line for each cell that has ended, and the estimated time of the rest; in place in a notebook."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from bpfree.document.terminal import duration, fitted, width_of
from bpfree.study.rows import Cell
from bpfree.study.store import CellRecord
from bpfree.tracking.notebook import Place, in_notebook, output
from bpfree.tracking.progress import print_line

__all__ = ["StudyProgress"]

SILENCE = 60.0
"""Seconds between lines that list the running cells."""
MOST_LINES = 12
"""Of a notebook's output."""


class StudyProgress:
    """Shows running and ended cells on standard error, or in an output of a notebook.

    Args:
        name: of the study.
        count: its cells.
        left: those that are to be run.
        quiet: show only failures.
    """

    def __init__(self, name: str, count: int, left: int, *, quiet: bool) -> None:
        self._name, self._lines = name, list[str]()
        self._place = Place() if in_notebook() else None
        self._count, self._left, self._first, self._quiet = count, left, left, quiet
        self._since = time.monotonic()
        self._elsewhere: set[str] = set()
        self._workers, self._said = 1, time.monotonic()

    def of(self, workers: int) -> StudyProgress:
        """Start the display for a number of workers."""
        self._workers = workers
        if workers > 1:
            self.say(f"{workers} workers")
        return self

    def started(self, cell: Cell, before: CellRecord | None) -> None:
        """Report a cell that resumes an interrupted run."""
        if before is not None and before.run and not before.is_final and before.status != "running":  # another process runs it
            self.say(f"{cell.key.label}: resumes {before.run}")

    def waiting(self, cells: Sequence[Cell], epoch: Callable[[Cell], str]) -> None:
        """Print from time to time a line with the running cells, if there are several; a single cell shows its own progress."""
        if self._workers > 1 and time.monotonic() - self._said > SILENCE:
            far = ((cell.key.label, epoch(cell)) for cell in cells)
            self.say("running: " + ", ".join(f"{label} (epoch {share})" if share else label for label, share in far))

    def ended(self, cell: Cell, record: CellRecord | None, left: int) -> None:
        """Print a line for an ended cell, with its result and the time left."""
        self._left = left
        if record is None:
            if cell.key.id not in self._elsewhere:
                self.say(f"{cell.key.label}: another process runs it")
            self._elsewhere.add(cell.key.id)
            return
        if record.status == "paused":  # a paused trial, which usually resumes at once
            self.say(f"{cell.key.label}: {record.reason}, waits for a comparison with other trials")
        elif record.status != "finished":
            self._show(f"{cell.key.label}: {record.status}: {record.reason}")
        elif not self._quiet:
            self._show(f"{cell.key.label}: {_score(record)}, {duration(record.elapsed)}{self._rest()}")

    def _show(self, text: str) -> None:
        width = len(str(self._count))
        self._echo(f"[{self._count - self._left:{width}}/{self._count}] {text}")

    def _rest(self) -> str:
        done = self._first - self._left
        if not self._left or done < 1:
            return ""
        seconds = (time.monotonic() - self._since) / done * self._left
        return f"   (about {duration(seconds)} left)"

    def say(self, text: str) -> None:
        """Print any other message."""
        if not self._quiet:
            self._echo(text)

    def _echo(self, text: str) -> None:
        self._said = time.monotonic()
        if self._place is None:
            stream = output()
            print_line(stream, fitted(text, width_of(stream)))
            return
        self._lines.append(text)
        done = self._count - self._left
        share = done / self._count if self._left else None
        self._place.show(self._name, [f"{done} of {self._count} cells"], share, self._lines[-MOST_LINES:], last=True)


def _score(record: CellRecord) -> str:
    run = record.seen()
    found = ((split, run.scores(split)) for split in ("test", "val"))
    split, scores = next(((split, scores) for split, scores in found if scores), ("", []))
    return ", ".join(f"{split} {metric.name.replace('_', ' ')} {metric.text(value)}" for metric, value in scores) or "finished"
