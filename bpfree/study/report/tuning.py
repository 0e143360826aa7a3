"""The section on tuning: scores of trials over the tuned settings, and the chosen configuration."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from bpfree.document.axes import linear, logarithmic
from bpfree.document.charts import Mark, Series, panel
from bpfree.document.content import Figure, Key, Panel, Part, Section, Table, Text
from bpfree.study.cells import word
from bpfree.study.report.view import WAITED, View, aligned
from bpfree.study.rows import TableRow, Trial, Tuned

__all__ = ["tuning"]

FIRST = "optimizer.lr"


def tuning(view: View) -> Iterator[Section]:
    """Plot the scores over each tuned key, and make the table of trials, for each column."""
    waited = not all(trial.comparable for row in view.rows if row.tuned is not None for trial in row.tuned.trials)
    legend = Text(
        "Each trial is trained on the tuning seeds and scored on the validation split; the first has the settings of the study's file. "
        "Failed trials count. The trial with the best validation score was chosen (ties: the earliest); the test split was not used."
        + "".join(f" Trials were pruned, by the same rule for each row: {each}." for each in dict.fromkeys(_pruning(view)))
        + (f" * Not comparable for at least one trial: {WAITED}." if waited else ""),
        "note",
    )
    return view.by_column("Tuning", lambda column: _parts(view, column), legend)


def _pruning(view: View) -> Iterator[str]:
    return (row.tuned.pruning for row in view.rows if row.tuned is not None and row.tuned.pruning)


def _tuned(view: View, column: str) -> list[tuple[TableRow, Tuned]]:
    return [(row, row.tuned) for row in view.of(column) if row.tuned is not None and row.tuned.trials]


def _parts(view: View, column: str) -> list[Part]:
    found = _tuned(view, column)
    figure = _figure(view, found)
    return [*([figure] if figure else []), _table(view, column, found)] if found else []


# --- figures ------------------------------------------------------------------------------------------------------------


def _figure(view: View, found: Sequence[tuple[TableRow, Tuned]]) -> Figure | None:
    keys = sorted(dict.fromkeys(key for _, tuned in found for key in tuned.keys), key=lambda key: key != FIRST)
    panels = [made for key in keys if (made := _panel(view, found, key))]
    if not panels:
        return None
    caption = "Validation score of each trial that has one; a ring marks the chosen trial."
    if any(len(tuned.keys) == 1 for _, tuned in found):
        caption += " Lines join the trials of a row where a single key was tuned."
    if any(len(tuned.keys) > 1 for _, tuned in found):
        caption += " Where several keys were tuned together, each panel shows all trials over one of them."
    rows = [row for row, _ in found]
    return Figure(panels, caption + view.background(rows), view.keys(rows))


def _panel(view: View, found: Sequence[tuple[TableRow, Tuned]], key: str) -> Panel | None:
    drawn = [(row, tuned, points) for row, tuned in found if (points := _points(tuned, key))]
    drawn = [(row, tuned, points) for row, tuned, points in drawn if tuned.measure == drawn[0][1].measure]
    if not drawn:
        return None
    values = [x for _, _, points in drawn for x, _ in points]
    scale_log = any(key in tuned.logarithmic for _, tuned, _ in drawn) or (key == FIRST and max(values) > 5 * min(values))
    log = scale_log and min(values) > 0
    x = logarithmic(values, f"{key} (logarithmic)") if log else linear(values, key)
    name, rows = f"validation {drawn[0][1].measure.metric.label}", [row for row, _ in found]
    y = linear([score for _, _, points in drawn for _, score in points], name)
    return panel(f"{name}, over {key}", x, y, [_series(view.key(row, rows), tuned, points, key) for row, tuned, points in drawn])


def _points(tuned: Tuned, key: str) -> list[tuple[float, float]]:
    found = ((_value(trial, key), trial.score) for trial in tuned.trials)
    return sorted((x, y) for x, y in found if x is not None and y is not None and math.isfinite(y))


def _value(trial: Trial, key: str) -> float | None:
    return _number({**trial.values, **trial.settings}.get(key))


def _number(value: Any) -> float | None:
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None


def _series(look: Key, tuned: Tuned, points: Sequence[tuple[float, float]], key: str) -> Series:
    chosen = None if tuned.best is None else (_value(tuned.best, key), tuned.best.score)
    edge = ", at the edge of what was tried" if key in tuned.at_edge else ""
    marks = []
    for x, y in points:
        title = f"{look.label}: {tuned.measure.text(y)} at {key} = {x:.3g}"
        ringed = (x, y) == chosen
        marks.append(Mark(x, y, f"{title} (chosen{edge})" if ringed else title, ringed=ringed))
    return Series(look, points if len(tuned.keys) == 1 else [], points=marks)


# --- table --------------------------------------------------------------------------------------------------------------


def _table(view: View, column: str, found: Sequence[tuple[TableRow, Tuned]]) -> Table:
    units = {tuned.measure.unit.strip() or tuned.measure.metric.name.replace("_", " ") for _, tuned in found}
    unit = units.pop() if len(units) == 1 else "score"
    headers = ["row", "trials", "without a score", f"default, {unit}", f"chosen, {unit}", "gain", "seconds", "chosen settings"]
    seconds = aligned([sum(trial.seconds for trial in tuned.trials) or None for _, tuned in found])
    waited = [not all(trial.comparable for trial in tuned.trials) for _, tuned in found]
    seconds = [text + "*" if text and mark else text for text, mark in zip(seconds, waited, strict=True)]
    texts = [[view.label(row), *_cells(tuned, spent)] for (row, tuned), spent in zip(found, seconds, strict=True)]
    return Table(headers, texts, [2, 7], f"Tuning {column}".strip(), [view.style(row) for row, _ in found])


def _cells(tuned: Tuned, spent: str) -> list[str]:
    scores = [_score(tuned, tuned.default), _score(tuned, tuned.best), _gain(tuned)]
    return [_trials(tuned), _failures(tuned), *scores, spent, _settings(tuned)]


def _score(tuned: Tuned, trial: Trial | None) -> str:
    return "" if trial is None or trial.score is None else tuned.measure.text(trial.score)


def _gain(tuned: Tuned) -> str:
    """Format the gain of the chosen configuration over the default."""
    default, best = tuned.default, tuned.best
    if default is None or default.score is None or best is None or best.score is None or not math.isfinite(default.score):
        return ""
    return tuned.measure.signed((best.score - default.score) * tuned.measure.metric.sign)


def _trials(tuned: Tuned) -> str:
    ended = sum(trial.status != "not run" for trial in tuned.trials)
    return f"{ended}" if ended == tuned.planned else f"{ended} of {tuned.planned}"


def _failures(tuned: Tuned) -> str:
    """Count the trials without a score by their status."""
    counts = Counter(trial.status for trial in tuned.trials if trial.status not in ("finished", "not run"))
    return ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))


def _settings(tuned: Tuned) -> str:
    best = tuned.best
    if best is None:
        return "none: no trial has a score"
    chosen = " ".join(word(key, _rounded(value)) for key, value in best.settings.items()) or "the default"
    chosen = chosen if tuned.complete else f"{chosen} (so far)"
    return f"{chosen} (at the edge of what was tried: {', '.join(tuned.at_edge)})" if tuned.at_edge else chosen


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) and math.isfinite(value) else value
