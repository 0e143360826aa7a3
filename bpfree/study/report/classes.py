"""Class by class: how often the best rows are right about each class, and what the best row takes it for.

They are counted from the predictions that each run keeps of the test split (:mod:`bpfree.training.predictions`).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bpfree.document.content import Part, Section, Table, Text
from bpfree.errors import BpfreeError
from bpfree.study.differences import Difference, Paired, judge
from bpfree.study.examples import predictions_of
from bpfree.study.report.view import View
from bpfree.study.rows import TableRow
from bpfree.training.predictions import Predictions

__all__ = ["by_class"]

BEST = 3
"""Number of rows that are shown."""
MOST_CLASSES, PAIRS = 100, 12
"""Most classes for which there is a section, and the number of most frequent confusions where their whole table is too wide."""
ROOM, LEAST, GAP = 130, 5, 2.5
"""Width of a page, of a number, and of the gap between columns, in characters."""

Counts = NDArray[Any]


@dataclass(frozen=True)
class _Row:
    """A row with the predictions of its seeds."""

    row: TableRow
    kept: dict[int, Predictions]

    def right(self, seed: int) -> Counts:
        """Return per cent for each test example: 100 if it is right, of several draws their share."""
        found = self.kept[seed].correct
        assert found is not None
        return 100 * np.asarray(found, np.float64)


def by_class(view: View) -> Iterator[Section]:
    """Make a section of scores and confusions by class, where predictions and targets were kept."""
    note = Text(
        "Right: the share of a class's test examples that are predicted right (recall), mean over seeds. Difference: the best row less the "
        "second, paired by seed, with its standard error over seeds and examples; verdicts at 5 % over all classes (Holm). "
        "Confusions: of all seeds together, in per cent of the examples of the true class; of stochastic predictors, the first draw.",
        "note",
    )
    return view.by_column("Class by class", lambda column: _parts(view, column), note)


def _parts(view: View, column: str) -> Iterator[Part]:
    rows = _best(view, column)
    if not rows:
        return
    target = next(iter(rows[0].kept.values())).target
    assert target is not None
    names = _names(rows[0].row, int(target.max()) + 1)
    counts = np.bincount(target, minlength=len(names))
    if len(names) < 2 or len(names) > MOST_CLASSES:
        return
    yield _scores(view, column, rows, names, target, counts)
    yield from _confusions(view, column, rows[0], names, counts)


def _best(view: View, column: str) -> list[_Row]:
    """Select the best rows of a column that have kept predictions and targets of the same test examples."""
    target: Counts | None = None
    found: list[_Row] = []
    for row in view.ranked(column):
        every = {record.key.seed: predictions_of(record, view.plan.output) for record in row.finished}
        kept = {seed: each for seed, each in every.items() if each is not None and each.target is not None and each.correct is not None}
        targets = [each.target for each in kept.values() if each.target is not None]
        target = targets[0] if target is None and targets else target
        if target is not None and targets and all(np.array_equal(each, target) for each in targets):  # not other examples, as of a subset
            found.append(_Row(row, kept))
    return found[:BEST]


def _names(row: TableRow, least: int) -> list[str]:
    """Return the names of classes, or their numbers."""
    try:
        spec = row.recipe.spec()
    except BpfreeError:  # the data are not on this machine
        return [str(place) for place in range(least)]
    return [spec.label(place) for place in range(max(spec.outputs, least))]


# --- scores ---------------------------------------------------------------------------------------------------------------


def _scores(view: View, column: str, rows: Sequence[_Row], names: Sequence[str], target: Counts, counts: Counts) -> Table:
    present = [place for place in range(len(names)) if counts[place]]
    differences = _differences(rows, target, present) if len(rows) > 1 else {}
    headers = ["class", "examples", *(f"{view.label(each.row)}, right %" for each in rows)]
    headers += ["difference", "verdict"] if differences else []
    table = []
    for place in present:
        members = target == place
        shares = [statistics.fmean(float(each.right(seed)[members].mean()) for seed in each.kept) for each in rows]
        cells = [names[place], f"{counts[place]:,}", *(f"{share:.1f}" for share in shares)]
        table.append(cells + (_verdict(differences[place], rows) if place in differences else [""] * (len(headers) - len(cells))))
    words = [0, len(headers) - 1] if differences else [0]
    return Table(headers, table, words, f"Classes {column}".strip())


def _differences(rows: Sequence[_Row], target: Counts, present: Sequence[int]) -> dict[object, Difference]:
    """Judge the best row against the second in each class, as one family."""
    best, second = rows[0], rows[1]
    seeds = [seed for seed in best.kept if seed in second.kept]
    if not seeds:
        return {}
    gains = np.stack([best.right(seed) - second.right(seed) for seed in seeds])
    family: dict[object, tuple[object, Paired]] = {
        place: (0, Paired([float(gain) for gain in gains[:, target == place].mean(1)], gains[:, target == place].mean(0)))
        for place in present
    }
    return judge(family)


def _verdict(found: Difference, rows: Sequence[_Row]) -> list[str]:
    gain = f"{found.gain:+.1f}"
    if found.error is None:
        return [gain, found.why_unknown]
    better = {1: rows[0], -1: rows[1]}.get(found.sign)
    return [f"{gain} +- {found.error:.1f}", "not distinguishable" if better is None else f"{better.row.written.label} better"]


# --- confusions -----------------------------------------------------------------------------------------------------------


def _confusions(view: View, column: str, best: _Row, names: Sequence[str], counts: Counts) -> Iterator[Part]:
    found = [each.confusion(len(names)) for each in best.kept.values()]
    whole = np.sum([each for each in found if each is not None], axis=0)
    shares = 100 * whole / np.maximum(whole.sum(1, keepdims=True), 1)
    label = view.label(best.row)
    if sum(max(len(name), LEAST) + GAP for name in names) <= ROOM:
        yield Text(f"What {label} takes each class (rows) for (columns), in per cent; correct ones in blue, confusions in orange:")
        yield _matrix(names, shares, f"Confusions {column}".strip())
    elif pairs := list(_pairs(names, whole, shares)):
        yield Text(f"The most frequent confusions of {label}:")
        yield Table(["true class", "taken for", "examples", "of the class, %"], pairs, [0, 1], f"Confusions {column}".strip())


def _matrix(names: Sequence[str], shares: Counts, name: str) -> Table:
    wrong = shares - np.diag(np.diag(shares))
    most = float(wrong.max()) or 1.0
    table, tints = [], list[list[float | None]]()
    for place, row in enumerate(shares.tolist()):
        table.append([names[place], *(f"{share:.1f}" if share else "" for share in row)])
        shades = [0.5 + share / 200 if place == other else 0.5 - 0.5 * share / most for other, share in enumerate(row)]
        tints.append([None, *(shade if share else None for shade, share in zip(shades, row, strict=True))])
    return Table(["true \\ predicted", *names], table, name=name, tints=tints)


def _pairs(names: Sequence[str], whole: Counts, shares: Counts) -> Iterator[list[str]]:
    wrong = whole - np.diag(np.diag(whole))
    order = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
    for place in order.tolist():
        true, taken = divmod(place, len(names))
        if wrong[true, taken]:
            yield [names[true], names[taken], f"{wrong[true, taken]:,}", f"{shares[true, taken]:.1f}"]
