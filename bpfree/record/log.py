"""The log of a run, ``events.jsonl``: one line of strict JSON for each fact, appended, never changed.

Every line has ``event`` and ``time`` (milliseconds since 1970), and

``begin``      ``format``, ``id``, ``name``, ``config``, ``parameters``, ``tags``, ``data``, ``total_epochs``, ``resumed``, ``epoch``,
               ``metrics``: it begins, or is resumed after this epoch; epochs that an earlier session had completed beyond it are
               computed again, and no longer count
``epoch``      ``epoch``, ``metrics``: of a pass over the training split
``progress``   ``step``, ``metrics``: means of the steps since the last such line
``system``     ``metrics``: use of processors, memory, disk, network and GPUs
``artifact``   ``path`` of a file in the folder that is new, or has changed
``end``        ``status``, ``reason``, ``epoch``, ``result``, ``tags``
``result``     ``metrics``: further results, measured after the end
``tags``       ``tags``: further ones
``model``      the run is the best of its study, whose model is kept
``copied``     ``id``: the folder is a copy of another run's, and has this identifier from here on

Numbers that are not finite are the strings ``NaN``, ``Infinity`` and ``-Infinity``, which ``float`` reads. Paths are relative to
the folder.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bpfree import system
from bpfree.errors import BpfreeError, DiskError

__all__ = ["FORMAT", "UNREADABLE", "Event", "EventLog", "now", "strict"]

FORMAT = 2
"""Format number of the log; runs of version 0.1 have no log."""

UNREADABLE = "unreadable"
"""Kind of a line that is not JSON or not an event."""

LOCK_SECONDS = 10.0
"""Seconds that a session waits for the processes of a killed session to end."""

WRITE_SECONDS = 15.0
"""Seconds for which the end of a run retries to write events."""

Event = dict[str, Any]


def now() -> int:
    """Return the time in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def strict(value: Any) -> Any:
    """Replace non-finite numbers by strings (``NaN``, ``Infinity``, ``-Infinity``, as in protobuf's JSON)."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {str(key): strict(entry) for key, entry in value.items()}
    return [strict(entry) for entry in value] if isinstance(value, (list, tuple)) else value


class EventLog:
    """Appends to a run's log, and reads it.

    A line that cannot be written (a full disk) is kept in memory until the next one, or :meth:`close`. The writer holds a lock on the
    file, which the system releases when its process ends.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._pending: deque[bytes] = deque()
        self._file: int | None = None
        self._trouble: OSError | None = None

    # --- writing ----------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Open the file for appending; the rest of a line that a killed process has begun is cut off.

        Raises:
            BpfreeError: another process writes to it, or there is something in its place that is no file, and never will be.
        """
        if self.path.exists() and not self.path.is_file():
            raise BpfreeError("the run's record is no file", where=str(self.path), fix="remove what is in its place")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
            self._take()
            self._cut()
        except OSError as error:
            self._trouble = error

    def _take(self) -> None:
        assert self._file is not None
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                if system.lock(self._file):
                    return
            except OSError:  # a file system without locks
                return
            if time.monotonic() > deadline:
                os.close(self._file)
                self._file = None
                raise BpfreeError("another process trains this run", where=str(self.path.parent), fix="wait until it ends, or stop it")
            time.sleep(0.05)

    def _cut(self) -> None:
        assert self._file is not None
        size = os.fstat(self._file).st_size
        while size:
            os.lseek(self._file, size - 1, os.SEEK_SET)  # what is written is appended all the same
            if os.read(self._file, 1) == b"\n":
                break
            size -= 1
        os.ftruncate(self._file, size)

    def append(self, event: str, **facts: Any) -> None:
        """Append an event; keep it in memory if it cannot be written now."""
        line = json.dumps({"event": event, "time": now(), **strict(facts)}, allow_nan=False, default=str) + "\n"
        with self._lock:
            self._pending.append(line.encode())
            self._write()

    def _write(self) -> bool:
        """Write the events in memory; return whether none is left."""
        if self._file is None:
            self.open()
        try:
            while self._pending and self._file is not None:
                written = os.write(self._file, self._pending[0])
                rest = self._pending.popleft()[written:]
                if rest:
                    self._pending.appendleft(rest)
        except OSError as error:
            self._trouble = error
        return not self._pending

    def close(self, patience: float | None = None) -> None:
        """Write the events in memory, and release the file.

        Args:
            patience: seconds for which writing is retried; ``WRITE_SECONDS`` by default.

        Raises:
            DiskError: the file could not be written.
        """
        deadline = time.monotonic() + (WRITE_SECONDS if patience is None else patience)
        with self._lock:
            while not self._write() and time.monotonic() < deadline:
                time.sleep(0.2)
            if self._file is not None:
                os.close(self._file)
                self._file = None
            lost = len(self._pending)
        if lost:
            reason = self._trouble.strerror if self._trouble else "unknown error"
            raise DiskError(
                f"the run's record could not be written ({reason}): {lost} of its last events are lost",
                where=str(self.path),
                fix="free space on the disk, or choose another with output=FOLDER",
            )

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- reading ----------------------------------------------------------------------------------------------------

    def read(self, start: int = 0, *, without: tuple[str, ...] = ()) -> Iterator[tuple[Event, int]]:
        """Read complete lines.

        Args:
            start: offset in bytes, as an earlier call gave it.
            without: kinds of events to leave out, unparsed.

        Yields:
            Each event, and the offset of what follows it.
        """
        left_out = tuple(f'{{"event": "{kind}"'.encode() for kind in without)
        try:
            file = self.path.open("rb")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return
        with file:
            file.seek(start)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                start += len(line)
                if not (left_out and line.startswith(left_out)):
                    yield _parsed(line), start

    @property
    def size(self) -> int:
        """Size of the file in bytes; 0 if there is none."""
        try:
            return self.path.stat().st_size
        except OSError:
            return 0

    def is_held(self) -> bool:
        """Tell whether a process writes to the log, without changing anything."""
        with suppress(OSError), self.path.open("rb") as file:
            return not system.lock(file.fileno(), shared=True)
        return False


def _parsed(line: bytes) -> Event:
    try:
        content = json.loads(line)
        kind, when = content["event"], content["time"]
        if not isinstance(kind, str) or not isinstance(when, int):
            raise ValueError
        for key in () if kind == "begin" else ("metrics", "result"):  # this field describes metrics, and has no values
            if key in content:
                content[key] = {str(name): float(value) for name, value in content[key].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {"event": UNREADABLE, "time": 0}
    event: Event = content
    return event
