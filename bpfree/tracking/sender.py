"""The thread that brings events to the store: in order, in batches, again and again if it must.

Events wait in memory. While the store is away they also lie in the spool file, so that a run that is killed loses
nothing but the last moments; a run that is resumed sends them first. Sending a metric twice is harmless (the store keeps
one point per key, time, step and value); a resumed run, which computes some steps again, skips those that are there.
"""

from __future__ import annotations

import itertools
import logging
import queue
import re
import threading
from collections import deque
from collections.abc import Sequence

from bpfree.tracking.events import End, Event, Metrics, Opening, Spool, Tags
from bpfree.tracking.store import RefusedError, Store, redact

__all__ = ["Sender"]

logger = logging.getLogger("bpfree.tracking")

PER_CALL = 1000
LONGEST_WAIT = 30.0


class Sender:
    """Sends what is put into it.

    Args:
        store: where to.
        opening: the run; its ``run_id`` is set once it exists there.
        spool: keeps what cannot be sent.
        interval: seconds between batches.
        earlier: events that an earlier session of the run could not send.
        again: the run goes on, so that the store may know some of its metrics.
    """

    def __init__(
        self, store: Store, opening: Opening, spool: Spool, *, interval: float, earlier: Sequence[Event] = (), again: bool = False
    ) -> None:
        self._store, self._opening, self._spool, self._interval = store, opening, spool, interval
        self._inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._pending: deque[Event] = deque(earlier)
        self._rejected: list[tuple[Event, str]] = []
        self._again = again
        self._known = True  # whether the store may have metrics that were not sent from here
        self._steps: dict[str, int] = {}  # last step of each key in the store, for a run that goes on
        self._failures = 0
        self._warned = self._abandoned = self._closing = self._hopeless = False
        self._lock = threading.Lock()  # around the pending events and the spool
        self._wake = threading.Event()
        self._tried = threading.Event()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._work, name="bpfree-tracking", daemon=True)
        self.run_id: str | None = None
        self.reason = ""

    # --- the run's thread -------------------------------------------------------------------------------------------

    def start(self, patience: float) -> bool:
        """Begin; waits until the run exists in the store, or the first attempt has failed, or for so many seconds."""
        self._thread.start()
        if not self._tried.wait(patience):
            self.reason = f"no answer in {patience:g} s"
        return self.run_id is not None

    def put(self, event: Event) -> None:
        """Hand over an event; takes microseconds."""
        self._inbox.put(event)

    def finish(self, patience: float) -> bool:
        """Send the rest, for at most so many seconds; what is left goes to the spool. Returns whether all was sent."""
        self._hopeless = self._failures > 0
        self._closing = True
        self._wake.set()
        try:
            self._done.wait(patience)
        finally:  # an impatient person interrupts
            with self._lock:
                self._abandoned = True
                self._drain()
                complete = self.run_id is not None and not self._pending
                if not complete or self._rejected:
                    self._spool.keep(self._opening, list(self._pending), self._rejected, whole=True)
        if not complete:
            self.warn(self.reason or f"not done after {patience:g} s")
        elif self._warned and not self._rejected:
            logger.info("MLflow at %s is back: everything was sent", self._store.shown)
        return complete

    def stop(self) -> None:
        """Give up at once, and write no file."""
        with self._lock:
            self._abandoned = self._closing = True
        self._wake.set()

    def warn(self, reason: str) -> None:
        """Say once in a run that something could not be sent, and where it lies."""
        if self._warned:
            return
        self._warned = True
        lies = f"what cannot be sent is kept in {self._spool.path}, to be sent later" if self._spool.path else "what cannot be sent is lost"
        logger.warning("MLflow at %s: %s. The run goes on; %s", self._store.shown, redact(reason), lies)

    # --- the sender's thread ----------------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._abandoned:
            closing = self._closing
            self._attempt()
            self._tried.set()
            if closing and (self._failures == 0 or self._hopeless):
                break  # everything is sent; or it was away before the end, and one last attempt is enough
            wait = min(LONGEST_WAIT, self._interval * 2 ** min(self._failures, 10)) if self._failures else self._interval
            self._wake.wait(min(wait, 1.0) if closing else wait)
            self._wake.clear()
        self._done.set()

    def _attempt(self) -> None:
        with self._lock:
            self._drain()
        try:
            if self._failures:
                self._store.probe()
            self._open()
            while not self._abandoned and self._send_next():
                pass
        except Exception as error:
            self._failures += 1
            self.reason = _reason(error)
            if self._tried.is_set() and not self._abandoned:  # of the first attempt, the run's thread speaks
                self.warn(self.reason)
                self._keep()
            return
        self._failures = 0
        with self._lock:
            if not self._abandoned:
                self._spool.clear()

    def _drain(self) -> None:
        while True:
            try:
                self._pending.append(self._inbox.get_nowait())
            except queue.Empty:
                return

    def _open(self) -> None:
        if self.run_id is not None:
            return
        wanted = self._opening.run_id
        self._known = self._store.open(self._opening, search=self._again or self._failures > 0)
        if wanted is not None and wanted != self._opening.run_id:
            logger.info("MLflow at %s has no run %s: a new one begins", self._store.shown, wanted)
        self.run_id = self._opening.run_id

    def _send_next(self) -> bool:
        """Send the next batch, if there is one."""
        with self._lock:
            batch = self._next_batch()
        if not batch:
            return False
        self._send(self._unknown(batch))
        with self._lock:
            if not self._abandoned:
                for _ in batch:
                    self._pending.popleft()
                self._spool.outdated()
        return True

    def _next_batch(self) -> list[Event]:
        """Metrics and tags together up to what one call takes; anything else alone."""
        batch: list[Event] = []
        size = 0
        for event in self._pending:
            together = isinstance(event, (Metrics, Tags))
            size += len(event.values) if isinstance(event, (Metrics, Tags)) else PER_CALL
            if batch and (size > PER_CALL or not together):
                break
            batch.append(event)
            if not together:
                break
        return batch

    def _send(self, events: Sequence[Event]) -> None:
        """Send together; if the store refuses, one by one, and put aside what it refuses."""
        if not events or self.run_id is None:
            return
        try:
            self._store.send(self.run_id, events)
        except RefusedError as error:
            if len(events) > 1:
                for event in events:
                    self._send([event])
                return
            self._rejected.append((events[0], str(error)))
            self.warn(f"it refuses a {type(events[0]).__name__.lower()}: {error}")
        else:
            self._note(events)

    def _note(self, events: Sequence[Event]) -> None:
        if self._again:
            for event in events:
                if isinstance(event, Metrics):
                    self._steps.update(dict.fromkeys(event.values, event.step))

    def _unknown(self, events: Sequence[Event]) -> list[Event]:
        """Without the metrics of a resumed run that the store has already: the steps of a key only ever grow."""
        if not self._again:
            return list(events)
        seen: dict[str, int] = {}
        kept: list[Event] = []
        for event in events:
            if isinstance(event, Metrics):
                event = Metrics(
                    event.time, event.step, {k: v for k, v in event.values.items() if event.step > seen.get(k, self._last_step(k))}
                )
                seen.update(dict.fromkeys(event.values, event.step))
            kept.append(event)
        return kept

    def _last_step(self, key: str) -> int:
        if key not in self._steps:
            assert self.run_id is not None
            self._steps[key] = self._store.last_step(self.run_id, key) if self._known else -1
        return self._steps[key]

    def _keep(self) -> None:
        with self._lock:
            if not self._abandoned:
                self._drain()
                self._spool.keep(self._opening, list(self._pending), self._rejected, whole=False)


def _reason(error: BaseException) -> str:
    """The first line, and of a failed request only its kind, because its text repeats address and library."""
    kind = re.search(r"failed with exception .*?(?:Caused by |: )(\w+)\(", str(error))
    if kind:
        return f"a request failed ({kind[1]})"
    return next(itertools.chain(str(error).splitlines(), [type(error).__name__]))[:300]


def without_end(events: Sequence[Event]) -> list[Event]:
    """Events of a session that ended, for a run that goes on."""
    return [event for event in events if not isinstance(event, End)]
