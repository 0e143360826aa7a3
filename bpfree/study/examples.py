"""Collect the scores of single test examples in the finished cells of a row, for the error of a difference over new examples."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bpfree.files import inside
from bpfree.metric import LOSS
from bpfree.record.folder import RunFolder
from bpfree.study.differences import Paired
from bpfree.study.measures import Measure
from bpfree.study.rows import TableRow
from bpfree.study.store import CellRecord
from bpfree.training.predictions import Predictions, read_predictions

__all__ = ["OWN", "PROBED", "Scores", "paired", "predictions_of", "scores_of", "twin_scores"]

Examples = NDArray[np.float64]
OWN, PROBED = "", "linear_probe"
"""Kinds of predictions: the rule's own, and those of a probe of its features."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores of a row, by seed.

    Attributes:
        means: in the unit of the table, of each seed with a finite result.
        examples: of each test example, in the same unit; of the seeds whose predictions are available.
        greater: whether a greater score is better.
    """

    means: Mapping[int, float]
    examples: Mapping[int, Examples]
    greater: bool


def scores_of(row: TableRow, measure: Measure, runs: Path, which: str = OWN) -> Scores:
    """Collect the scores of a row.

    Args:
        row: the row.
        measure: of the table.
        runs: folder of runs, which hold the predictions.
        which: ``OWN`` or ``PROBED``.
    """
    return _scores(row.finished, measure, runs, which)


def twin_scores(row: TableRow, measure: Measure, runs: Path) -> Scores:
    """Collect the scores of a row's own-prediction twin at equal operations."""
    return _scores([] if row.twin is None else row.twin.finished, measure, runs, OWN)


def _scores(finished: Sequence[CellRecord], measure: Measure, runs: Path, which: str) -> Scores:
    values = {record.key.seed: measure.of(record.result, which) for record in finished}
    means = {seed: value for seed, value in values.items() if value is not None and math.isfinite(value)}
    examples = {record.key.seed: found for record in finished if (found := _examples(record, measure, runs, which)) is not None}
    return Scores(means, examples, measure.metric.greater)


def _examples(record: CellRecord, measure: Measure, runs: Path, which: str) -> Examples | None:
    if not measure.of_predictions:
        return None
    kept = predictions_of(record, runs)
    if kept is None:
        return None
    own, of_probe = (kept.loss, None) if measure.measured == LOSS.name else (kept.correct, kept.protocols.get(which))
    values = of_probe if which else own
    return None if values is None else measure.shown(np.asarray(values, np.float64))


def predictions_of(record: CellRecord, runs: Path) -> Predictions | None:
    """Read the predictions of a cell's run for the test split; ``None`` where they are not available.

    Args:
        record: of the cell.
        runs: folder of runs.
    """
    path = inside(runs, str(RunFolder(record.run).predictions)) if record.run else None
    try:
        return None if path is None else _predictions(path, path.stat().st_mtime_ns)
    except OSError:
        return None


@lru_cache(maxsize=256)
def _predictions(path: Path, modified: int) -> Predictions | None:
    """Read a run's predictions once: a report compares each row with several others."""
    return read_predictions(path)


def paired(ours: Scores, theirs: Scores) -> Paired | None:
    """Pair two rows seed by seed; ``None`` if no seed has both. Positive gains: ours is better."""
    seeds = [seed for seed in ours.means if seed in theirs.means]
    if not seeds:
        return None
    sign = 1 if ours.greater else -1
    gains = [sign * (ours.means[seed] - theirs.means[seed]) for seed in seeds]
    both = [seed for seed in seeds if seed in ours.examples and seed in theirs.examples]
    if len(both) < len(seeds) or len({len(one) for seed in both for one in (ours.examples[seed], theirs.examples[seed])}) != 1:
        return Paired(gains)
    return Paired(gains, sign * np.mean([ours.examples[seed] - theirs.examples[seed] for seed in both], axis=0))
