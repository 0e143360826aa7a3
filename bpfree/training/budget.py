"""The share of its budget that a run has used, and that of a phase: when each of them ends."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

from bpfree.errors import UsageError
from bpfree.metric import Metric
from bpfree.rule import Rule
from bpfree.step import Phase
from bpfree.tasks.stages import walk
from bpfree.training.setup import Setup
from bpfree.training.state import Position, RunState

__all__ = ["BudgetTracker", "check_patience", "why_not_early"]

MOST_PHASES = 1_000_000
"""Phases of a plan are counted up to here; one with more is endless."""


class BudgetTracker:
    """The budget against the run's state.

    Args:
        setup: the run's: the rule's phases share the budget.
        state: how far the run has come.

    Attributes:
        passes: over the training split that the budget amounts to; 0 where that is not known beforehand.
        ending: why a callback ends the run after the epoch that has ended; the empty string if none does.
    """

    ending = ""

    def __init__(self, setup: Setup, state: RunState) -> None:
        self._budget, self._state, self._stages, budget = setup.budget, state, setup.task.stages, setup.budget
        # whether the budget ends the run, rather than the last of its phases
        self._ends = budget.epochs is None or budget.samples is not None
        self.passes = 0 if budget.epochs is None else self._count_passes(setup.rule)
        self._patience = Patience(setup.config.budget.patience, setup.task.spec.primary)

    def _count_passes(self, rule: Rule) -> int:
        """Count the passes of all phases; where phases are open or endless, return the budget's epochs, which then end the run."""
        steps = itertools.islice(walk(rule, self._budget, self._stages), MOST_PHASES)
        phases = [each for each in steps if isinstance(each, Phase)]
        if len(phases) == MOST_PHASES or any(phase.is_open for phase in phases):
            self._ends = True
            return self._budget.epochs or 0
        return sum(phase.epochs or 0 for phase in phases)

    def used(self) -> float:
        """Return the share of the budget that is used.

        Raises:
            UsageError: it is in forward-pass equivalents or operations, which are not known.
        """
        budget, at = self._budget, self._state.at
        if budget.samples is not None:
            return at.samples / budget.samples
        if budget.seconds is not None:
            return self._state.clock.report() / budget.seconds
        if budget.forwards is not None:
            return self._state.operations.spent() / budget.forwards
        if budget.operations is not None:
            return self._state.operations.counted() / budget.operations
        return (at.epoch + at.share) / max(1, self.passes)

    def is_over(self) -> bool:
        """Tell whether the budget, an end of patience, or a callback ends the run now."""
        return bool(self.ending) or self._patience.is_out(self._state.at) or (self._ends and self.used() >= 1)

    def note(self, metrics: Mapping[str, float]) -> None:
        """Note the metrics of an epoch that has ended, which patience uses."""
        self._patience.note(metrics, self._state.at)

    def told(self) -> tuple[str, dict[str, float]]:
        """Return why the run ended before its budget, if it did, with the entries of its result."""
        reason, result = self._patience.told(self._state.at, in_time=self.used() < 1)
        return reason or self.ending, result

    def phase_progress(self, phase: Phase, progress: float) -> float:
        """Return the share of the phase that is over, 0 to 1; for an open phase, the run's ``progress``."""
        at = self._state.at
        if phase.seconds is not None:
            return min(1.0, (self._state.clock.report() - at.phase_seconds) / phase.seconds)
        if phase.forwards is not None:
            return min(1.0, self._state.operations.spent(at.phase_operations) / phase.forwards)
        if phase.operations is not None:
            return min(1.0, self._state.operations.counted(at.phase_operations) / phase.operations)
        return min(1.0, (at.phase_epoch + at.share) / phase.epochs) if phase.epochs else progress

    def phase_is_over(self, phase: Phase) -> bool:
        """Tell whether the phase is over, at the end of a pass or before the first."""
        return self.is_used_up(phase) or (phase.epochs is not None and self._state.at.phase_epoch >= phase.epochs)

    def is_used_up(self, phase: Phase) -> bool:
        """Tell whether the phase's seconds, forwards or operations, or the run's budget, are used up; this may be within a pass."""
        state = self._state
        if phase.seconds is not None and state.clock.report() - state.at.phase_seconds >= phase.seconds:
            return True
        if phase.forwards is not None and state.operations.spent(state.at.phase_operations) >= phase.forwards:
            return True
        if phase.operations is not None and state.operations.counted(state.at.phase_operations) >= phase.operations:
            return True
        return self.is_over()


class Patience:
    """Ends a run whose primary metric on validation has not improved for some epochs.

    What it has seen is a part of the run's position, so that a resumed run ends where it would have ended.

    Args:
        epochs: how many; ``None``: it never ends a run.
        metric: the task's primary one.
    """

    def __init__(self, epochs: int | None, metric: Metric) -> None:
        self._epochs, self._metric = epochs, metric

    def note(self, metrics: Mapping[str, float], at: Position) -> None:
        """Compare the epoch that has ended with the best before it; an epoch without evaluation does not count as better."""
        score = self._metric.sign * metrics.get(f"val/{self._metric.name}", math.nan)
        if self._epochs is not None and score > at.best_score:
            at.best_epoch, at.best_score = at.epoch, score

    def is_out(self, at: Position) -> bool:
        """Tell whether the epochs are over, at the end of a pass."""
        return self._epochs is not None and not at.batch and at.epoch - at.best_epoch >= self._epochs

    def told(self, at: Position, *, in_time: bool) -> tuple[str, dict[str, float]]:
        """Return why patience ended the run, if it did so ``in_time``, before the budget; and the best epoch for the run's result."""
        if self._epochs is None:
            return "", {}
        ended = in_time and self.is_out(at)
        result = {"train/best_epoch": float(at.best_epoch), "train/out_of_patience": float(ended)}
        if not ended:
            return "", result
        best = f"epoch {at.best_epoch}" if at.best_epoch else "none"
        return f"budget.patience={self._epochs} ended it after epoch {at.epoch}: val/{self._metric.name} was best at {best}", result


def check_patience(setup: Setup) -> None:
    """Refuse a patience that nothing can measure, or that would end a run before its later phases have begun.

    Raises:
        UsageError: no validation split, a task without a metric, or a rule whose only phase is not evaluated, that has several, or that
            solves for parameters at its end.
    """
    if setup.config.budget.patience is None:
        return
    fix = "leave budget.patience out"
    if setup.task.validation is None:
        what, fix = "without a validation split no epoch is better than another", "task.validation above 0, or leave it out"
    elif not setup.task.spec.is_scored:
        what = f"task {setup.task.spec.name!r} has no metric to be patient with"
    elif not (what := why_not_early(setup)):
        return
    raise UsageError(what, where="budget.patience", fix=fix)


def why_not_early(setup: Setup) -> str:
    """Say why the training cannot end before its budget; the empty string if it can."""
    name = type(setup.rule).__name__
    phases = list(itertools.islice(walk(setup.rule, setup.budget, setup.task.stages), 2))
    only = phases[0] if len(phases) == 1 and isinstance(phases[0], Phase) else None
    if only is None:
        return f"{name} trains in several phases here, and would end before the later ones"
    if not only.evaluate:
        return f"the epochs of {name} are not evaluated"
    solves = type(setup.rule).end_phase is not Rule.end_phase
    return f"{name} solves for parameters when its phase ends, so that its epochs say nothing before" if solves else ""
