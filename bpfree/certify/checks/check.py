"""A check: one question that a certificate answers from measurements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bpfree.certify.measurements import Measurements

__all__ = ["Check"]


@dataclass(frozen=True)
class Check:
    """One question that a certificate answers.

    Attributes:
        id: short, with hyphens; what waivers and ``--only`` name.
        title: what holds if it passes, in one line.
        run: raises ``CheckFailed``, ``NotShown``, ``Unmeasured`` or ``NotApplicable``, else it has passed; may return a remark.
        quick: whether ``--quick`` includes it.
        waivable: whether an expected failure can be waived with a reason.
    """

    id: str
    title: str
    run: Callable[[Measurements], str | None]
    quick: bool = True
    waivable: bool = True
