"""The folder of a run: the paths of its files, and the state of the run by its log."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bpfree.errors import BpfreeError
from bpfree.files import inside, write_text
from bpfree.record.log import Event, EventLog
from bpfree.run import Run

__all__ = ["Cursor", "RunFolder", "read_run"]

CURSOR = "sent-{}.json"


class RunFolder:
    """Names the files of a run.

    Args:
        path: of the folder.

    Attributes:
        config, plan, predictions: files.
        checkpoints, plots, pictures, code: folders; ``code`` has copies of files of code, which are never executed.
        last, selected: checkpoints.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config, self.plan, self.predictions = self.path / "config.yaml", self.path / "plan.txt", self.path / "predictions.npz"
        self.checkpoints, self.plots, self.pictures = self.path / "checkpoints", self.path / "plots", self.path / "pictures"
        self.code = self.path / "code"
        self.last, self.selected = self.checkpoints / "last.pt", self.checkpoints / "selected.pt"

    @property
    def log(self) -> EventLog:
        """Log of the run, to be read, or to be written by one process."""
        return EventLog(self.path / "events.jsonl")

    def cursor(self, reader: str) -> Path:
        """Return the file with the position of a reader of the log."""
        return self.path / CURSOR.format(quote(reader, safe=""))

    def cursors(self) -> list[Path]:
        """List the files with the positions of all readers of the log."""
        return sorted(self.path.glob(CURSOR.format("*")))

    def relative(self, path: Path) -> str | None:
        """Convert a path to the relative path in the log; ``None`` for a path outside of the folder."""
        with contextlib.suppress(ValueError):
            return Path(os.path.abspath(path)).relative_to(os.path.abspath(self.path)).as_posix()
        return None

    def inside(self, name: str) -> Path | None:
        """Resolve a path of the log; ``None`` if it leads out of the folder, also through a symbolic link."""
        return inside(self.path, name)

    def files(self) -> Iterator[Path]:
        """List the files that a run makes, apart from its log and its readers' files."""
        return iter((self.config, self.plan, self.predictions, self.checkpoints, self.plots, self.pictures, self.code))

    def end_if_killed(self) -> bool:
        """Record the end of a run whose process was killed; the run can still be resumed.

        Returns:
            Whether the process was killed.

        Raises:
            BpfreeError: there is no log of a run.
        """
        run = read_run(self.path)
        if run.status != "running" or self.log.is_held():
            return False
        with self.log as log:
            log.append("end", status="interrupted", reason="its process was killed", epoch=run.epoch, result={}, tags={})
        return True

    def name_copy(self) -> str | None:
        """Give a copied run folder a new identifier, so that readers of its log create another run.

        A moved folder keeps its identifier: a folder is a copy only if the original still exists.

        Returns:
            The identifier; ``None`` if the folder is not a copy.
        """
        if not any(Cursor.read(path).is_copy(path) for path in self.cursors()):
            return None
        run = read_run(self.path)
        own = self.path.name if self.path.name != run.id else f"{run.id}-{secrets.token_hex(3)}"
        with self.log as log:
            log.append("copied", id=own, original=run.id)
        for path in self.cursors():
            path.unlink()
        return own


@dataclass
class Cursor:
    """The position of a reader of a log.

    Attributes:
        store: address to which it sends the events, without secrets.
        offset: bytes of the log that it has read.
        known: what it needs to continue, such as the run's identifier in a store.
        refused: events that the store refused, each with the reason.
        place: where this was written: machine, file, and the inode of its folder.
    """

    store: str = ""
    offset: int = 0
    known: dict[str, Any] = field(default_factory=dict)
    refused: list[dict[str, Any]] = field(default_factory=list)
    place: list[Any] = field(default_factory=list)

    @property
    def told(self) -> dict[str, str]:
        """Texts of ``known`` that a run shows, such as an identifier in a store."""
        return {name: value for name, value in self.known.items() if isinstance(value, str)}

    @classmethod
    def read(cls, path: Path) -> Cursor:
        """Read a cursor's file; start at the beginning of the log if the file is missing or damaged."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            cursor = cls(
                str(content["store"]), int(content["offset"]), dict(content["known"]), list(content["refused"]), list(content["place"])
            )
        except (OSError, ValueError, TypeError, KeyError):
            return cls()
        return cursor

    def is_copy(self, path: Path) -> bool:
        """Tell whether a cursor's file was copied with its folder, so that the original still exists where it was written.

        Args:
            path: of the file.
        """
        return bool(self.place) and self.place != _place(path) and self.place == _place(Path(self.place[1]))

    def write(self, path: Path) -> None:
        """Write the cursor by replacing its file.

        Raises:
            OSError: it cannot be written.
        """
        self.place = _place(path)
        content = {"store": self.store, "offset": self.offset, "known": self.known, "refused": self.refused, "place": self.place}
        write_text(path, json.dumps(content, indent=2, default=str) + "\n")


def _place(path: Path) -> list[Any]:
    try:
        number = path.parent.stat().st_ino
    except OSError:
        number = 0
    return [socket.gethostname(), str(path.resolve()), number]


def read_run(folder: str | Path) -> Run:
    """Read a run from its log, for inspection; it cannot be trained.

    Args:
        folder: the run's.

    Returns:
        The run; ``status`` is ``running`` if the log has no end, whether or not a process still trains it.

    Raises:
        BpfreeError: there is no log of a run.
    """
    place = RunFolder(folder)
    run = read_events(event for event, _ in place.log.read(without=("progress", "system")))
    if run is None:
        raise BpfreeError("there is no record of a run", where=str(folder), fix="give a run's folder")
    run.folder = place.path
    run.artifacts = {name: path for name in run.artifacts if (path := place.inside(name)) is not None}
    for path in place.cursors():
        run.tracking |= Cursor.read(path).told
    return run


def read_events(events: Iterable[Event]) -> Run | None:
    """Assemble a run from the events of its log; ``None`` if it has not begun."""
    run: Run | None = None
    for event in events:
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):  # an event that bpfree did not write
            if event["event"] == "begin":
                before = run.history if run is not None and event["epoch"] else []
                run = Run(
                    event["id"],
                    event["name"],
                    config=dict(event["config"]),
                    tags=dict(event["tags"]),
                    total_epochs=event["total_epochs"],
                    resumed=bool(event["resumed"]),
                    status="running",
                    epoch=int(event["epoch"]),
                    history=[metrics for metrics in before if metrics["epoch"] <= event["epoch"]],
                    artifacts={} if run is None else run.artifacts,
                    metrics=dict(event.get("metrics", {})),
                    parameters=None if event.get("parameters") is None else tuple(event["parameters"]),
                    data=dict(event.get("data", {})),
                )
            elif run is not None:
                _take(run, event)
    return run


def _take(run: Run, event: Event) -> None:
    match event["event"]:
        case "epoch":
            run.history.append(event["metrics"])
            run.epoch = int(event["epoch"])
        case "end":
            run.status, run.reason, run.epoch, run.result = event["status"], event["reason"], int(event["epoch"]), event["result"]
            run.tags |= event["tags"]
        case "result":
            run.result |= event["metrics"]
        case "tags":
            run.tags |= event["tags"]
        case "artifact":
            run.artifacts[event["path"]] = Path(event["path"])
        case "copied":
            run.id = event["id"]
