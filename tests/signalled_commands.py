"""A command that gets a signal at a moment that is counted in its own work: it is hit there on a busy machine, too."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from children import Child, call_command


def signalled(folder: Path, number: signal.Signals, checkpoints: int, further: int, *words: str) -> Child:
    """Start ``bpfree WORDS``; it gets the signal after this many checkpoints, and this many calls of functions after the last of them."""
    return Child(_live, number, checkpoints, further, *words, folder=folder)


def _live(number: signal.Signals, checkpoints: int, further: int, *words: str) -> None:
    replace = os.replace

    def count_checkpoints(source: Any, target: Any, **options: Any) -> None:
        nonlocal checkpoints
        replace(source, target, **options)
        if Path(target).name == "last.pt":
            checkpoints -= 1
            if not checkpoints:
                count_calls()

    def count_calls() -> None:
        left = further

        def profile(frame: Any, event: str, argument: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                sys.setprofile(None)
                os.kill(os.getpid(), number)

        sys.setprofile(profile)

    os.replace = count_checkpoints  # type: ignore[assignment]
    if not checkpoints:
        count_calls()
    call_command(*words)
