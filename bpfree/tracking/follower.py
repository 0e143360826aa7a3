"""The thread that sends the events of a run's log to a store: in order, in batches, with retries.

Its position is kept in the run's folder, from which any later reader continues (after an outage, a SIGKILL, in a resumed run, by
``bpfree track send``). An event that is sent twice has the same time, step and value, of which a store keeps one; epochs that a resumed
run repeats are not sent again.
"""

from __future__ import annotations

import itertools
import logging
import re
import threading
from contextlib import suppress

from bpfree.record.folder import Cursor, read_events
from bpfree.record.log import UNREADABLE, Event
from bpfree.redaction import redact
from bpfree.tracking.tracker import RefusedError, Tracker

__all__ = ["Follower"]

logger = logging.getLogger("bpfree.tracking")

PER_BATCH = 500
LONGEST_WAIT = 30.0


class Follower:
    """Reads a run's log, and sends what is new.

    Args:
        tracker: where events are sent.
        interval: seconds between batches.
    """

    def __init__(self, tracker: Tracker, *, interval: float) -> None:
        self._folder, self._log, self._tracker, self._interval = tracker.folder, tracker.folder.log, tracker, interval
        self._keeping = threading.Lock()
        self._path = self._folder.cursor(tracker.name)
        self.cursor = Cursor.read(self._path)
        if self.cursor.store != tracker.shown:
            self.cursor = Cursor(store=tracker.shown)
        tracker.known = self.cursor.known
        self._title = f"{tracker.title or tracker.name} at {tracker.shown}"
        self._session = 0  # position in the log at which the last session begins
        self._failures = 0
        self._warned = self._abandoned = self._closing = self._hopeless = self._opened = False
        self._wake, self._tried, self._done = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"bpfree-{tracker.name}", daemon=True)
        self.reason = ""

    # --- the run's thread -------------------------------------------------------------------------------------------

    def start(self, patience: float) -> bool:
        """Start; wait until the run exists in the store, the first attempt has failed, or ``patience`` seconds are over."""
        self._thread.start()
        if not self._tried.wait(patience):
            self.reason = f"no answer in {patience:g} s"
        return self._opened

    def close(self) -> None:
        """Make the thread stop at the end of the log, which is complete."""
        if not self._closing:
            self._hopeless = self._failures > 0
        self._closing = True
        self._wake.set()

    def finish(self, patience: float) -> bool:
        """Read to the end of the log, for at most ``patience`` seconds; return whether everything was sent."""
        self.close()
        try:
            self._done.wait(patience)
        finally:  # the user may interrupt the wait
            self._abandoned = True
        complete = self._done.is_set() and self.cursor.offset >= self._log.size
        if not complete:
            self.warn(self.reason or f"not done after {patience:g} s")
        elif self._warned and not self.cursor.refused:
            logger.info("%s is available again: everything was sent", self._title)
        return complete

    def stop(self) -> None:
        """Stop at once, and write nothing more."""
        with self._keeping:
            self._abandoned = self._closing = True
        self._wake.set()

    def warn(self, reason: str) -> None:
        """Warn once in a run that something could not be sent, and how to send it later."""
        if self._warned:
            return
        self._warned = True
        fix = f"missing data are in {self._log.path}: send them later with `bpfree track send {self._folder.path}`"
        logger.warning("%s: %s. The run continues; %s", self._title, redact(reason), fix)

    # --- the thread -------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._abandoned:
            closing = self._closing
            self._attempt()
            self._tried.set()
            if closing and (self._failures == 0 or self._hopeless):
                break  # everything is sent, or the store was unavailable before the end, and one last attempt is enough
            wait = min(LONGEST_WAIT, self._interval * 2 ** min(self._failures, 10)) if self._failures else self._interval
            self._wake.wait(min(wait, 1.0) if closing else wait)
            self._wake.clear()
        self._done.set()

    def _attempt(self) -> None:
        try:
            if self._failures:
                self._tracker.probe()
            if not self._opened:
                self._open()
            while not self._abandoned and self._send_next():
                pass
        except Exception as error:
            self._failures += 1
            self._hopeless = self._hopeless or isinstance(error, RefusedError)
            self.reason = _reason(error)
            if self._tried.is_set() and not self._abandoned:  # the run's thread reports the first attempt
                self.warn(self.reason)
            return
        self._failures = 0

    def _open(self) -> None:
        events, begins, at = list[tuple[Event, int]](), list[Event](), 0
        for event, offset in self._log.read():
            if event["event"] == "begin":
                self._session = at
                begins.append(event)
            at = offset
            events.append((event, offset))
        run = read_events(event for event, _ in events)
        if run is None:
            raise RefusedError("the log has no beginning of a run")
        run.folder = self._folder.path
        self._keep()
        seen, wanted = [event for event, offset in events if offset <= self.cursor.offset], dict(self.cursor.known)
        if not self._tracker.open(run, begins[0]["time"], seen, len(begins) > 1):
            self.cursor.offset, self.cursor.refused = 0, []
            if wanted:
                logger.info("%s does not have the run, which is sent from its beginning", self._title)
        self._opened = True
        self._keep()

    def _send_next(self) -> bool:
        """Send the next batch, if there is one."""
        batch = list(itertools.islice(self._log.read(self.cursor.offset), PER_BATCH))
        if not batch:
            return False
        for event, offset in batch:
            if event["event"] == "end" and offset <= self._session:
                event["event"] = "stopped"
        refused = self._tracker.send([event for event, _ in batch])
        refused += [(event, "it cannot be read") for event, _ in batch if event["event"] == UNREADABLE]
        for event, reason in refused:
            self.warn(f"{_title(event)} was not sent: {reason}")
        self.cursor.refused += [
            {**event, "reason": redact(reason)} for event, reason in refused
        ]  # the event "end" has a field "reason" too
        self.cursor.offset = batch[-1][1]
        self._keep()
        return True

    def _keep(self) -> None:
        with self._keeping, suppress(OSError):  # a full disk: events are then sent once more, which is harmless
            if not self._abandoned:
                self.cursor.write(self._path)


def _title(event: Event) -> str:
    return f"a line of the log ({event['event']})" if "path" not in event else f"the file {event['path']}"


def _reason(error: BaseException) -> str:
    """Return the first line of an error; for a failed request only its kind, because its text repeats address and library."""
    kind = re.search(r"failed with exception .*?(?:Caused by |: )(\w+)\(", str(error))
    if kind:
        return f"a request failed ({kind[1]})"
    return next(itertools.chain(str(error).splitlines(), [type(error).__name__]))[:300]
