"""The share of its budget that a run has used, and that of a phase: when each of them ends."""

from __future__ import annotations

import itertools

from bpfree.rule import Rule
from bpfree.step import Phase
from bpfree.tasks.stages import walk
from bpfree.training.setup import Setup
from bpfree.training.state import RunState

__all__ = ["BudgetTracker"]

MOST_PHASES = 1_000_000
"""Phases of a plan are counted up to here; one with more is endless."""


class BudgetTracker:
    """The budget against the run's state.

    Args:
        setup: the run's: the rule's phases share the budget.
        state: how far the run has come.

    Attributes:
        passes: over the training split that the budget amounts to; 0 where that is not known beforehand.
    """

    def __init__(self, setup: Setup, state: RunState) -> None:
        self._budget, self._state, self._stages, budget = setup.budget, state, setup.task.stages, setup.budget
        # whether the budget ends the run, rather than the last of its phases
        self._ends = budget.epochs is None or budget.samples is not None
        self.passes = 0 if budget.epochs is None else self._count_passes(setup.rule)

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
        """Tell whether the budget ends the run now."""
        return self._ends and self.used() >= 1

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
