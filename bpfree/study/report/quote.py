"""The first paragraph of a report, to be quoted in a message or paper, and the facts at a glance beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from bpfree.document.content import Aside, Table
from bpfree.study.report.remarks import budget_text, compared, counted_noun, data_text, findings, software, without_shorter
from bpfree.study.report.view import View

__all__ = ["glance", "quotable"]

MOST_QUOTED = 4
"""Number of findings above which they are a list of their own."""


def quotable(view: View) -> tuple[str, list[str]]:
    """Tell what was compared, what came out, and by what it was measured, in a paragraph that stands alone.

    Returns:
        The paragraph, and the findings for which it has no room.
    """
    found = list(findings(view))
    room = len(found) <= MOST_QUOTED
    made = software(view.rows)
    parts = [
        compared(view),
        *(found if room else []),
        *(_intervals(view) if room and found else []),
        f"Measured with {made}." if made else "",
    ]
    return " ".join(filter(None, parts)), [] if room else found


def _intervals(view: View) -> Iterator[str]:
    """State the intervals of the best two rows, and scores and intervals of the controls, of a study of one column."""
    if len(view.columns) != 1:
        return
    rows = [row for row in view.ranked(view.columns[0]) if (mean := view.mean(row)) is not None and math.isfinite(mean)]
    told = [row for place, row in enumerate(rows) if place < 2 or row.written.label in view.plan.study.controls]
    known = [(row, view.mean(row), view.interval(row)) for row in told]
    text = view.measure.text
    texts = [f"{row.written.label} {text(mean)} ({text(each.low)} to {text(each.high)})" for row, mean, each in known if mean and each]
    if texts:
        over = "seeds and new examples" if any(view.over_examples(row) for row in told) else "seeds"
        yield f"Means with 95 % intervals over {over}: {', '.join(texts)}."


# --- at a glance ----------------------------------------------------------------------------------------------------------


def glance(view: View) -> Aside:
    """List data, rows, seeds, budget, progress, and versions."""
    return Aside([Table([], list(_facts(view)), [1], "At a glance")])


def _facts(view: View) -> Iterator[list[str]]:
    rows = view.rows
    yield ["data", "; ".join(without_shorter(map(data_text, rows)))]
    yield ["rows", f"{len({row.written.label for row in rows})}" + (f" in {len(view.columns)} columns" if len(view.columns) > 1 else "")]
    yield ["seeds", ", ".join(map(str, view.plan.seeds))]
    budgets = list(dict.fromkeys(budget_text(row) for row in rows if not row.cells[0].recipe.is_program))
    if budgets:
        yield ["budget", budgets[0] if len(budgets) == 1 else f"{len(budgets)} different ones"]
    finished, cells = sum(len(row.finished) for row in rows), sum(len(row.cells) for row in rows)
    trials = sum(trial.status != "not run" for row in rows if row.tuned is not None for trial in row.tuned.trials)
    yield ["cells", f"{finished} of {cells} finished" + (f", after {counted_noun(trials, 'tuning trial')}" if trials else "")]
    if made := software(rows):
        yield ["software", made]
