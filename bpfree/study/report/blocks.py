"""Sections on single blocks: the score of each block's own prediction, and the alignment of its credit with the gradient."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Sequence
from itertools import chain

from bpfree.document.axes import linear
from bpfree.document.charts import Mark, Series, in_order, natural, panel
from bpfree.document.content import Figure, Key, Panel, Part, Section, Text
from bpfree.study.measures import Measure
from bpfree.study.report.view import View
from bpfree.study.rows import TableRow
from bpfree.tasks.protocols import result_key

__all__ = ["blocks"]

COSINES = {"cosine": "the task's loss", "objective_cosine": "the rule's own objective"}


def blocks(view: View) -> Iterator[Section]:
    """Make a section of measurements of single blocks, if there are any."""
    return view.by_column("Block by block", lambda column: chain(_scores(view, column), _alignments(view, column)))


# --- scores -------------------------------------------------------------------------------------------------------------


def block_names(row: TableRow) -> list[str]:
    """List the blocks whose own predictions were scored on validation by the primary metric, in the order of the network.

    Names of blocks end in a number (``b1``, ``t10``); other predictions (``mean``, ``sampled``) and protocols are not blocks.
    """
    protocols = {result_key(name) for name in row.cells[0].recipe.settings.evaluation.protocols}
    keys = {key: None for record in row.finished for metrics in record.history[-1:] for key in metrics}
    names = [parts[1] for key in keys if len(parts := key.split("/")) == 3 and parts[0] == "val" and parts[2] == row.primary.name]
    return sorted((name for name in names if name not in protocols and re.search(r"\d$", name)), key=natural)


def _scores(view: View, column: str) -> Iterator[Part]:
    found = [(row, names) for row in view.of(column) if (names := block_names(row))]
    drawn = [(row, names) for row, names in found if row.primary.name == found[0][0].primary.name]
    rows = [row for row, _ in drawn]
    series = [_scored(view.key(row, rows), row, names) for row, names in drawn]
    if not series:
        return
    x = linear([1, max(len(names) for _, names in drawn)], "block, from the input", whole=True)
    heights = [value for one in series for point in one.points for value in (point.y_range or (point.y,))]
    measure = _measure(drawn[0][0])
    word, unit = measure.metric.name.replace("_", " "), f",{measure.unit}" if measure.unit else ""
    y = linear(heights, f"validation {word}{unit}", bounds=measure.bounds)
    made = panel(f"validation {word} of single blocks{unit}", x, y, series)
    whose = f"{word[0].upper()}{word[1:]} of each block's own prediction"
    caption = f"{whose} after the last epoch; mean over seeds, bars from the least to the greatest."
    yield Figure([made], caption + view.background(rows), view.keys(rows))


def _measure(row: TableRow) -> Measure:
    return Measure("val", row.primary, row.primary.name)


def _scored(key: Key, row: TableRow, names: Sequence[str]) -> Series:
    points, measure = [], _measure(row)
    for place, name in enumerate(names, start=1):
        known = [measure.of(record.history[-1], name) for record in row.finished if record.history]
        values = [value for value in known if value is not None]
        mean = statistics.fmean(values)
        bars = (min(values), max(values)) if len(values) > 1 else None
        points.append(Mark(place, mean, f"{key.label}, {name}: {measure.text(mean)}", y_range=bars))
    return Series(key, [(point.x, point.y) for point in points], points=points)


# --- alignment ----------------------------------------------------------------------------------------------------------


def _alignments(view: View, column: str) -> Iterator[Part]:
    panels, kinds = [], set()
    for row in view.of(column):
        for kind in COSINES:
            series = _cosines(row, kind)
            if series:
                kinds.add(kind)
                panels.append(_aligned(view, row, kind, series))
                break
    if panels:
        told = " or ".join(f"of {COSINES[kind]}" for kind in COSINES if kind in kinds)
        yield Text(
            f"Cosine between a rule's credit and the gradient {told} by reverse mode, block by block, over the epochs; mean over "
            "seeds. 1: the same direction; 0: orthogonal. Colours go from the first block (orange) to the last (blue); dashed: blocks "
            "without a number, such as a readout."
        )
        yield Figure(panels)


def _aligned(view: View, row: TableRow, kind: str, series: Sequence[Series]) -> Panel:
    values = [y for one in series for _, y in one.line]
    epochs = [x for one in series for x, _ in one.line]
    y = linear([0.0, 1.0, *values], "cosine", bounds=(-1, 1), pad=0.02)
    title = f"{view.label(row)}: cosine with the gradient" + ("" if kind == "cosine" else " of its objective")
    return panel(title, linear(epochs, "epochs", pad=0.02, whole=True), y, series)


def _cosines(row: TableRow, kind: str) -> list[Series]:
    """Make a curve of cosines for each block that has measurements."""
    pattern = re.compile(rf"alignment/(.+)/{kind}")
    keys = {key: None for record in row.finished for metrics in record.history for key in metrics if pattern.fullmatch(key)}
    series = []
    names = [key.split("/", 1)[1].removesuffix(f"/{kind}") for key in keys]
    for key, shown in zip(keys, in_order([f"block {name}" for name in names]), strict=True):
        curves = [[(m["epoch"], m[key]) for m in record.history if key in m and "epoch" in m] for record in row.finished]
        together = zip(*(curve for curve in curves if curve), strict=False)
        mean = [(statistics.fmean(x for x, _ in points), statistics.fmean(y for _, y in points)) for points in together]
        if mean:
            series.append(Series(shown, mean))
    return series
