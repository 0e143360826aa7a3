"""Requests to stop a run, by a signal or from the program; several processes stop together, after the same step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bpfree import interrupts
from bpfree.errors import BpfreeError
from bpfree.run import PAUSED
from bpfree.training.distributed import World

__all__ = ["Interrupted", "Stop", "paused_at"]

CONFER_EVERY = 20
"""Steps between the moments at which several processes agree whether to report, save or stop."""

REASONS = ("", "asked to stop", *(f"stopped by {number.name}" for number in interrupts.NUMBERS))


def paused_at(epoch: int) -> str:
    """Return the reason of a run that was interrupted after an epoch because it was to pause there."""
    return f"{PAUSED} {epoch}"


class Interrupted(BpfreeError):
    """The run was asked to stop (by a signal, or ``Trainer.stop``) and has saved a checkpoint to resume from.

    Attributes:
        exit_code: 128 and the number of the signal, as shells have it; that of SIGINT without one.
    """

    def __init__(self, reason: str, folder: Path | None) -> None:
        self.exit_code = 128 + next((number for number in interrupts.NUMBERS if number.name in reason), signal.SIGINT)
        super().__init__(reason, fix=f"resume it with: bpfree train --resume {folder}" if folder else "")


class Stop:
    """A request to end a run after the step in progress, with a checkpoint.

    Args:
        world: the processes that stop together.

    Attributes:
        asked: why this process was asked to stop; the empty string if it was not.
        reason: why the run stops, once all processes know.
        ending: why the training ends early, as if its budget were used up; the empty string if it does not.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.asked = self.reason = self.ending = ""

    def ask(self, reason: str) -> None:
        """Request a stop; may be called from any thread."""
        self.asked = reason
        if self._world.size == 1:
            self.reason = reason

    def forget(self) -> None:
        """Clear the request."""
        self.asked = self.reason = self.ending = ""

    def obey(self, folder: Path | None) -> None:
        """End the work in progress, if all processes know of the request.

        Raises:
            Interrupted: they were.
        """
        if self.reason:
            raise Interrupted(self.reason, folder)

    def confer(self, *flags: bool) -> list[bool]:
        """Exchange stop requests with the other processes, and return which of some flags any of them has set."""
        code = REASONS.index(self.asked) if self.asked in REASONS else 1
        highest, *answers = self._world.largest(code, *map(float, flags))
        if highest and not self.reason:
            self.reason = self.asked if self.asked and code == highest else REASONS[int(highest)]
        return [bool(answer) for answer in answers]

    def is_time(self, step: int, due: bool) -> bool:
        """Tell whether to do now what is ``due``; several processes agree on the answer of the first, at every 20th step."""
        if self._world.size == 1:
            return due
        return step % CONFER_EVERY == 0 and self.confer(due and self._world.first)[0]

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Request a stop on a signal inside; a second one ends the run at once.

        A signal that came too late to stop the run is passed on when it has ended.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        received: list[int] = []

        def ask(number: int, frame: Any) -> None:
            received.append(number)
            if self.asked:
                raise KeyboardInterrupt
            self.ask(f"stopped by {signal.Signals(number).name}")

        with interrupts.handling(ask):
            yield
        if received:
            signal.raise_signal(received[0])
