"""Trials of tuning: what was tried for a row, and what was chosen. Data only; :mod:`bpfree.study.tuning` makes them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Trial", "Tuned"]


@dataclass(frozen=True)
class Trial:
    """One configuration that was tried, on the tuning seeds, scored on the validation split.

    Attributes:
        settings: of the tuned keys; the first trial of a row has none: it is the configuration as the study's file has it.
        values: of the tuned keys in full, those of the default configuration too.
        status: ``finished``, ``diverged``, ``failed``, ``timeout``; ``not run`` as long as nothing is known.
        score: on validation, in the unit of the table (accuracy in per cent, or loss); ``None`` without a result.
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
        trials: in their order; the first is the default configuration. A trial that failed counts as one.
        planned: how many trials the study gives each row.
        greater: whether a greater score is better (accuracy), or a smaller one (loss).
        logarithmic: the keys that were searched on a logarithmic scale.
    """

    keys: Sequence[str]
    trials: Sequence[Trial]
    planned: int
    greater: bool = True
    logarithmic: Sequence[str] = field(default_factory=tuple)

    @property
    def default(self) -> Trial | None:
        """The configuration as the file has it."""
        return self.trials[0] if self.trials else None

    @property
    def at_edge(self) -> list[str]:
        """Keys whose best value is the smallest or the largest that was tried: beyond it there may be better ones."""
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
        """The best on validation, the earliest of equals; ``None`` without any result."""
        scored = [trial for trial in self.trials if trial.score is not None and math.isfinite(trial.score)]
        return max(scored, key=lambda trial: (trial.score or 0.0) * (1 if self.greater else -1), default=None)
