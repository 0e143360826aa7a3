"""Rules that carry credit from end to end and say that they are local, in ten families; the examiner is to find them."""

from __future__ import annotations

from adversary import files, hooked, labels, place, processes, regrouping, scoring, size, state, timed
from adversary.kit import Cheater

CHEATERS: tuple[Cheater, ...] = (
    *state.CHEATERS,
    *timed.CHEATERS,
    *place.CHEATERS,
    *size.CHEATERS,
    *hooked.CHEATERS,
    *files.CHEATERS,
    *processes.CHEATERS,
    *labels.CHEATERS,
    *scoring.CHEATERS,
    *regrouping.CHEATERS,
)

__all__ = ["CHEATERS", "Cheater"]
