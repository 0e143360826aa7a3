"""Errors that say what is wrong, where, and what to do about it.

Every failure that a user can cause or mend is a :class:`BpfreeError`; the command line prints it without a
traceback and exits with its ``exit_code`` (2: the request was wrong, 1: the work failed).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Self

from bpfree.redaction import redact

__all__ = ["BpfreeError", "DiskError", "UsageError", "did_you_mean", "nearest", "told", "unknown_name"]

MOST_NAMES, FEW_NAMES = 40, 30
"""Longer lists of names are cut, to fewer."""


class BpfreeError(Exception):
    """A failure with a place and a remedy, as ``what``, ``where``, ``fix`` and ``known``, a line each.

    Addresses in it are shown without passwords.

    Args:
        what: one sentence on what is wrong.
        where: the key, file, block or plugin concerned.
        fix: what the reader can do now.
        known: the names that would be right.
        problems: the single faults, sentences or errors, where ``what`` sums up several.

    Attributes:
        faults: the single faults; itself alone without several.
    """

    exit_code = 1

    def __init__(
        self, what: str, *, where: str = "", fix: str = "", known: Iterable[str] = (), problems: Iterable[str | BpfreeError] = ()
    ) -> None:
        self.what, self.where, self.fix, self.known = (
            redact(what),
            redact(where),
            redact(fix),
            [redact(name) for name in dict.fromkeys(known)],
        )
        self._faults = [fault if isinstance(fault, BpfreeError) else BpfreeError(fault) for fault in problems]
        labelled = [(label, text) for label, text in (("where:", self.where), ("fix:", self.fix), ("known:", self._names())) if text]
        super().__init__("\n".join([self.what, *(f"  {label:<6} {text}" for label, text in labelled)]))

    def _names(self) -> str:
        if len(self.known) <= MOST_NAMES:
            return ", ".join(self.known)
        return f"{', '.join(self.known[:FEW_NAMES])} and {len(self.known) - FEW_NAMES} others"

    @property
    def faults(self) -> list[BpfreeError]:
        return self._faults or [self]

    @property
    def problems(self) -> list[str]:
        """Return the single faults, a sentence each."""
        return [fault.sentence for fault in self.faults]

    @property
    def sentence(self) -> str:
        """Return the error as one sentence."""
        known = f"known: {self._names()}" if self.known else ""
        parts = [self.what, (" " if self.fix.endswith("?") else "; ").join(filter(None, [self.fix, known]))]
        return ": ".join(filter(None, parts)) + (f" ({self.where})" if self.where else "")

    def at(self, where: str) -> Self:
        """Return the error with another place."""
        return type(self)(self.what, where=where, fix=self.fix, known=self.known, problems=self._faults)


class DiskError(BpfreeError):
    """A file could not be written because of the disk; the work can be resumed."""


class UsageError(BpfreeError):
    """The request itself cannot be carried out as it stands (command line, configuration, arguments)."""

    exit_code = 2

    @classmethod
    def of(cls, problems: Iterable[str | BpfreeError], place: str, *, where: str = "", fix: str = "") -> UsageError:
        """Make one error of all problems in a place, such as ``study``; each problem counts once."""
        faults = BpfreeError("", problems=problems).faults
        listed = list({fault.sentence: fault for fault in faults}.values())
        if len(listed) == 1:
            only = listed[0]
            return cls(only.what, where=only.where or where, fix=only.fix or fix, known=only.known)
        lines = [f"{len(listed)} problems in the {place}:"]
        for fault in listed:
            lines += [f"  - {fault.what}", *(f"  {line}" for line in str(fault).removeprefix(fault.what).splitlines() if line)]
        return cls("\n".join(lines), where=where, fix=fix, problems=listed)


def told(error: BaseException) -> str:
    """Name a foreign exception with its message, if it has any; a plugin's exception may fail to give one."""
    try:
        words = str(error)
    except Exception:
        words = ""
    return f"{type(error).__name__}: {words or 'no message'}"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name closest to ``name``, or ``None`` if none is close."""
    return next(iter(guesses(name, known)), None)


def guesses(name: str, known: Iterable[str]) -> list[str]:
    """Return the known names that may be meant: those that continue ``name``, the shortest first, or else the one closest to it."""
    plain = {each: _plain(each) for each in known}
    begun = [each for each, text in plain.items() if len(name) > 2 and text.startswith(_plain(name))]
    if begun:
        least = min(map(len, begun))
        return [each for each in begun if len(each) == least] if least > len(name) else [min(begun, key=len)]
    close = difflib.get_close_matches(_plain(name), plain.values(), n=1, cutoff=0.5)
    return [each for each, text in plain.items() if text in close][:1]


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")


def did_you_mean(name: str, known: Iterable[str], *, quoted: bool = True) -> str:
    """Return the question by which a name is suggested; empty if none is close."""
    found = [repr(guess) if quoted else guess for guess in guesses(name, known)]
    return f"did you mean {' or '.join(filter(None, [', '.join(found[:-1]), found[-1]]))}?" if found else ""


def unknown_name(kind: str, name: str, known: Iterable[str], *, where: str = "") -> UsageError:
    """Make the error for a name that is not registered: suggest the nearest, and list all; of equally near ones, the first known first."""
    names = list(known)
    fix = did_you_mean(name, names) or ("use one of the known names" if names else "none is installed")
    return UsageError(f"unknown {kind} {name!r}", where=where, fix=fix, known=sorted(names))
