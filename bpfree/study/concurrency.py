"""Count the cells that run on this machine: each worker locks a file while it runs a cell, and locked files are counted.

Two cells that run at the same time on a GPU slow each other down, so their timings cannot be compared with those of a cell that ran alone.
A crash releases the lock.
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from bpfree import system

__all__ = ["Concurrency", "present"]


class Concurrency:
    """Counts the cells that run here at the same time.

    Attributes:
        most: the largest count so far, this cell included.
    """

    def __init__(self, folder: Path, own: Path) -> None:
        self._folder, self._own = folder, own
        self.most = 1
        self.look()

    def look(self) -> None:
        """Count the running cells and update the maximum."""
        others = [path for path in self._folder.glob(f"{_host()}-*") if path != self._own]
        self.most = max(self.most, 1 + sum(map(_is_held, others)))


@contextmanager
def present(folder: Path) -> Iterator[Concurrency]:
    """Hold a locked file, which other workers count, while a cell runs.

    Args:
        folder: common to all studies whose cells may run at the same time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own, file = _own_file(folder)
    try:
        with file:
            yield Concurrency(folder, own)
    finally:
        own.unlink(missing_ok=True)


def _own_file(folder: Path) -> tuple[Path, BinaryIO]:
    """Create and lock a new file; if another process removes it as stale before it is locked, try again."""
    while True:
        own = folder / f"{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
        file = own.open("wb")
        with contextlib.suppress(OSError):  # without locks no cells are counted
            system.lock(file.fileno(), wait=True)
        if own.exists():
            return own, file
        file.close()


def _is_held(path: Path) -> bool:
    try:
        with path.open("rb+") as file:
            if not system.lock(file.fileno()):
                return True
            with contextlib.suppress(OSError):
                path.unlink()  # its process has died
    except OSError:
        pass
    return False


def _host() -> str:
    return platform.node().replace("/", "_") or "here"
