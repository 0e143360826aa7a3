"""A command that gets a signal at some moment, from a thread of its own: so it is not missed where a machine is busy."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

from children import Child, call_command


def signalled(folder: Path, number: signal.Signals, checkpoints: int, further: int, *words: str) -> Child:
    """Start ``bpfree WORDS``; it gets the signal after this many checkpoints, and this many times that its thread has run."""
    return Child(_live, number, checkpoints, further, *words, folder=folder)


def _live(number: signal.Signals, checkpoints: int, further: int, *words: str) -> None:
    threading.Thread(target=_signal, args=(number, checkpoints, further), daemon=True).start()
    call_command(*words)


def _signal(number: signal.Signals, checkpoints: int, further: int) -> None:
    seen = _written()
    while checkpoints:
        time.sleep(0.0005)
        now = _written()
        checkpoints, seen = checkpoints - (now != seen), now
    for _ in range(further):
        os.sched_yield()
    os.kill(os.getpid(), number)


def _written() -> int:
    """When the checkpoint was; 0 without one."""
    return next((path.stat().st_mtime_ns for path in Path("runs").glob("*/checkpoints/last.pt")), 0)
