"""Each cell's numbers as CSV: one line per cell, whatever became of it."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Sequence

from bpfree.study.line import Line
from bpfree.study.state import Outcome

__all__ = ["results_csv"]

HEADERS = ("row", "column", "seed", "status", "reason", "parallel", "run", "settings")


def results_csv(lines: Sequence[Line]) -> str:
    """All results under the union of their names; what a cell did not measure is empty. Shares and losses as they were measured."""
    keys = sorted({key for line in lines for outcome in line.outcomes if outcome is not None for key in outcome.result})
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*HEADERS, *keys])
    for line in lines:
        for cell, outcome in zip(line.cells, line.outcomes, strict=True):
            words = shlex.join(word for word in cell.words if not word.startswith(("output=", "seed=")))
            writer.writerow([line.row.label, line.column, cell.seed, *_standing(outcome), words, *_numbers(outcome, keys)])
    return buffer.getvalue()


def _standing(outcome: Outcome | None) -> list[str]:
    if outcome is None:
        return ["not run", "", "", ""]
    return [outcome.status, " ".join(outcome.reason.split()), f"{outcome.parallel}", outcome.run]


def _numbers(outcome: Outcome | None, keys: Sequence[str]) -> list[str]:
    known = {} if outcome is None else outcome.result
    return [repr(float(known[key])) if key in known else "" for key in keys]
