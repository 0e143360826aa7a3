"""Waiting for what other threads and processes do: as long as it takes, which the time limit of a test alone ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from children import Child


def until(condition: Callable[[], object], process: Child | None = None) -> None:
    """Look again and again until it holds; fail where the process that is to bring it about has ended."""
    while not condition():
        if process is not None and process.poll() is not None and not condition():
            raise AssertionError(f"it has ended ({process.returncode}): {process.communicate()[1]}")
        time.sleep(0.005)


def until_threads_end(prefix: str = "bpfree-") -> None:
    """Of trackers, which say what they have to say before."""
    for thread in threading.enumerate():
        if thread.name.startswith(prefix):
            thread.join()
