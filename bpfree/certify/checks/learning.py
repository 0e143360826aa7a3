"""Whether a rule learns: it must not be a broken one, and more than its floor is what a certificate can show of it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bpfree.certify.checks.check import Check
from bpfree.certify.findings import CheckFailed, NotApplicable, NotShown
from bpfree.certify.learning import NOT_SHOWN, SEEDS, Lesson
from bpfree.certify.measurements import Measurements

__all__ = ["CHECKS"]


def _learning(m: Measurements) -> str | None:
    """Check that the rule beats its twin, chance and its floor, each by two standard errors over five seeds."""
    if m.subject.targets != "classes" or m.subject.own_task is not None:
        raise NotApplicable("it is judged on the classes of the digits, which the rule does not learn")
    network = m.build().network
    if not [name for name in network.blocks if name != network.readout and name not in m.silent]:
        raise NotApplicable("no hidden block learns: it is a control, not a rule for features")
    found = m.lesson
    said = _said(found)
    if found.over_twin.below or not (found.over_twin.above or found.over_chance.above):
        does = "is worse than" if found.over_twin.below else "is neither above chance nor above"
        raise CheckFailed(
            f"it {does} its own-prediction twin: {said}; beside the twin {found.over_twin}",
            where=f"digits, {found.epochs} epochs, {SEEDS} seeds, {found.network}",
            fix="correct the rule or its default rates; or waive the check, and say as the reason what the rule is for instead",
        )
    if not found.over_floor.above:
        raise NotShown(f"{NOT_SHOWN}: {said}; beside the floor {found.over_floor}")
    return f"{said}; beside the floor {found.over_floor}"


def _said(found: Lesson) -> str:
    beside = f"floor {_percent(found.floor.test)} ({found.floor.name}), own-prediction twin {_percent(found.twin)}"
    return f"{_percent(found.rule)} ({beside}, back-propagation {_percent(found.backprop)})"


def _percent(accuracies: Sequence[float]) -> str:
    return f"{100 * statistics.mean(accuracies):.1f} %"


CHECKS = [Check("learning", "learns more than its floor, by two standard errors over five seeds", _learning, quick=False)]
