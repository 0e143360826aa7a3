"""What a study tunes: domains of settings, as its file has them. Data and their reading; :mod:`bpfree.study.tuning` searches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from bpfree.yaml_values import Scalar, plain

__all__ = ["Choices", "Domain", "Interval", "Tune", "read_domain"]

Search = Literal["quasi-random", "tpe"]


@dataclass(frozen=True)
class Interval:
    """Numbers from ``low`` to ``high``, both included.

    Attributes:
        log: searched on a logarithmic scale.
        integer: whole numbers only.
    """

    low: float
    high: float
    log: bool = False
    integer: bool = False


@dataclass(frozen=True)
class Choices:
    """One of some values."""

    values: Sequence[Any]


Domain = Interval | Choices


@dataclass(frozen=True)
class Tune:
    """How the rows of a study are tuned: each with the same number of trials, by validation alone.

    Attributes:
        trials: of each row in each column; the first is the configuration as the file has it.
        search: ``quasi-random`` (scrambled Sobol points) or ``tpe`` (tree-structured Parzen estimator).
        seeds: of the trials, over which a score is the mean; none of them is a seed of the study.
        space: by setting; a row may change it.
        settings: of trials alone, such as a shorter budget.
    """

    trials: int
    search: Search = "quasi-random"
    seeds: Sequence[int] = (1000,)
    space: Mapping[str, Domain] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


def read_domain(value: Any) -> Domain | str:
    """A domain as a study file has it: ``{low: 1e-4, high: 0.1, log: true}``, or a list of choices. What is wrong with it otherwise."""
    if isinstance(value, list):
        value = [_choice(entry) for entry in value]
        return Choices(value) if len(value) > 1 else "a list of choices has two or more"
    if not isinstance(value, dict) or not {"low", "high"} <= value.keys() <= {"low", "high", "log"}:
        return "must be {low: ..., high: ..., log: true or false}, or a list of choices"
    low, high, log = plain(value["low"]), plain(value["high"]), plain(value.get("log", False))
    if not all(isinstance(bound, (int, float)) and not isinstance(bound, bool) for bound in (low, high)) or not isinstance(log, bool):
        return "low and high must be numbers, log true or false"
    if not low < high or (log and low <= 0):
        return "low must be less than high" + (", and positive on a logarithmic scale" if log else "")
    return Interval(low, high, log, integer=isinstance(low, int) and isinstance(high, int))


def _choice(value: Any) -> Any:
    """Numbers in whatever notation are numbers; what else has a text of its own is that text, until the key's type is known."""
    if isinstance(value, Scalar):
        return value.value if isinstance(value.value, float) and math.isfinite(value.value) else value.text
    return [_choice(entry) for entry in value] if isinstance(value, list) else value
