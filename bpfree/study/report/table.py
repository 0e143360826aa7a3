"""The table of a study in its own order: our means and deviations, and the published numbers."""

from __future__ import annotations

import math
import statistics

from bpfree.study.measures import Measure
from bpfree.study.report.view import View, aligned, counted, mean_of, spread, untimed
from bpfree.study.rows import TableRow, table_measure

__all__ = ["headers", "texts"]

COSTS = (
    ("seconds", "train/seconds"),
    ("samples/s", "train/samples_per_second"),
    ("parameters", "parameters"),
    ("trained", "parameters_trained"),
)
TIMINGS = ("train/seconds", "train/samples_per_second")
"""Headers whose values are marked if they cannot be compared."""


def headers(view: View) -> list[str]:
    """List the headers of the columns that the study needs."""
    study = view.plan.study
    beside = ["published", "difference"]
    return [
        *(["row", "column"] if view.labelled else ["row"]),
        *[_header(view.measure), *(beside if study.publishes("test") else []), "n"],
        *([_header(table_measure(study, view.rows, "train")), *beside] if study.publishes("train") else []),
        *[name for name, _ in COSTS],
    ]


def _header(measure: Measure) -> str:
    return f"{measure.name}{measure.unit}"


def texts(view: View, row: TableRow) -> list[str]:
    """Format the cells of a row."""
    study = view.plan.study
    cells = [view.label(row), *([row.column] if view.labelled else [])]
    cells += _beside(row, view.measure, published=study.publishes("test"), empty=row.status_text())
    cells.append(counted(row))
    cells += _beside(row, table_measure(study, view.rows, "train"), published=True) if study.publishes("train") else []
    for _, key in COSTS:
        mean = mean_of(row, key)
        text = "" if mean is None else _seconds(view, row) if key == "train/seconds" else f"{mean:,.0f}"
        cells.append(text + "*" if text and key in TIMINGS and untimed([row]) else text)
    return cells


def _seconds(view: View, row: TableRow) -> str:
    """Format a row's seconds with the decimals that the column needs."""
    column = aligned([mean_of(other, "train/seconds") for other in view.rows])
    place = next(number for number, other in enumerate(view.rows) if other is row)
    return column[place]


def _beside(row: TableRow, measure: Measure, *, published: bool, empty: str = "") -> list[str]:
    """Format our value and, if the table has them, the published number and the difference; blank if unknown."""
    values = list(row.by_seed(measure).values())
    measurable = len(values) > 1 and all(map(math.isfinite, values))  # the loss of a finished run can be infinite
    ours = spread(statistics.fmean(values), statistics.stdev(values) if measurable else None, measure) if values else ""
    if not published:
        return [ours or ("" if row.finished else empty)]
    theirs = row.published(measure.key)
    return [
        ours or ("" if row.finished else empty),
        spread(theirs.mean, theirs.spread, measure) if theirs else "",
        measure.signed(statistics.fmean(values) - theirs.mean) if values and theirs else "",
    ]
