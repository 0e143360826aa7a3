"""A clock that tests move."""

from __future__ import annotations


class Time:
    """In place of the module ``time``: stands still unless it is moved; the processor works half of the time."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return 100 + self.now / 2
