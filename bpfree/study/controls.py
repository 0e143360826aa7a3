"""Compare the rows of a study with its controls, seed by seed, as one family of comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bpfree.study.cells import Plan
from bpfree.study.differences import Difference, Paired, judge
from bpfree.study.examples import paired, scores_of
from bpfree.study.measures import Measure
from bpfree.study.rows import TableRow, table_measure

__all__ = ["Comparison", "ComparisonTable", "compare", "comparisons", "control_table", "difference_texts", "error_legend"]


@dataclass(frozen=True)
class Comparison:
    """A comparison of a row with a control, in one column.

    Attributes:
        row, column, control: labels.
        difference: what the row is better by, in the unit of the table (percentage points for shares), with its error.
    """

    row: str
    column: str
    control: str
    difference: Difference

    @property
    def gains(self) -> Sequence[float]:
        """Difference of each seed that both rows have."""
        return self.difference.gains

    @property
    def gain(self) -> float:
        """Mean over the paired seeds; positive: the row is better."""
        return self.difference.gain

    @property
    def standard_error(self) -> float | None:
        """Standard error of the gain over seeds and new examples; not known from one seed."""
        return self.difference.error

    @property
    def verdict(self) -> str:
        """Verdict after correction for the family of comparisons."""
        if self.difference.why_unknown:
            return self.difference.why_unknown
        return {1: "row better", 0: "not distinguishable", -1: "control better"}[self.difference.sign]


def comparisons(plan: Plan, rows: Sequence[TableRow]) -> list[Comparison]:
    """Compare each column's rows with each of its controls, where both have results of a seed."""
    measure, controls = table_measure(plan.study, rows), plan.study.controls
    places = {(row.column, row.written.label): row for row in rows}
    pairs = [
        (places[column.label, row.label], places[column.label, control])
        for column in plan.study.columns
        for row in plan.study.rows
        for control in controls
        if row.label not in controls and {(column.label, row.label), (column.label, control)} <= places.keys()
    ]
    return _judged(plan, pairs, measure)


def compare(plan: Plan, row: TableRow, control: TableRow, measure: Measure) -> Comparison | None:
    """Compare two rows of a column by themselves; ``None`` if no seed has finite results of both."""
    return next(iter(_judged(plan, [(row, control)], measure)), None)


def _judged(plan: Plan, pairs: Sequence[tuple[TableRow, TableRow]], measure: Measure) -> list[Comparison]:
    scores = {id(row): scores_of(row, measure, plan.output) for pair in pairs for row in pair}
    family: dict[object, tuple[object, Paired]] = {
        (row.column, row.written.label, control.written.label): (row.column, found)
        for row, control in pairs
        if (found := paired(scores[id(row)], scores[id(control)])) is not None
    }
    judged = judge(family)
    places = [(row.column, row.written.label, control.written.label) for row, control in pairs]
    return [
        Comparison(row, column, control, judged[column, row, control])
        for column, row, control in places
        if (column, row, control) in judged
    ]


# --- as text ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ComparisonTable:
    """A section of a report that is a table with a legend.

    Attributes:
        headers, table: its cells, as text.
        numeric: the columns of numbers.
        legend: what they mean.
        title: of the section.
    """

    headers: Sequence[str]
    table: Sequence[Sequence[str]]
    numeric: range
    legend: str
    title: str = "Against the controls"


def control_table(plan: Plan, rows: Sequence[TableRow]) -> ComparisonTable | None:
    """Format the comparisons as a table; ``None`` if there are none yet."""
    found, measure = comparisons(plan, rows), table_measure(plan.study, rows)
    if not found:
        return None
    labelled = any(column.label for column in plan.study.columns)
    labels = ["row", *(["column"] if labelled else []), "control"]
    numbers = ["gain, points" if measure.metric.share else "gain", "std. error", "n", "p (Holm)", "detectable"]
    numbers += ["seeds for 1 point"] if measure.metric.share else []
    table = [
        [
            *(each.row, *([each.column] if labelled else []), each.control),
            *_numbers(each, len(plan.seeds), measure),
            each.verdict,
        ]
        for each in found
    ]
    legend = _legend(measure, found, [row for row in rows if row.tuned is not None and row.tuned.keys])
    return ComparisonTable([*labels, *numbers, "verdict"], table, range(len(labels), len(labels) + len(numbers)), legend)


def _numbers(found: Comparison, seeds: int, measure: Measure) -> list[str]:
    gain, error = difference_texts(found.difference, measure)
    count, known = len(found.gains), found.difference
    texts = [gain, error, f"{count}" if count == seeds else f"{count} of {seeds}"]
    if known.error is None:
        return [*texts, *([""] * (3 if measure.metric.share else 2))]
    texts += [f"{known.adjusted:.3f}" if known.adjusted >= 0.001 else "< 0.001", measure.text(known.detectable or 0.0)]
    return [*texts, *([f"{known.seeds}" if known.seeds else "none"] if measure.metric.share else [])]


def difference_texts(found: Difference, measure: Measure) -> tuple[str, str]:
    """Write a gain with its sign, and its error (blank where it is not known)."""
    return measure.signed(found.gain), "" if found.error is None else measure.text(found.error)


def _legend(measure: Measure, found: Sequence[Comparison], tuned: Sequence[TableRow]) -> str:
    name = measure.name
    difference = f"the row's {name} minus the control's" if measure.metric.greater else f"the control's {name} minus the row's"
    unit = ", in percentage points" if measure.metric.share else ""
    text = f"Gain: {difference}{unit}, so that positive means that the row is better; mean over the n seeds that both have, paired by seed."
    legend = error_legend(
        [each.difference for each in found], conditional=bool(tuned), family=f"over the family of {len(found)} comparisons (Holm)"
    )
    decide = "Seeds for 1 point: the number that would detect a difference of one point; none: no number would, on this test split."
    return " ".join([text, legend, *([decide] if measure.metric.share and any(each.standard_error is not None for each in found) else [])])


def error_legend(found: Sequence[Difference], *, conditional: bool, family: str) -> str:
    """Explain the errors of comparisons; ``family`` names the comparisons over which verdicts are corrected."""
    known = [each for each in found if each.error is not None]
    if not known:
        return "The error is not known from one seed, nor from equal seeds without predictions of single examples."
    examples = "and over new examples of the same kind as the test split's"
    if any(each.paired.examples is None for each in known):
        examples = "alone: predictions of single examples are not available for all runs"
    texts = [
        f"Standard error: over seeds, with deviations pooled over the column's rows, {examples}.",
        f"Verdicts: 5 % {family}.",
        "Detectable: the smallest difference that this many seeds find with a power of 80 %, by itself (without Holm's correction).",
        *(["Intervals are conditional on the tuned values, which all seeds share."] if conditional else []),
        *(["Fewer than five seeds give intervals, no claims."] if min(len(each.gains) for each in found) < 5 else []),
    ]
    return " ".join(texts)
