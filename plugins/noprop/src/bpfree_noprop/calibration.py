"""When a chain may stop: the score that is lost on the validation split by stopping at each of many doubts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bpfree.metric import Accumulator
from bpfree.step import Batch
from bpfree.tasks.task import TaskSpec

__all__ = ["NEVER", "ExitTrials", "operations_of"]

NEVER = -1.0
"""A doubt below any, at which no chain stops before its end."""
TRIED = (NEVER, *(10 ** (power / 10) for power in range(-60, 11)))
"""Doubts that are tried: those of classes and labels are within 0 and 1, of real targets in units of the whitened target."""


@dataclass
class Trial:
    """What stopping at one doubt costs and gives: sums over examples."""

    score: Accumulator
    examples: int = 0
    blocks: float = 0.0
    operations: float = 0.0


class ExitTrials:
    """The scores, blocks and operations of chains that stop at each of the doubts ``TRIED``; iterates over these.

    Args:
        spec: of the task, whose primary metric is the score.
        predict: of the rule, for metrics that need it.
    """

    def __init__(self, spec: TaskSpec, predict: Callable[[Any], Tensor]) -> None:
        self._metric = spec.primary
        assert self._metric.begin is not None
        self._trials = {doubt: Trial(self._metric.begin(spec, predict)) for doubt in TRIED}

    def __iter__(self) -> Iterator[float]:
        return iter(self._trials)

    def add(self, doubt: float, outputs: Tensor, batch: Batch, blocks: Tensor, costs: Tensor) -> None:
        """Add the outputs (N, ...) at a doubt, and the blocks (N,) that they took.

        Args:
            doubt: one of those tried.
            outputs: predictions.
            batch: what they are for.
            blocks: numbers of them.
            costs: (T+1,) operations of an example up to each number of blocks.
        """
        trial = self._trials[doubt]
        trial.score.add(outputs, batch)
        trial.examples += len(blocks)
        trial.blocks += float(blocks.sum())
        trial.operations += float(costs[blocks.long().cpu()].sum())

    def within(self, budget: float) -> float:
        """Return the largest doubt up to which, at all that were tried, no more than the budget is lost of the whole chain's score."""
        sign, best = self._metric.sign, NEVER
        floor = sign * self._trials[NEVER].score.value() - budget
        for doubt, trial in self._trials.items():
            if not sign * trial.score.value() >= floor:
                break
            best = doubt
        return best

    def told(self, doubt: float) -> dict[str, float]:
        """Return score, blocks and operations of an example for the whole chain, and for the exit at this doubt."""
        found = {"exit/doubt": doubt}
        for name, at in (("whole", NEVER), ("exit", doubt)):
            trial = self._trials[at]
            found[f"{name}/{self._metric.name}"] = trial.score.value()
            found |= {f"{name}/blocks": trial.blocks / trial.examples, f"{name}/operations": trial.operations / trial.examples}
        return found


def operations_of(work: Callable[[], object]) -> float:
    """Count the floating-point operations of a call; a multiplication and its addition are two."""
    from bpfree.training.operations import counted_operations  # what trains is not loaded with the rules

    with counted_operations() as count:
        work()
    return float(count())
