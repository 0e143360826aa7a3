"""What SIGINT and SIGTERM do for as long as something lasts."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Handler", "answer", "handling"]

Handler = Callable[[int, Any], Any] | signal.Handlers
NUMBERS = (signal.SIGINT, signal.SIGTERM)


def answer(handler: Handler) -> None:
    """From now on both are answered so."""
    for number in NUMBERS:
        signal.signal(number, handler)


@contextmanager
def handling(handler: Handler) -> Iterator[None]:
    """Both are answered so inside, and as before afterwards. Only in the main thread, as ``signal.signal``."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    answer(handler)
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
