"""What a tracker is: it brings what a run's log says to a place where people look, and may miss any part of it for any time.

A thread (:class:`~bpfree.tracking.follower.Follower`) reads the log and calls the tracker. How far it has come is kept in the run's
folder (``sent-NAME.json``) together with what the tracker must know to continue, so that an outage, a SIGKILL, a resumed run and
``bpfree track send`` are one operation: read on. Nothing here reads what a tracker has written.
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
    """The store answered, and will never take this."""


class Tracker(ABC):
    """Brings events of a run's log somewhere. Derive from it; only :meth:`send` must be written.

    Args:
        run: its identifier and its folder.
        config: the options ``tracking.*``.

    Attributes:
        name: under which it is registered.
        title: for messages; empty: its name.
        shown: its address, without what is secret in it. At another address the log is read from its beginning.
        patience: seconds that the start of a run waits for the first answer.
        known: what the next session must know, as JSON has it; kept together with the place in the log. Texts are shown with the run.
    """

    name = ""
    title = ""
    shown = ""

    def __init__(self, run: Run, config: TrackingConfig) -> None:
        assert run.folder is not None
        self.folder, self.config = RunFolder(run.folder), config
        self.patience, self.known = config.timeout, dict[str, Any]()

    def check(self) -> None:  # noqa: B027  optional
        """Refuse before anything is trained what can never work here.

        Raises:
            UsageError: an option makes no sense.
            ImportError: a library is missing.
        """

    def holds_run(self) -> bool:
        """Whether what ``known`` names is still there; if not, ``bpfree track send`` reads the log from its beginning."""
        return True

    def probe(self) -> None:  # noqa: B027  optional
        """Look quickly, after a failure, whether trying again makes sense.

        Raises:
            OSError: it does not.
        """

    def open(self, run: Run, began: int, seen: Sequence[Event], again: bool) -> bool:
        """Make ready for :meth:`send`; called once in a session.

        Args:
            run: as the log has it.
            began: when it began for the first time, in milliseconds since 1970.
            seen: events that were sent before.
            again: whether the run was resumed, so that it computes epochs again that were sent.

        Returns:
            Whether what was sent before is there; if not, the log is read from its beginning.

        Raises:
            RefusedError: the store will never take this run. Any other exception: try again.
        """
        return True

    @abstractmethod
    def send(self, events: Sequence[Event]) -> list[tuple[Event, str]]:
        """Bring events, in the order of the log; the end of a session that was resumed has the kind ``stopped``.

        What was sent just before a crash may come once more, and a resumed run computes epochs again: keep one value for each step.

        Returns:
            What can never be taken, with reasons. An exception: try again.
        """


def measured(event: Event, began: int, epoch: int = 0) -> tuple[int, Mapping[str, float]]:
    """Give the step of an event's numbers, and the numbers: none for kinds that measure nothing.

    Steps are the epoch; inside an epoch (``progress``) the update; of the system's use the milliseconds since the run first began.

    Args:
        event: of the log.
        began: when the run began for the first time.
        epoch: the run's last, for results that were measured after its end.

    Raises:
        RefusedError: it is not what such an event must be.
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
        raise RefusedError("it is not as the log must have it") from error
    return 0, {}
