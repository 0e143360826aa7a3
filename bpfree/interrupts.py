"""Handlers of SIGINT, SIGTERM and SIGHUP (a terminal or a connection that closes) for a limited time."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["NUMBERS", "Handler", "answer", "handling"]

Handler = Callable[[int, Any], Any] | signal.Handlers
NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def answer(handler: Handler) -> None:
    """Install a handler for these signals, except for a hang-up that ``nohup`` ignores."""
    for number in NUMBERS:
        if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


@contextmanager
def handling(handler: Handler) -> Iterator[None]:
    """Install a handler for these signals inside the context, only in the main thread, as ``signal.signal`` requires."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    answer(handler)
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
