"""Three numbers and three verdicts for each row of a study: its own score, the score of its probed features, and its floor.

- *own*: the rule's own prediction; *probed*: its features read by a converged linear readout; what the readout loses between them.
- *features*: probed less floor. *As delivered*: own less floor. *At equal budget*: own less the own-prediction twin (everything but the
  readout recipe fixed) with the same trials and as many operations.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bpfree.metric import ACCURACY, Metric
from bpfree.study.cells import Plan
from bpfree.study.differences import Difference, Paired, gap_share, judge
from bpfree.study.examples import OWN, PROBED, Scores, paired, scores_of, twin_scores
from bpfree.study.floors import FloorRecord, Floors, floor_key
from bpfree.study.measures import Measure
from bpfree.study.rows import TableRow
from bpfree.study.statistics import Interval, first_reached, median_with_misses

__all__ = ["RowFloor", "Verdict", "verdicts"]

LEAST_GAP = 2.0
"""Points between floor and ceiling below which a share of the gap says nothing."""
FEATURES, DELIVERED, EQUAL = "features", "as delivered", "at equal budget"


@dataclass(frozen=True)
class RowFloor:
    """The floor that a row is measured by.

    Attributes:
        name: what is read, or the row of another readout recipe that does better on untrained features.
        scores: of the floor.
        validation: mean on validation, accuracy or minus the loss; ``None`` without a validation split.
        at_least: whether the floor may be higher: a source was too large to be read, or a recipe is not known to have converged.
        record: of the measurement.
    """

    name: str
    scores: Scores
    validation: float | None
    at_least: bool
    record: FloorRecord


@dataclass(frozen=True)
class Verdict:
    """A row compared with its floor.

    Attributes:
        row: the row.
        own, probed: scores; ``probed`` has none where the rule gives no features, or they were not read.
        floor: its floor.
        features, delivered, equal: the three differences; ``None`` where one side is missing.
        share: of the gap between floor and ceiling, with its interval; ``None`` where the gap is too small or there is no ceiling.
        operations: median of those spent when validation first reached the floor; infinite for misses, NaN where it is not known.
    """

    row: TableRow
    own: Scores
    probed: Scores
    floor: RowFloor
    features: Difference | None
    delivered: Difference | None
    equal: Difference | None
    share: tuple[float, Interval | None] | None
    operations: float

    @property
    def text(self) -> str:
        """The three verdicts in words."""
        if is_twin(self.row) or not _learns_features(self.row):
            return ""
        if self.delivered is None or self.delivered.error is None:
            return self.delivered.why_unknown if self.delivered is not None else ""
        delivered, features = self.delivered.sign, self.features.sign if self.features is not None else None
        equal = self.equal.sign if self.equal is not None and self.equal.error is not None else None
        if delivered > 0:
            below = "; not above its twin at equal operations" if equal is not None and equal <= 0 else ""
            return (
                "above its floor" if features is None or features > 0 else "above its floor; its features alone are not shown to be"
            ) + below
        if features is not None and features > 0:
            if equal is None or equal > 0:
                return "has not paid for its features in this budget"
            return "its features are above the floor; its predictions are not, nor above its twin at equal operations"
        return "below its floor" if delivered < 0 else "not shown to learn more than its floor"


def is_twin(row: TableRow) -> bool:
    """Tell whether only the readout of a row is trained."""
    recipe = row.cells[0].recipe
    return recipe.names.get("rule") == "frozen" or recipe.settings.twin


def _learns_features(row: TableRow) -> bool:
    """Tell whether a row has hidden blocks: a linear classifier has none."""
    return row.cells[0].recipe.names.get("rule") != "linear"


def verdicts(plan: Plan, rows: Sequence[TableRow], floors: Floors, measure: Measure) -> list[Verdict]:
    """Judge each row that has a result and a floor.

    Each of the three verdicts is a family of comparisons of its own, corrected by Holm over rows and columns. Untrained rows and linear
    classifiers, of which nothing is claimed, have no part in them.
    """
    found = [
        _Judged(row, floor, measure, plan)
        for row in rows
        if row.finished and (floor := _floor(row, rows, floors, measure, plan)) is not None
    ]
    families: dict[str, Mapping[object, Difference]] = {}
    for name in (FEATURES, DELIVERED, EQUAL):
        pairs: dict[object, tuple[object, Paired]] = {
            id(each): (each.row.column, pair)
            for each in found
            if not is_twin(each.row) and _learns_features(each.row) and (pair := each.pair(name)) is not None
        }
        families[name] = judge(pairs)
    return [each.verdict(families, found) for each in found]


# --- floors -----------------------------------------------------------------------------------------------------------


def _floor(row: TableRow, rows: Sequence[TableRow], floors: Floors, measure: Measure, plan: Plan) -> RowFloor | None:
    record = floors.of(row, rows)
    if record is None or record.metric.name != measure.measured:
        return None
    means = {seed: measure.shown(record.metric.sign * value) for seed, value in record.by_seed.items()}
    examples = {seed: measure.shown(np.asarray(values, np.float64)) for seed, values in record.examples.items()}
    scores = Scores(means, examples, measure.metric.greater)
    best = statistics.fmean(record.validation) if record.validation else None
    floor = RowFloor(record.source, scores, best, bool(record.skipped), record)
    for other in rows:  # another readout recipe that scores better on untrained features
        value = _validation(other, record.metric) if other is not row and _is_its_twin(other, row) else None
        if value is not None and floor.validation is not None and value > floor.validation:
            floor = RowFloor(
                other.written.label, scores_of(other, measure, plan.output), value, not converged(other, rows, record.metric), record
            )
    return floor


def _is_its_twin(other: TableRow, row: TableRow) -> bool:
    return is_twin(other) and other.column == row.column and floor_key(other.cells[0]) == floor_key(row.cells[0])


def _validation(row: TableRow, metric: Metric) -> float | None:
    """Compute the mean over seeds of the last validation score, greater is better; ``None`` if a seed has none."""
    known = _validations(row, metric)
    return statistics.fmean(known) if known else None


def _validations(row: TableRow, metric: Metric) -> list[float]:
    """Return the last validation score of each finished seed; empty if a seed has none."""
    key = f"val/{metric.name}"
    last = [next((epoch[key] for epoch in reversed(each.history) if key in epoch), None) for each in row.finished]
    known = [metric.sign * value for value in last if value is not None and math.isfinite(value)]
    return known if len(known) == len(last) else []


def converged(row: TableRow, rows: Iterable[TableRow], metric: Metric = ACCURACY) -> bool:
    """Tell whether a readout recipe that is not convex counts as converged.

    Its rate was tuned over at least five values with the best not at an edge, it has at least three restarts, and a row that is the same
    but for twice the budget is not better by two standard errors on validation.
    """
    tuned = row.tuned
    if tuned is None or "optimizer.lr" not in tuned.keys or len(row.finished) < 3:
        return False
    rates = [trial.values["optimizer.lr"] for trial in tuned.trials if trial.score is not None and "optimizer.lr" in trial.values]
    best = tuned.best
    if best is None or len(set(rates)) < 5 or best.values.get("optimizer.lr") in (min(rates), max(rates)):
        return False
    return any(_doubled(other, row) and not _better(other, row, metric) for other in rows)


def _doubled(other: TableRow, row: TableRow) -> bool:
    mine, its = (each.cells[0].settings for each in (row, other))
    changed = {key for key in mine if mine[key] != its.get(key)}
    budgets = {key for key in changed if key.startswith("budget.")}
    same = other.column == row.column and changed - {"optimizer.lr"} == budgets and len(budgets) == 1
    return same and all(its[key] is not None and mine[key] is not None and its[key] >= 2 * mine[key] for key in budgets)


def _better(other: TableRow, row: TableRow, metric: Metric) -> bool:
    """Tell whether a row is better on validation by two standard errors; an unknown score counts as better."""
    theirs, ours = (_validations(one, metric) for one in (other, row))
    if len(theirs) < 2 or len(ours) < 2:
        return True
    error = math.sqrt(statistics.variance(theirs) / len(theirs) + statistics.variance(ours) / len(ours))
    return statistics.fmean(theirs) - statistics.fmean(ours) > 2 * error


# --- rows -------------------------------------------------------------------------------------------------------------


class _Judged:
    """A row with its scores, before its verdicts are known."""

    def __init__(self, row: TableRow, floor: RowFloor, measure: Measure, plan: Plan) -> None:
        self.row, self.floor, self.measure = row, floor, measure
        self.own, self.probed = (scores_of(row, measure, plan.output, which) for which in (OWN, PROBED))
        self.twin = twin_scores(row, measure, plan.output)

    def pair(self, name: str) -> Paired | None:
        if name == FEATURES:
            return paired(self.probed, self.floor.scores)
        return paired(self.own, self.floor.scores if name == DELIVERED else self.twin)

    def verdict(self, families: Mapping[str, Mapping[object, Difference]], found: Sequence[_Judged]) -> Verdict:
        features, delivered, equal = (families[name].get(id(self)) for name in (FEATURES, DELIVERED, EQUAL))
        return Verdict(self.row, self.own, self.probed, self.floor, features, delivered, equal, self._share(found), self._operations())

    def _share(self, found: Sequence[_Judged]) -> tuple[float, Interval | None] | None:
        """Compute the share of the gap to back-propagation on the same network, tuned alike."""
        ceiling = next((each for each in found if each is not self and each.is_ceiling_of(self)), None)
        if ceiling is None or not self.measure.metric.share:
            return None
        pair = paired(ceiling.own, self.floor.scores)
        seeds = [seed for seed in self.own.means if seed in ceiling.own.means and seed in self.floor.scores.means]
        error = judge({0: (0, pair)})[0].error if pair is not None else None
        if error is None or not seeds:
            return None
        sign = 1 if self.own.greater else -1
        ours, floor, top = ([sign * scores.means[seed] for seed in seeds] for scores in (self.own, self.floor.scores, ceiling.own))
        return gap_share(ours, floor, top, error=error, least=LEAST_GAP)

    def is_ceiling_of(self, other: _Judged) -> bool:
        row, recipe = self.row, self.row.cells[0].recipe
        trials = [0 if each.tuned is None else each.tuned.planned for each in (row, other.row)]
        same = row.column == other.row.column and floor_key(row.cells[0]) == floor_key(other.row.cells[0])
        return same and recipe.names.get("rule") == "backprop" and not recipe.settings.twin and trials[0] == trials[1]

    def _operations(self) -> float:
        """Compute the median of the operations after which validation first reached the floor."""
        if self.floor.validation is None:
            return math.nan
        metric = self.floor.record.metric
        spent = []
        for record in self.row.finished:
            epoch = first_reached(record.history, f"val/{metric.name}", metric.sign * self.floor.validation, greater=metric.greater)
            spent.append(math.inf if epoch is None else epoch.get("forwards", math.nan) * record.result.get("forward_operations", math.nan))
        return math.nan if any(map(math.isnan, spent)) else median_with_misses(spent)
