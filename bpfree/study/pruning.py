"""Pruning of trials by rung: asynchronous successive halving (Li et al. 2020), decided in the order of the trials.

Each trial trains until the epochs of a rung and waits there. It continues if its score is among the best 1/reduction (at least one) of the
scores at this rung, of itself and earlier trials. For sequential trials this is Optuna's ``SuccessiveHalvingPruner``. A decision waits for
the earlier trials that may still reach the rung, so that it does not depend on the number of parallel trials, or on their speed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Decision", "Reached", "decide", "is_promoted", "rungs_of"]


@dataclass(frozen=True)
class Reached:
    """Progress of a trial.

    Attributes:
        scores: at the rungs that it has reached, by their epochs; NaN for a rung without a measurement, which prunes no trial.
        ended: whether it trains no more: it has finished, or failed.
    """

    scores: Mapping[int, float]
    ended: bool = False


@dataclass(frozen=True)
class Decision:
    """The decision on a trial.

    Attributes:
        state: ``train`` until ``rung`` (``None``: to its end), ``wait`` at a rung for earlier trials, or ``pruned`` at one.
        rung: in epochs.
    """

    state: Literal["train", "wait", "pruned"]
    rung: int | None = None


def rungs_of(first: int, reduction: int, epochs: int) -> list[int]:
    """List the rungs below a budget in epochs: the first one, and each ``reduction`` times the one before."""
    found = []
    while first < epochs:
        found.append(first)
        first *= reduction
    return found


def decide(trials: Sequence[Reached], rungs: Sequence[int], reduction: int, *, greater: bool) -> list[Decision]:
    """Decide which trials train, wait, or are pruned.

    Args:
        trials: in their order.
        rungs: ascending.
        reduction: one of this many trials continues.
        greater: whether greater scores are better.
    """
    found: list[Decision] = []
    before: dict[int, list[float]] = {rung: [] for rung in rungs}
    unsettled = len(rungs)  # the lowest rung that an earlier trial may still reach
    for trial in trials:
        decision = Decision("train")
        for place, rung in enumerate(rungs):
            score = trial.scores.get(rung)
            if score is None and trial.ended:
                break
            if score is None or place >= unsettled:
                decision = Decision("train" if score is None else "wait", rung)
                unsettled = min(unsettled, place)
                break
            if math.isnan(score):
                continue
            before[rung].append(score)
            if not is_promoted(score, before[rung], reduction, greater=greater):
                decision = Decision("pruned", rung)
                break
        found.append(decision)
    return found


def is_promoted(score: float, scores: Sequence[float], reduction: int, *, greater: bool) -> bool:
    """Tell whether a score is among the best ``1/reduction`` (at least one) of ``scores``, which include it."""
    ranked = sorted(scores, reverse=greater)
    last = ranked[max(1, len(ranked) // reduction) - 1]
    return score >= last if greater else score <= last
