"""Whole runs as ``bpfree train`` makes them: weights that are read, facts that exclude each other, predictions without the blocks."""

from __future__ import annotations

import statistics

from bpfree.certify.checks.check import Check
from bpfree.certify.findings import CheckFailed, NotApplicable, Unmeasured
from bpfree.certify.measurements import Measurements
from bpfree.certify.reading import Cell, Reading, Verdict
from bpfree.certify.whole_examination import WholeExamination
from bpfree.rule import Traits

__all__ = ["CHECKS", "judge_reading"]

DOES: dict[Verdict, str] = {
    "reads": "reads",
    "at construction": "is a function, from before the first step, of",
    "executes": "needs, found out by execution,",
}

UNCHANGED = 0.9
"""Share of equal predictions with fresh hidden blocks from which these are not needed."""


def _whole(m: Measurements) -> tuple[WholeExamination, Traits]:
    found = m.whole
    if found.trouble or found.traits is None:
        raise Unmeasured(f"whole runs could not be made, so the rule is not called local: {found.trouble}")
    return found, found.traits


def _where(m: Measurements, found: WholeExamination) -> str:
    rule = m.subject.rule
    return f"{rule.__module__}.{rule.__qualname__}; {found.reading.steps} steps on {found.reading.task} with the rule's own settings"


def _reading(m: Measurements) -> str | None:
    """Compare what whole runs read of the weights above with the declared window."""
    found, traits = _whole(m)
    return judge_reading(found.reading, traits, _where(m, found))


def judge_reading(reading: Reading, traits: Traits, where: str) -> str:
    """Compare a matrix with the declared window; returns a remark.

    Raises:
        CheckFailed: more is read, or found out, than is declared.
        Unmeasured: an entry beyond the window is open.
    """
    if len(reading.blocks) < 2:
        return "its network is one block: there are no weights above"
    declared, window = traits.downstream_weights, len(reading.blocks)
    window = window if declared == "all" else int(declared)
    for verdict, does in DOES.items():
        beyond = reading.found(verdict, beyond=window)
        if beyond:
            below, above, cell = beyond[0]
            raise CheckFailed(
                f"it declares downstream_weights={declared!r}, but what block {below!r} learns {does} the weights of block {above!r}: "
                f"with other weights there, and the same values, {_ends(cell)}",
                where=where,
                fix=f"declare downstream_weights={_declared(reading.reach(verdict), len(reading.blocks))}, or cut what carries these "
                f"weights to block {below!r}",
            )
    unmeasured = reading.found("unmeasured", beyond=window)
    if unmeasured:
        below, above, cell = unmeasured[0]
        raise Unmeasured(f"not called local: whether block {below!r} reads the weights of {above!r} is open: {cell.why}")
    if reading.trouble:
        raise Unmeasured(f"not called local: {reading.trouble}")
    return _remark(reading)


def _ends(cell: Cell) -> str:
    when = "from the first step on" if cell.first == 1 else "before the first step" if cell.first < 0 else f"from step {cell.first} on"
    return f"it has other weights {when} (by {cell.relative:.2g} of how far it moved)"


def _declared(reach: int, blocks: int) -> str:
    return "'all'" if reach >= blocks - 1 else str(reach)


def _remark(reading: Reading) -> str:
    exact = "bit for bit" if reading.exact else f"up to relative changes of {reading.threshold:.1g}"
    parts = [f"{reading.steps} steps on {reading.task}, {exact}"]
    if reading.found("statistics"):
        below, above, _ = reading.found("statistics")[0]
        parts.append(f"block {below!r} learns through something scaled by a statistic of the first weights of block {above!r}")
    if executed := reading.found("executes"):
        parts.append(f"block {executed[0][0]!r} finds out weights of block {executed[0][1]!r} by executing it")
    return "; ".join(parts)


def _consistent(m: Measurements) -> str | None:
    """Refuse a first update along the true gradient of a rule that reads no weights above."""
    found, _ = _whole(m)
    if found.unaligned:
        raise Unmeasured(f"not called local: {found.unaligned}")
    if found.least_aligned is None:
        raise NotApplicable("fewer than two hidden blocks have an update and a true gradient in the first steps")
    said = ", ".join(f"{name} {statistics.fmean(values):.2f}" for name, values in found.alignment.items())
    if found.contradicts_itself:
        raise CheckFailed(
            "no transport was seen, and yet the first update follows the true gradient in every hidden block but the last, whatever the "
            f"rule's own parameters are (cosines {said})",
            where=_where(m, found),
            fix="show where the credit of the lower blocks comes from; two measurements of this rule exclude each other",
        )
    return f"cosine of the first update with the true gradient, mean of five draws of the rule's parameters: {said}"


def _needed(m: Measurements) -> str | None:
    """Refuse predictions that are the same with hidden blocks as they were before training."""
    found, _ = _whole(m)
    if found.unneeded:
        raise Unmeasured(found.unneeded)
    if found.needed is None:
        raise NotApplicable("no hidden block learns")
    share = f"{100 * found.needed.agreement:.0f} % of {found.needed.examples} predictions stay with fresh hidden blocks"
    if found.needed.agreement >= UNCHANGED:
        raise CheckFailed(
            f"hidden blocks not needed: {share}",
            where=_where(m, found),
            fix="predict with the blocks of the network; what is learned elsewhere is not examined",
        )
    return share


CHECKS = [
    Check(
        "whole-run-reading",
        "in whole runs with its own settings, no block learns from weights above beyond what is declared",
        _reading,
        quick=False,
        waivable=False,
    ),
    Check(
        "whole-run-consistency",
        "first updates along the true gradient are not called local",
        _consistent,
        quick=False,
        waivable=False,
    ),
    Check("hidden-blocks-needed", "predictions need what the hidden blocks have learned", _needed, quick=False),
]
