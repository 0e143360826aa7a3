"""Whether what a rule learns in its hidden blocks is worth anything: it must beat its frozen twin."""

from __future__ import annotations

import statistics

from bpfree.certify.findings import Check, CheckFailed, NotApplicable, Unmeasured
from bpfree.certify.lesson import SEEDS
from bpfree.certify.measurements import Measurements

__all__ = ["CHECKS"]

GAP = 0.10
"""Between twin and back-propagation: below it, there is little to learn."""
ERRORS = 2.0


def _learning(m: Measurements) -> str | None:
    """By two standard errors over three seeds, on a network where there is something to learn."""
    network = m.build().network
    if not [name for name in network.blocks if name != network.readout and name not in m.silent]:
        raise NotApplicable("no hidden block learns: it is a floor, not a rule for features")
    found = m.lesson
    difference, error = found.difference
    gap = statistics.mean(found.backprop) - statistics.mean(found.twin)
    if gap < GAP:
        raise Unmeasured(f"twin and back-propagation are {100 * gap:.1f} points apart here; at least {100 * GAP:.0f} are needed")
    said = f"{100 * statistics.mean(found.rule):.1f} % against its twin's {100 * statistics.mean(found.twin):.1f} %"
    said += f" (back-propagation {100 * statistics.mean(found.backprop):.1f} %)"
    if difference <= ERRORS * error:
        raise CheckFailed(
            f"it does not beat its frozen twin: {said}; difference {100 * difference:.1f} points, standard error {100 * error:.1f}",
            where=f"digits, {found.epochs} epochs, {SEEDS} seeds, {found.network}",
            fix="mend the rule or its default rates; or waive the check with what it is for in place of features",
        )
    return f"{said}; difference {100 * difference:.1f} points, standard error {100 * error:.1f}"


CHECKS = [Check("learning", "beats its frozen twin by two standard errors over three seeds", _learning, quick=False)]
