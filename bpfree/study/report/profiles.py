"""Sections on several tasks together: performance profiles and the probability of improvement.

They need rows with at least five finished seeds in each of at least three columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from bpfree.document.axes import linear
from bpfree.document.charts import Series, panel
from bpfree.document.content import Figure, Part, Section, Table, Text
from bpfree.study.report.targets import ended, times
from bpfree.study.report.view import WAITED, View
from bpfree.study.rows import TableRow
from bpfree.study.statistics import median_with_misses, performance_profile, probability_of_improvement, profile_integral, score_profile

__all__ = ["across_columns", "why_not"]

COLUMNS, SEEDS = 3, 5
LIMIT = 4.0
"""Largest ratio to the fastest row that a profile covers, as in AlgoPerf."""

Grid = list[list[TableRow]]
"""Each row of the study, with its table row in every column."""


def across_columns(view: View) -> Iterator[Section]:
    """Make the section of profiles and probabilities, if there are enough rows, columns and seeds."""
    grid = _grid(view)
    if len(grid) < 2:
        return
    parts: list[Part] = []
    timed = _timed(view, grid)
    parts.extend(timed or _scored(view, grid))
    parts.extend(_improvements(view, grid))
    compared = {rows[0].written.label for rows in grid}
    left = [written.label for written in view.plan.study.rows if written.label not in compared]
    if left:
        parts.append(Text(f"Left out (fewer than {SEEDS} finished seeds in some column): {', '.join(left)}.", "note"))
    yield Section("Across columns", parts)


def why_not(view: View) -> str:
    """Explain why a study of several columns has too few results for this section; empty for other studies."""
    if len(view.columns) < 2 or len(_grid(view)) >= 2:
        return ""
    return (
        f"Performance profiles and probabilities of improvement need rows with {SEEDS} finished seeds in each of {COLUMNS} columns or "
        "more, and two such rows."
    )


def _grid(view: View) -> Grid:
    """Select the rows with enough seeds in every column; none if the study has too few such rows or columns."""
    if len(view.columns) < COLUMNS:
        return []
    by_row = [[row for row in view.rows if row.written is written] for written in view.plan.study.rows]
    return [rows for rows in by_row if len(rows) == len(view.columns) and all(len(_finite(view, row)) >= SEEDS for row in rows)]


def _finite(view: View, row: TableRow) -> list[float]:
    return [score for score in view.scores(row) if math.isfinite(score)]


# --- profiles -----------------------------------------------------------------------------------------------------------


def _timed(view: View, grid: Grid) -> list[Part]:
    """Plot performance profiles over the time to the target, if every column has a target."""
    if not all(view.plan.study.targets.get(column) is not None for column in view.columns):
        return []
    shared = not all(record.comparable for rows in grid for row in rows for record in ended(row))
    key, name = ("samples", "examples drawn") if shared else ("seconds", "seconds")
    table = [[median_with_misses(times(view, row, key)) for row in rows] for rows in grid]
    table = [[math.inf if math.isnan(value) or value <= 0 else value for value in row] for row in table]
    if not any(math.isfinite(value) for row in table for value in row):
        return []
    taus = [1 + i * (LIMIT - 1) / 119 for i in range(120)]
    profile, integral = performance_profile(table, taus), profile_integral(table)
    series = [Series(view.key(rows[0]), list(zip(taus, shares.tolist(), strict=True))) for rows, shares in zip(grid, profile, strict=True)]
    title = "columns solved within tau times the least time"
    drawn = panel(title, linear([1, LIMIT], "tau", pad=0), linear([0, 1], "share of columns", pad=0.02), series)
    caption = (
        f"Performance profile (Dolan and Moré 2002): the share of columns on which a row's median time to target, in {name}, is at most "
        "tau times that of the fastest row there. Misses are infinite."
    )
    if shared:
        caption += f" Examples drawn are used instead of seconds, which cannot be compared for some cells: {WAITED}."
    order = sorted(range(len(grid)), key=lambda place: -integral[place])
    cells = [[view.label(grid[place][0]), f"{integral[place]:.3f}"] for place in order]
    score = Table(
        ["row", "integral of the profile, 0 to 1"], cells, name="Integrals", styles=[view.style(grid[place][0]) for place in order]
    )
    return [Figure([drawn], caption, [one.key for one in series]), score]


def _scored(view: View, grid: Grid) -> list[Part]:
    """Plot score distributions, scaled on each column from its worst run to its best."""
    sign = 1 if view.greater else -1
    scores = [[[sign * score for score in _finite(view, row)] for row in rows] for rows in grid]
    for place in range(len(view.columns)):
        values = [score for rows in scores for score in rows[place]]
        low, wide = min(values), max(values) - min(values) or 1.0
        for rows in scores:
            rows[place] = [(score - low) / wide for score in rows[place]]
    taus = np.linspace(0, 1, 120).tolist()
    series = [
        Series(view.key(rows[0]), list(zip(taus, score_profile(own, taus).tolist(), strict=True)))
        for rows, own in zip(grid, scores, strict=True)
    ]
    drawn = panel(
        "share of runs with a scaled score above tau", linear([0, 1], "tau", pad=0), linear([0, 1], "share of runs", pad=0.02), series
    )
    caption = (
        "Score distributions (Agarwal et al. 2021): the share of runs with a score above tau, averaged over columns; the scores of each "
        "column are scaled from its worst run (0) to its best (1). Higher is better."
    )
    return [Figure([drawn], caption, [one.key for one in series])]


# --- probability of improvement -------------------------------------------------------------------------------------------


def _improvements(view: View, grid: Grid) -> list[Part]:
    sign = 1 if view.greater else -1
    scores = [[[sign * score for score in _finite(view, row)] for row in rows] for rows in grid]
    order = sorted(range(len(grid)), key=lambda place: -_mean_probability(scores, place))
    labels = [view.label(grid[place][0]) for place in order]
    table: list[list[str]] = []
    tints: list[list[float | None]] = []
    for i in order:
        found = [None if i == j else probability_of_improvement(scores[i], scores[j]) for j in order]
        table.append(
            [view.label(grid[i][0])]
            + ["" if one is None else f"{one.probability:.2f} ({one.interval.low:.2f} to {one.interval.high:.2f})" for one in found]
        )
        tints.append([None, *(None if one is None else one.probability for one in found)])
    text = Text(
        "Probability of improvement: that a run of the row (left) scores better than a run of the one above, averaged over columns; ties "
        "count one half (Agarwal et al. 2021). In brackets: 95 % interval of a bootstrap over the runs within each column. It says how "
        "often, not by how much.",
        "note",
    )
    return [
        Table(
            ["better than", *labels], table, name="Probability of improvement", styles=[view.style(grid[i][0]) for i in order], tints=tints
        ),
        text,
    ]


def _mean_probability(scores: Sequence[Sequence[Sequence[float]]], place: int) -> float:
    others = [probability_of_improvement(scores[place], other, resamples=1).probability for i, other in enumerate(scores) if i != place]
    return sum(others) / len(others)
