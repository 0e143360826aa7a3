"""Trackers that write a file for each run: ``csv`` for programs and spreadsheets, ``tensorboard`` for its viewer.

Their files grow with the log. The length of the file is kept with the position in the log: the next session cuts off the rest, so
that nothing is written twice.
"""

from __future__ import annotations

import copy
import csv
import io
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bpfree.record.log import Event
from bpfree.run import Run
from bpfree.tracking.config import TrackingConfig
from bpfree.tracking.tracker import RefusedError, Tracker, measured

__all__ = ["CSVTracker", "FileTracker", "Point", "TensorBoardTracker"]


class Point(NamedTuple):
    """A value of a metric.

    Attributes:
        time: milliseconds since 1970.
        step: the epoch; for ``progress`` the update, for ``system`` the milliseconds since the run first began.
        kind: of the event that has it: ``epoch``, ``progress``, ``system``, ``end`` or ``result``.
        name: of the metric.
        value: may not be finite.
    """

    time: int
    step: int
    kind: str
    name: str
    value: float


class FileTracker(Tracker):
    """Appends the log's points to a file; subclasses define the encoding.

    Attributes:
        file: its path in the run's folder, or in a folder named after the run in ``tracking.folder``.
    """

    file = ""

    def __init__(self, run: Run, config: TrackingConfig) -> None:
        super().__init__(run, config)
        chosen = config.folder and self.folder.path.absolute().parent.parent / config.folder / run.id
        self.path = Path(chosen or self.folder.path) / self.file
        self.shown = str(self.path) if chosen else self.file  # relative, because a run with its file can be moved
        self._began = self._epoch = 0

    def header(self) -> bytes:
        """Return the beginning of the file."""
        return b""

    @abstractmethod
    def encoded(self, point: Point) -> bytes:
        """Encode a point for the file."""

    def holds_run(self) -> bool:
        """Tell whether the file has everything that was written."""
        try:
            return self.path.stat().st_size >= int(self.known["size"])
        except (OSError, KeyError):
            return False

    def open(self, run: Run, began: int, seen: Sequence[Event], again: bool) -> bool:
        """Continue the file, or create it."""
        self._began, self._epoch = began, run.epoch
        there = self.holds_run()
        if not there:
            self.known.clear()
            self.known.update(size=0, last={})
        return there

    def send(self, events: Sequence[Event]) -> list[tuple[Event, str]]:
        """Append the points that the file does not have."""
        refused, points, last = list[tuple[Event, str]](), list[Point](), copy.deepcopy(self.known["last"])
        for event in events:
            try:
                points += self._new(event, last)
            except RefusedError as error:
                refused.append((event, str(error)))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.truncate(self.known["size"])  # a process may have been killed, or the disk full, before the position was saved
            file.write((b"" if self.known["size"] else self.header()) + b"".join(map(self.encoded, points)))
            file.flush()
            size = file.tell()
        self.known.update(size=size, last=last)
        return refused

    def _new(self, event: Event, last: dict[str, dict[str, int]]) -> list[Point]:
        """Make the points of an event, without those that a resumed run repeats: the steps of a metric must increase."""
        step, metrics = measured(event, self._began, self._epoch)
        kind = "end" if event["event"] == "stopped" else event["event"]
        steps = last.setdefault(kind, {}) if metrics else {}
        new = [Point(event["time"], step, kind, name, value) for name, value in metrics.items() if step > steps.get(name, -1)]
        steps.update({point.name: step for point in new})
        return new


class CSVTracker(FileTracker):
    """``metrics.csv``: a line for each point, with the columns of :class:`Point`."""

    file = "metrics.csv"

    def header(self) -> bytes:
        """Return the line of column names."""
        return _line(Point._fields)

    def encoded(self, point: Point) -> bytes:
        """Encode a point as a line; numbers are written as by Python, so that they are read back exactly."""
        return _line(point)


def _line(cells: Sequence[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


class TensorBoardTracker(FileTracker):
    """An event file of TensorBoard; metrics have the names that they have in MLflow, results after the end begin with ``result/``."""

    title = "TensorBoard"
    file = "tensorboard/events.out.tfevents.bpfree"

    def check(self) -> None:
        """Check that TensorBoard is installed."""
        try:
            import tensorboard.summary.writer.record_writer  # noqa: F401
        except ImportError as error:
            raise ImportError(f"{error}: pip install 'bpfree[tensorboard]'") from error

    def header(self) -> bytes:
        """Return the record that names the format."""
        return _record(wall_time=self._began / 1000, file_version="brain.Event:2")

    def encoded(self, point: Point) -> bytes:
        """Encode a point as a scalar in single precision."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        tag = {"progress": "step/", "result": "result/"}.get(point.kind, "") + point.name
        return _record(
            wall_time=point.time / 1000, step=point.step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=point.value)])
        )


def _record(**fields: Any) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event as Record
    from tensorboard.summary.writer.record_writer import RecordWriter

    file = io.BytesIO()
    RecordWriter(file).write(Record(**fields).SerializeToString())
    return file.getvalue()
