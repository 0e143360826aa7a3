"""Errors that say what is wrong, where, and what to do about it.

Every failure that a user can cause or mend is a :class:`BpfreeError`; the command line prints it without a
traceback and exits with its ``exit_code`` (2: the request was wrong, 1: the work failed).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from bpfree.redaction import redact

__all__ = ["BpfreeError", "DiskError", "UsageError", "nearest", "told", "unknown_name"]


class BpfreeError(Exception):
    """A failure with a place and a remedy; addresses in it are shown without passwords.

    Args:
        what: one sentence on what is wrong.
        where: the key, file, block or plugin concerned.
        fix: what the reader can do now.
        problems: the single faults, where ``what`` sums up several.

    Attributes:
        problems: the single faults; without several, the one sentence with its place and remedy.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", fix: str = "", problems: Iterable[str] = ()) -> None:
        what, where, fix = self.what, self.where, self.fix = redact(what), redact(where), redact(fix)
        more = "; ".join(part for part in (where, fix) if part)
        self.problems = [redact(problem) for problem in problems] or [f"{what} ({more})" if more else what]
        lines = [what]
        if where:
            lines.append(f"  where: {where}")
        if fix:
            lines.append(f"  fix:   {fix}")
        super().__init__("\n".join(lines))


class DiskError(BpfreeError):
    """A file could not be written because of the disk; the work can be resumed."""


class UsageError(BpfreeError):
    """The request itself cannot be carried out as it stands (command line, configuration, arguments)."""

    exit_code = 2

    @classmethod
    def of(cls, problems: Iterable[str], place: str, *, where: str = "", fix: str = "") -> UsageError:
        """Make one error of all problems in a place, such as ``study``; each problem counts once."""
        listed = list(dict.fromkeys(problems))
        several = f"{len(listed)} problems in the {place}:\n" + "\n".join(f"  - {problem}" for problem in listed)
        return cls(listed[0] if len(listed) == 1 else several, where=where, fix=fix, problems=listed)


def told(error: BaseException) -> str:
    """Name a foreign exception with its message, if it has any; a plugin's exception may fail to give one."""
    try:
        words = str(error)
    except Exception:
        words = ""
    return f"{type(error).__name__}: {words or 'no message'}"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name closest to ``name``, or ``None`` if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return close[0] if close else None


def unknown_name(kind: str, name: str, known: Iterable[str], *, where: str = "") -> UsageError:
    """Make the error for a name that is not registered: suggest the nearest, and list all."""
    names = sorted(known)
    guess = nearest(name, names)
    fix = f"did you mean {guess!r}? " if guess else ""
    return UsageError(f"unknown {kind} {name!r}", where=where, fix=f"{fix}known: {', '.join(names) or 'none'}")
