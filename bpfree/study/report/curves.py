"""Sections with learning curves, and scores against time and memory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence

from bpfree.document.axes import Axis, fitting, linear, logarithmic
from bpfree.document.charts import Mark, Series, panel
from bpfree.document.content import Figure, Key, Section, Text
from bpfree.document.strips import near_the_best
from bpfree.study.measures import Measure
from bpfree.study.report.view import WAITED, View, timed, untimed
from bpfree.study.rows import TableRow
from bpfree.study.store import CellRecord

__all__ = ["costs", "learning_curves"]

AGAINST = (("epoch", "epochs"), ("samples", "examples drawn"), ("seconds", "seconds of training"))
NOT_TIMED = f"Plots over seconds leave out cells whose seconds cannot be compared: {WAITED}."

Curve = list[tuple[float, float, float, float]]
"""Points of mean x, mean y, least y and greatest y."""


def learning_curves(view: View) -> Iterator[Section]:
    """Plot the primary metric on validation (or the loss) over epochs, examples and seconds, for each column."""
    notes = [Text(NOT_TIMED, "note")] if untimed(view.rows) else []
    return view.by_column("Learning curves", lambda column: _figure(view, column), *notes)


def _figure(view: View, column: str) -> Iterator[Figure]:
    rows = view.of(column)
    measure = view.validation(rows)
    if measure is None:
        return
    name = f"validation {measure.metric.label}"
    target = view.plan.study.targets.get(column)
    drawn = [row for row in rows if any(_chosen(row, key) for key, _ in AGAINST)]
    panels = []
    for key, label in AGAINST:
        curves = {number: curve for number, row in enumerate(rows) if (curve := _curve(_chosen(row, key), key, measure))}
        if not curves:
            continue
        x = _x_axis(key, label, curves.values())
        values = [value for curve in curves.values() for point in curve for value in point[2:]]
        y = linear(values, name, bounds=measure.bounds) if measure.metric.share else fitting(values, name)
        series = [_series(view.key(rows[number], drawn), rows[number], curve) for number, curve in curves.items()]
        rules = [(target, "target")] if target is not None and y.low <= target <= y.high else []
        panels.append(panel(f"{name}, over {label}", x, y, series, rules=rules))
    if not panels:
        return
    caption = "Mean over seeds; the band goes from the least to the greatest value, up to the last epoch that all seeds reached."
    yield Figure(panels, caption + view.background(drawn), view.keys(drawn))


def _chosen(row: TableRow, key: str) -> list[CellRecord]:
    return timed(row) if key == "seconds" else row.finished


def _curve(records: Sequence[CellRecord], key: str, measure: Measure) -> Curve:
    """Average the curves of records, epoch by epoch, as far as all of them go; leave out runs without a curve."""
    every = [_points(record.history, key, measure) for record in records]
    made: Curve = []
    for together in zip(*(points for points in every if points), strict=False):
        values = [y for _, y in together]
        made.append((statistics.fmean(x for x, _ in together), statistics.fmean(values), min(values), max(values)))
    return made


def _points(history: Iterable[Mapping[str, float]], key: str, measure: Measure) -> list[tuple[float, float]]:
    found = ((epoch[key], value) for epoch in history if key in epoch and (value := measure.of(epoch)) is not None)
    return [(x, y) for x, y in found if math.isfinite(x) and math.isfinite(y)]


def _x_axis(key: str, label: str, curves: Iterable[Curve]) -> Axis:
    values = [point[0] for curve in curves for point in curve]
    positive = [value for value in values if value > 0]
    if key == "seconds" and positive and max(positive) > 20 * min(positive):
        return logarithmic(positive, f"{label} (logarithmic)")
    if key == "epoch":
        return linear(values, label, bounds=(0, math.inf), pad=0.02, whole=True)
    return linear([0.0, *values], label, bounds=(0, math.inf), pad=0.02)


def _series(key: Key, row: TableRow, curve: Curve) -> Series:
    band = [(x, low, high) for x, _, low, high in curve] if len(row.finished) > 1 else []
    return Series(key, [(x, y) for x, y, _, _ in curve], band)


# --- scores against costs -----------------------------------------------------------------------------------------------

COSTS = (
    ("train/seconds", "seconds of training"),
    ("train/peak_memory_mb", "peak memory, MiB"),
    ("train/forwards", "passes (forward equivalents)"),
)


def costs(view: View) -> Iterator[Section]:
    """Plot the score against seconds, memory and passes, with a point for each row."""
    notes = [Text(NOT_TIMED, "note")] if untimed(view.rows) else []
    return view.by_column("Score against cost", lambda column: _scatter(view, column), *notes)


def _scatter(view: View, column: str) -> Iterator[Figure]:
    rows = [row for row in view.of(column) if (mean := view.mean(row)) is not None and math.isfinite(mean)]
    if len(rows) < 2:
        return
    panels = []
    beyond: dict[int, str] = {}
    for key, label in COSTS:
        found = [(row, point) for row in rows if (point := _point(view, row, key, label)) is not None]
        if len(found) < 2:
            continue
        x = logarithmic([value for _, point in found for value in (point.x_range or (point.x,))], f"{label} (logarithmic)")
        heights = [value for _, point in found for value in (point.y, *(point.y_range or ()))]
        kept = near_the_best(heights, [point.y for _, point in found], greater=view.greater)
        y = linear(kept, view.measure.label, bounds=view.measure.bounds)
        beyond |= {
            view.style(row): f"{view.label(row)} ({view.measure.text(point.y)})" for row, point in found if not y.low <= point.y <= y.high
        }
        series = [Series(view.key(row, rows), points=[point]) for row, point in found]
        panels.append(panel(f"{view.measure.label}, over {label.split(' (')[0].split(',')[0]}", x, y, series))
    if not panels:
        return
    caption = "A point for each row: means over seeds; bars: 95 % interval of the score, least to greatest cost."
    caption += f" Beyond the axis, and drawn at its edge: {', '.join(beyond.values())}." if beyond else ""
    yield Figure(panels, caption + view.background(rows), view.keys(rows))


def _point(view: View, row: TableRow, key: str, label: str) -> Mark | None:
    records = timed(row) if key == "train/seconds" else row.finished
    values = [record.result[key] for record in records if record.result.get(key, 0) > 0]
    scores = view.scores(row)
    if not values:
        return None
    x, y = statistics.fmean(values), statistics.fmean(scores)
    known = view.interval(row)
    title = f"{view.label(row)}: {view.measure.text(y)} at {x:,.4g} {label.split(' (')[0]}"
    return Mark(x, y, title, (min(values), max(values)) if len(values) > 1 else None, (known.low, known.high) if known else None)
