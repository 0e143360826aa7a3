"""The rows of a study's table, each in one column: resolved, with cells, their records, and tuning."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from bpfree.leaves import Leaf
from bpfree.metric import ACCURACY, Metric
from bpfree.recipe import Recipe
from bpfree.study.measures import Measure, measure_of, metrics_of
from bpfree.study.model import Published, Row, Study
from bpfree.study.store import CellKey, CellRecord

__all__ = ["Cell", "TableRow", "Trial", "Tuned", "listed", "table_measure", "unused"]


VALIDATION = Measure("val", ACCURACY, ACCURACY.name)


@dataclass(frozen=True)
class Cell:
    """A resolved run of a study.

    Attributes:
        key: which one.
        recipe: resolved.
        words: ``KEY=VALUE`` words that give the same recipe.
        examples: for training, before a validation split is cut; ``None`` where the data are not on this machine.
    """

    key: CellKey
    recipe: Recipe
    words: Sequence[str]
    examples: int | None = None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All settings by dotted key; cached, because each row of a table is compared with all others."""
        return self.recipe.flat()


@dataclass(eq=False)
class TableRow:
    """A row of the study in one of its columns, over its seeds.

    Attributes:
        written: the row of the study's file.
        column: its label.
        recipe: with the settings of the file and the command line.
        leaves: these settings.
        cells: one per seed, with the settings that tuning has chosen.
        records: of those cells, ``None`` for cells without one.
        tuned: the trials of its tuning; ``None`` where the study does not tune.
        twin: the own-prediction twin, with the same trials and as many operations; its cells are those of the seeds that are finished.
            ``None`` where the study asks for none, or the row has none.
    """

    written: Row
    column: str
    recipe: Recipe
    leaves: Sequence[Leaf]
    cells: Sequence[Cell] = ()
    records: Sequence[CellRecord | None] = ()
    tuned: Tuned | None = None
    twin: TableRow | None = None

    @property
    def label(self) -> str:
        """Label of row and column."""
        return f"{self.written.label} [{self.column}]" if self.column else self.written.label

    @property
    def finished(self) -> list[CellRecord]:
        """Records of the finished cells."""
        return [record for record in self.records if record is not None and record.status == "finished"]

    @property
    def metrics(self) -> dict[str, Metric]:
        """Metrics that score the row's runs, the primary one first."""
        return metrics_of(self.recipe, self.finished)

    @property
    def primary(self) -> Metric:
        """Primary metric of the row's runs."""
        return next(iter(self.metrics.values()))

    def by_seed(self, measure: Measure) -> dict[int, float]:
        """Return a measure of the finished cells that have it, by seed, in the table's unit."""
        return {record.key.seed: value for record in self.finished if (value := measure.of(record.result)) is not None}

    def published(self, key: str) -> Published | None:
        """Return the published number of a metric, such as ``test/error``; ``None`` if there is none."""
        return self.written.published.get(self.column, {}).get(key)

    def status_text(self) -> str:
        """Describe why there is no result yet."""
        return next((record.status for record in self.records if record is not None), "not run")


@dataclass(frozen=True)
class Trial:
    """A configuration that was tried on the tuning seeds and scored on the validation split.

    Attributes:
        settings: of the tuned keys; the first trial of a row has none: it is the configuration as the study's file has it.
        values: of the tuned keys in full, those of the default configuration too.
        status: ``finished``, ``diverged``, ``failed``, ``timeout``, ``pruned``; ``not run`` without a record.
        score: on validation, in the unit that is shown (shares in per cent); ``None`` without a result.
        seconds: of training, over its seeds.
        comparable: whether these seconds can be compared.
    """

    settings: Mapping[str, Any]
    status: str = "not run"
    score: float | None = None
    seconds: float = 0.0
    values: Mapping[str, Any] = field(default_factory=dict)
    comparable: bool = True


@dataclass(frozen=True)
class Tuned:
    """The trials of a row in a column.

    Attributes:
        keys: what was tuned.
        trials: in their order; the first is the default configuration, and failed trials count.
        planned: how many trials the study gives each row.
        measure: of the scores: the task's primary metric on validation.
        logarithmic: the keys that were searched on a logarithmic scale.
        pruning: how trials are pruned; the empty string: they are not.
    """

    keys: Sequence[str]
    trials: Sequence[Trial]
    planned: int
    measure: Measure = VALIDATION
    logarithmic: Sequence[str] = field(default_factory=tuple)
    pruning: str = ""

    @property
    def default(self) -> Trial | None:
        """Trial of the configuration in the study's file."""
        return self.trials[0] if self.trials else None

    @property
    def at_edge(self) -> list[str]:
        """Keys whose best value is the smallest or largest that was tried, so that better values may lie beyond."""
        best = self.best
        if best is None:
            return []
        found = []
        for key in self.keys:
            tried = {
                value for trial in self.trials if isinstance(value := trial.values.get(key), (int, float)) and not isinstance(value, bool)
            }
            if len(tried) > 1 and best.values.get(key) in (min(tried), max(tried)):
                found.append(key)
        return found

    @property
    def complete(self) -> bool:
        """Whether every trial has ended."""
        return len(self.trials) == self.planned and all(trial.status != "not run" for trial in self.trials)

    @property
    def best(self) -> Trial | None:
        """Trial with the best validation score (ties: the earliest); ``None`` without any result."""
        scored = [trial for trial in self.trials if trial.score is not None and math.isfinite(trial.score)]
        return max(scored, key=lambda trial: (trial.score or 0.0) * self.measure.metric.sign, default=None)


def table_measure(study: Study, rows: Sequence[TableRow], split: str = "test") -> Measure:
    """Choose the measure that is reported of a split: the published metric, otherwise the primary one.

    If primary metrics differ between rows, it is the accuracy if any row has it, otherwise the first row's.
    """
    known = {name: metric for row in reversed(rows) for name, metric in row.metrics.items()}
    key = study.published_metric(split)
    if key is None:
        names = [row.primary.name for row in [row for row in rows if row.finished] or rows]
        key = f"{split}/{ACCURACY.name if ACCURACY.name in names else names[0]}"
    return measure_of(key, known)


def unused(rows: Sequence[TableRow]) -> Iterator[str]:
    """Report shared settings that the rules of some rows do not use."""
    told: dict[str, list[TableRow]] = {}
    for row in rows:
        if keys := ", ".join(row.cells[0].recipe.unused):
            told.setdefault(keys, []).append(row)
    for keys, found in told.items():
        kinds = {"program" if row.recipe.is_program else "rule" for row in found}
        kind = kinds.pop() if len(kinds) == 1 else "row"
        yield f"{listed([row.label for row in found])}: {keys}: not used by {f'this {kind}' if len(found) == 1 else f'these {kind}s'}."


def listed(texts: Sequence[str]) -> str:
    """Join words for a sentence: ``a, b and c``."""
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
