"""What checks find: passed, not shown, failed, waived, unmeasured, or not applicable; each with what, where, and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["NEEDLESS", "STATUSES", "CheckFailed", "Finding", "NotApplicable", "NotShown", "Status", "Unmeasured"]

NEEDLESS = "the waiver is not needed"
"""Remark on a check that passes although it was expected to fail."""
Status = Literal["passed", "not shown", "failed", "waived", "unmeasured", "not applicable"]
STATUSES: tuple[str, ...] = get_args(Status)


class CheckFailed(Exception):
    """A check found something wrong.

    Args:
        what: one sentence on what is wrong.
        where: the block, line or option concerned.
        fix: what the author can do.
    """

    def __init__(self, what: str, *, where: str = "", fix: str) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what)


class Unmeasured(Exception):
    """A check could not be carried out; says why. It is not passed, and what it judges is not claimed."""


class NotApplicable(Exception):
    """A check does not apply to this rule; says why."""


class NotShown(Exception):
    """What a check asks for was measured, but not shown. The rule is not wrong for it, and the certificate carries the remark."""


@dataclass
class Finding:
    """Result of a check.

    Attributes:
        id, title: the check's.
        status: how it ended.
        what, where, fix: of a failure (also a waived one); ``what`` alone: a remark, what was not shown, or why it was not measured.
        waiver: the written reason, if it was expected to fail.
        seconds: it took.
    """

    id: str
    title: str
    status: Status
    what: str = ""
    where: str = ""
    fix: str = ""
    waiver: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        lines = [f"{self.status}: {self.title} ({self.id})"]
        lines += [f"  {name + ':':7}{value}" for name, value in (("what", self.what), ("where", self.where), ("fix", self.fix)) if value]
        if self.waiver:
            lines.append(f"  waived: {self.waiver}")
        return "\n".join(lines)
