"""What a run has to tell the store, and the file that keeps it while the store is away.

The spool ``tracking-unsent.jsonl`` holds one JSON object per line, each with the key ``event``:

``open``       first line: ``uri``, ``experiment``, ``name``, ``time`` (ms since 1970), ``tags``, ``params``, ``dataset``
               and ``run_id`` (``null`` if the run was never created in the store)
``metrics``    ``time``, ``step``, ``values``
``tags``       ``values``
``artifact``   ``path`` of a file here, ``folder`` in the store
``text``       ``name`` of a file in the store, ``text``
``end``        ``status`` (FINISHED, FAILED or KILLED), ``time``

A line with ``rejected`` holds something that the store refused, with its reason; it is not sent again. Non-finite numbers
are the strings ``NaN``, ``Infinity`` and ``-Infinity``, so that every line is strict JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bpfree.files import write_text

__all__ = ["SPOOL_NAME", "Artifact", "End", "Event", "Metrics", "Opening", "Spool", "Tags", "Text", "strict"]

SPOOL_NAME = "tracking-unsent.jsonl"


@dataclass
class Opening:
    """A run as it is created in the store; ``dataset`` is its name and digest."""

    uri: str
    experiment: str
    name: str
    time: int
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    dataset: tuple[str, str] | None = None
    run_id: str | None = None


@dataclass
class Metrics:
    """Values of one moment."""

    time: int
    step: int
    values: dict[str, float]


@dataclass
class Tags:
    """Tags to set."""

    values: dict[str, str]


@dataclass
class Artifact:
    """A file to upload."""

    path: str
    folder: str


@dataclass
class Text:
    """A small file to write in the store."""

    name: str
    text: str


@dataclass
class End:
    """The run is over."""

    status: str
    time: int


Event = Metrics | Tags | Artifact | Text | End
_KINDS: dict[str, type[Any]] = {"open": Opening, "metrics": Metrics, "tags": Tags, "artifact": Artifact, "text": Text, "end": End}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def strict(value: Any) -> Any:
    """The value with its non-finite numbers as strings (``NaN``, ``Infinity``, ``-Infinity``, as in protobuf's JSON)."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {str(key): strict(entry) for key, entry in value.items()}
    return [strict(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def encode(event: Event | Opening, rejected: str = "") -> str:
    """One line of the spool."""
    line = {"event": _NAMES[type(event)], **dataclasses.asdict(event)}
    return json.dumps(strict(line | ({"rejected": rejected} if rejected else {})), allow_nan=False, default=str)


def decode(line: str) -> Event | Opening | None:
    """Inverse of :func:`encode`; ``None`` for a line that is not to be sent (rejected, or cut off by a crash)."""
    try:
        content = json.loads(line)
        kind = _KINDS[content.pop("event")]
        if "rejected" in content:
            return None
        event: Event | Opening = kind(**content)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if isinstance(event, Metrics):
        event.values = {key: float(value) for key, value in event.values.items()}
    if isinstance(event, Opening) and event.dataset is not None:
        event.dataset = (event.dataset[0], event.dataset[1])
    return event


class Spool:
    """The file of what is not sent; does nothing where a run has no folder.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._lines = 0  # events in the file, if it begins like what is pending
        self._exists = False

    def read(self) -> tuple[Opening | None, list[Event]]:
        """What an earlier session of the run left behind."""
        if self.path is None or not self.path.is_file():
            return None, []
        self._exists = True
        events = [decode(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        opening = next((event for event in events if isinstance(event, Opening)), None)
        return opening, [event for event in events if event is not None and not isinstance(event, Opening)]

    def keep(self, opening: Opening, events: Sequence[Event], rejected: Iterable[tuple[Event, str]] = (), *, whole: bool) -> None:
        """Make the file hold these; without ``whole``, only what was added since the last time is written."""
        if self.path is None:
            return
        if not whole and 0 < self._lines <= len(events):
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(f"{encode(event)}\n" for event in events[self._lines :])
        else:
            lines = [encode(opening), *map(encode, events), *(encode(event, reason) for event, reason in rejected)]
            write_text(self.path, "".join(f"{line}\n" for line in lines))
        self._lines, self._exists = len(events), True

    def outdated(self) -> None:
        """Something of it is sent: it is written again the next time."""
        self._lines = 0

    def clear(self) -> None:
        """Everything is sent."""
        if self.path is not None and self._exists:
            self.path.unlink(missing_ok=True)
        self._lines, self._exists = 0, False
