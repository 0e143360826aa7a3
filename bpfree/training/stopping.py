"""Asking a run to stop: by a signal, or from the program; several processes stop together, after the same step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bpfree import interrupts
from bpfree.training.distributed import World

__all__ = ["Stop"]

REASONS = ("", "asked to stop", "stopped by SIGINT", "stopped by SIGTERM")


class Stop:
    """Whether a run is to end after the step in progress, with a checkpoint.

    Args:
        world: the processes that stop together.

    Attributes:
        asked: why this process was asked to; the empty string: it was not.
        reason: the same once all processes know.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.asked = self.reason = ""

    def ask(self, reason: str) -> None:
        """Ask to stop. May be called from any thread."""
        self.asked = reason
        if self._world.size == 1:
            self.reason = reason

    def forget(self) -> None:
        """Clear the request."""
        self.asked = self.reason = ""

    def confer(self, *flags: bool) -> list[bool]:
        """Exchange requests with the other processes; also return which of some flags any of them has set."""
        code = REASONS.index(self.asked) if self.asked in REASONS else 1
        highest, *answers = self._world.largest(code, *map(float, flags))
        if highest and not self.reason:
            self.reason = self.asked if self.asked and code == highest else REASONS[int(highest)]
        return [bool(answer) for answer in answers]

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask, inside; a second one ends the run at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: Any) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.ask(f"stopped by {signal.Signals(number).name}")

        with interrupts.handling(ask):
            yield
