"""Requirements on a message of bpfree: what, where, and what to do; an exit code of 1 or 2; no traceback."""

from __future__ import annotations

import re

__all__ = ["faults_of"]


REMEDY = r"(did you mean|known:|known here:|must|set one of|write the value|lists them|give|has no parts|cannot be set)"
ONE_SENTENCE = rf"^(error: |  - )(unknown \w+ |[\w.]+=?[^ ]*[ :]).*{REMEDY}"
"""Message on a setting: its name is the place, and the sentence says what it must be, or gives the nearest name."""


def faults_of(text: str, code: int, *, refused: bool) -> list[str]:
    """Say what is wrong with the output of a command and its exit code.

    Args:
        text: its output.
        code: its exit code.
        refused: whether it must refuse; else it may also take what it was given, or do without it.
    """
    shown = text[-700:]  # a plugin may raise anything, if the message names the plugin
    if "Traceback (most recent call last)" in text:
        return [f"a traceback: {shown}"]
    if code not in ((1, 2) if refused else (0, 1, 2)):
        return [f"exit code {code}: {shown}"]
    if code == 0:
        return []
    if "error: unexpected" in text and not re.search(r"^  where: .*/odd/__init__.py, line", text, re.M):
        return [f"an unexpected error: {shown}"]
    if not re.search(r"^error: \S", text, re.M):
        return [f"no message: {shown}"]
    if re.search(ONE_SENTENCE, text, re.M):
        return []
    missing = [part for part in ("where:", "fix:") if not re.search(rf"^\s+{part}\s+\S", text, re.M)]
    usage = "Usage: bpfree" in text  # a word of the command line, which is the place, and how to use it
    return [f"a message without {' and '.join(missing)} {shown}"] if missing and not usage else []
