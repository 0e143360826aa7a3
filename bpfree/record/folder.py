"""The folder of a run: where each of its files lies, and what its log says of it."""

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
        """Its log, to be read, or to be written by one process."""
        return EventLog(self.path / "events.jsonl")

    def cursor(self, reader: str) -> Path:
        """The file that says how far a reader of the log has come."""
        return self.path / CURSOR.format(quote(reader, safe=""))

    def cursors(self) -> list[Path]:
        """The files of all readers."""
        return sorted(self.path.glob(CURSOR.format("*")))

    def relative(self, path: Path) -> str | None:
        """A path as the log has it; ``None`` for one outside of the folder."""
        with contextlib.suppress(ValueError):
            return Path(os.path.abspath(path)).relative_to(os.path.abspath(self.path)).as_posix()
        return None

    def inside(self, name: str) -> Path | None:
        """Resolve a path of the log; ``None`` if it leads out of the folder, through a symbolic link too."""
        return inside(self.path, name)

    def files(self) -> Iterator[Path]:
        """What a run makes, apart from its log and its readers' files."""
        return iter((self.config, self.plan, self.predictions, self.checkpoints, self.plots, self.pictures, self.code))

    def end_if_killed(self) -> bool:
        """Note the end of a run whose process was killed; it can be resumed all the same.

        Returns:
            Whether it was.

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
        """Give a copy of another run's folder an identifier of its own, so that a reader of its log makes another run.

        A folder that was moved stays what it was: a folder is a copy where the first one is still at its place.

        Returns:
            The identifier; ``None`` if the folder is no copy.
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
    """How far a reader of a log has come.

    Attributes:
        store: address of where it brings what it reads, without what is secret in it.
        offset: bytes of the log that it has read.
        known: what it needs to continue, such as the run's identifier in a store.
        refused: what it could not take, each with the reason.
        place: where this was written: machine, file, and the number of its folder in the file system.
    """

    store: str = ""
    offset: int = 0
    known: dict[str, Any] = field(default_factory=dict)
    refused: list[dict[str, Any]] = field(default_factory=list)
    place: list[Any] = field(default_factory=list)

    @property
    def told(self) -> dict[str, str]:
        """What a run shows of ``known``: its texts, such as an identifier in a store."""
        return {name: value for name, value in self.known.items() if isinstance(value, str)}

    @classmethod
    def read(cls, path: Path) -> Cursor:
        """Read a cursor's file; where there is none, or it is damaged, begin at the beginning."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            cursor = cls(
                str(content["store"]), int(content["offset"]), dict(content["known"]), list(content["refused"]), list(content["place"])
            )
        except (OSError, ValueError, TypeError, KeyError):
            return cls()
        return cursor

    def is_copy(self, path: Path) -> bool:
        """Whether a cursor's file was copied with its folder: then the first one is still where it was written.

        Args:
            path: of the file.
        """
        return bool(self.place) and self.place != _place(path) and self.place == _place(Path(self.place[1]))

    def write(self, path: Path) -> None:
        """Replace the file.

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
    """Read a run from its log: to be looked at, not to be trained.

    Args:
        folder: the run's.

    Returns:
        The run; ``status`` is ``running`` where the log has no end, whether or not a process still trains it.

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
    """Put a run together from the events of its log; ``None`` if it has not begun."""
    run: Run | None = None
    for event in events:
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):  # an event of somebody else's making
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
