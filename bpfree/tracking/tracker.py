"""The interface of trackers, which send a run's log to a store or file, and may be unavailable at any time.

A thread (:class:`~bpfree.tracking.follower.Follower`) reads the log and calls the tracker. Its position is kept in the run's folder
(``sent-NAME.json``) with the facts that the tracker needs to continue, so that recovery from an outage, a SIGKILL, a resumed run and
``bpfree track send`` are one operation: continue to read. No other part of bpfree reads the output of a tracker.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bpfree.record.folder import RunFolder
from bpfree.record.log import Event
from bpfree.run import Run

if TYPE_CHECKING:
    from bpfree.tracking.config import TrackingConfig

__all__ = ["RefusedError", "Tracker", "measured"]


class RefusedError(Exception):
    """The store answered that it will never accept an event."""


class Tracker(ABC):
    """Base class of trackers, which send the events of a run's log; subclasses must define only :meth:`send`.

    Args:
        run: its identifier and its folder.
        config: the options ``tracking.*``.

    Attributes:
        name: under which it is registered.
        title: for messages; empty: its name.
        shown: its address without secrets. At another address the log is read from its beginning.
        patience: seconds that the start of a run waits for the first answer.
        known: facts for the next session, as JSON values, kept with the position in the log. Texts are shown with the run.
    """

    name = ""
    title = ""
    shown = ""

    def __init__(self, run: Run, config: TrackingConfig) -> None:
        assert run.folder is not None
        self.folder, self.config = RunFolder(run.folder), config
        self.patience, self.known = config.timeout, dict[str, Any]()

    def check(self) -> None:  # noqa: B027  optional
        """Refuse a configuration that can never work here, before anything is trained.

        Raises:
            UsageError: an option is invalid.
            ImportError: a library is missing.
        """

    def holds_run(self) -> bool:
        """Tell whether the run that ``known`` names still exists; if not, ``bpfree track send`` reads the log from its beginning."""
        return True

    def probe(self) -> None:  # noqa: B027  optional
        """Check quickly, after a failure, whether another attempt can succeed.

        Raises:
            OSError: it cannot.
        """

    def open(self, run: Run, began: int, seen: Sequence[Event], again: bool) -> bool:
        """Prepare for :meth:`send`; called once in a session.

        Args:
            run: as the log has it.
            began: when it began for the first time, in milliseconds since 1970.
            seen: events that were sent before.
            again: whether the run was resumed, so that it may repeat epochs that were sent.

        Returns:
            Whether the earlier events are still there; if not, the log is read from its beginning.

        Raises:
            RefusedError: the store will never accept this run. After any other exception, the call is repeated.
        """
        return True

    @abstractmethod
    def send(self, events: Sequence[Event]) -> list[tuple[Event, str]]:
        """Send events in the order of the log; the end of a session that was resumed has the kind ``stopped``.

        Events that were sent just before a crash may be repeated, and a resumed run repeats epochs: keep one value for each step.

        Returns:
            The events that can never be accepted, with reasons. After an exception, the call is repeated.
        """


def measured(event: Event, began: int, epoch: int = 0) -> tuple[int, Mapping[str, float]]:
    """Return the step of an event's metrics, and the metrics: none for kinds that measure nothing.

    Steps are the epoch; inside an epoch (``progress``) the update; of the system's use the milliseconds since the run first began.

    Args:
        event: of the log.
        began: when the run began for the first time.
        epoch: the run's last, for results that were measured after its end.

    Raises:
        RefusedError: the event is malformed.
    """
    try:
        match event["event"]:
            case "epoch":
                return int(event["epoch"]), event["metrics"]
            case "progress":
                step = event["metrics"]["step"]
                return int(step), {name: value for name, value in event["metrics"].items() if name != "step"}
            case "system":
                return event["time"] - began, event["metrics"]
            case "end" | "stopped":
                return int(event["epoch"]), event["result"]
            case "result":
                return epoch, event["metrics"]
    except (KeyError, TypeError, ValueError) as error:
        raise RefusedError("the event is malformed") from error
    return 0, {}
