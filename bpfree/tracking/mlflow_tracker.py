"""The tracker ``mlflow``: a thread reads the run's log, and sends new events without delaying the run.

It sends the flat configuration as parameters; the run's tags, ``status`` and ``reason``; the metrics of each epoch
(step: the epoch), those inside an epoch as ``step/...`` (step: the update), the final ones (step: the last epoch),
``system/...`` (step: milliseconds since the run first began); the data set's name and fingerprint; configuration,
environment, plots, pictures and checkpoint as artifacts, during the run within a minute.

MLflow stores an infinite value as 1.8e308; it is logged unchanged, and the tag ``infinite_metrics`` names it. A store that
is slow or unavailable causes one warning; missing data are sent when the run is resumed, or by ``bpfree track send``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bpfree.record.folder import Cursor, RunFolder
from bpfree.record.log import Event
from bpfree.redaction import redact
from bpfree.run import Run
from bpfree.tracking.config import TrackingConfig, sqlite_file
from bpfree.tracking.events import Artifact, End, Message, Metrics, Opening, Tags, TextArtifact
from bpfree.tracking.store import RUN_TAG, Store
from bpfree.tracking.tracker import RefusedError, Tracker, measured

__all__ = ["MLflowTracker", "settled"]

LOCAL_PATIENCE = 120.0
"""Time limit for a local database, which this or another process may have to create first."""

PER_EVENT, PER_CALL = 900, 1000
ENDS = {"finished": "FINISHED", "interrupted": "KILLED"}


class MLflowTracker(Tracker):
    """Sends the events of a run's log to an MLflow store."""

    name, title = "mlflow", "MLflow"

    def __init__(self, run: Run, config: TrackingConfig) -> None:
        super().__init__(run, config)
        store = self.store = Store(config.resolve_uri(self.folder.path.absolute().parent), config.timeout)
        self.shown, self.patience = store.shown, max(config.timeout, LOCAL_PATIENCE) if store.database is not None else config.timeout
        self._run: Run | None = None
        self._environment: Any = {}
        self._began = 0
        self._again = self._ask = False
        self._steps: dict[str, int] = {}  # the last step of each metric in the store, for a resumed run
        self._infinite: dict[str, int] = {}

    def check(self) -> None:
        """Refuse a store that MLflow cannot use."""
        try:
            self.store.check()
        except ImportError as error:
            raise ImportError(f"{error}: pip install mlflow") from error

    def holds_run(self) -> bool:
        """Tell whether the store still has the run."""
        return "mlflow_run_id" in self.known and self.store.holds(self.known["mlflow_run_id"])

    def probe(self) -> None:
        """Check quickly whether a server listens."""
        self.store.probe()

    def open(self, run: Run, began: int, seen: Sequence[Event], again: bool) -> bool:
        """Create the run in the store, or find it by MLflow's identifier or by the tag with bpfree's identifier."""
        wanted = self.known.get("mlflow_run_id")
        opening = Opening(self.shown, self.config.experiment, run.name, began, _tags(run), _params(run.config), _dataset(run), wanted)
        there = self.store.open(opening, search=True)
        self.known.update(mlflow_run_id=opening.run_id, mlflow_uri=self.shown, mlflow_experiment_id=self.store.experiment_id)
        self.known["mlflow_started"] = str(opening.time)
        same = wanted is not None and wanted == opening.run_id
        self._run, self._began = run, opening.time
        self._again, self._ask = again or there, there and not same
        for event in seen:
            with contextlib.suppress(RefusedError):  # the folder's location at the time of sending
                for message in self._told(event):
                    if same and isinstance(message, Metrics):
                        self._steps.update(dict.fromkeys(message.values, message.step))
        return same or wanted is None

    def send(self, events: Sequence[Event]) -> list[tuple[Event, str]]:
        """Send events: metrics and tags together, each other one by itself."""
        refused: list[tuple[Event, str]] = []
        messages: list[tuple[Event, Message]] = []
        for event in events:
            try:
                messages += [(event, message) for message in self._told(event)]
            except RefusedError as error:
                refused.append((event, str(error)))
        for batch in _batches(messages):
            refused += self._send(self._unknown(batch))
        return refused

    def _send(self, batch: Sequence[tuple[Event, Message]]) -> list[tuple[Event, str]]:
        """Send messages together; if the store refuses them, one by one."""
        if not batch:
            return []
        try:
            self.store.send(self.known["mlflow_run_id"], [message for _, message in batch])
        except RefusedError as error:
            if len(batch) > 1:
                return [one for each in batch for one in self._send([each])]
            return [(batch[0][0], str(error))]
        return []

    def _unknown(self, batch: Sequence[tuple[Event, Message]]) -> list[tuple[Event, Message]]:
        """Leave out the metrics of a resumed run that the store has already: the steps of a key must increase."""
        if not self._again:
            return list(batch)
        kept: list[tuple[Event, Message]] = []
        for event, message in batch:
            if isinstance(message, Metrics):
                values = {key: value for key, value in message.values.items() if message.step > self._last_step(key)}
                self._steps.update(dict.fromkeys(values, message.step))
                message = Metrics(message.time, message.step, values)
            kept.append((event, message))
        return kept

    def _last_step(self, key: str) -> int:
        if key not in self._steps:
            self._steps[key] = self.store.last_step(self.known["mlflow_run_id"], key) if self._ask else -1
        return self._steps[key]

    # --- messages of events -----------------------------------------------------------------------------------------

    def _told(self, event: Event) -> Iterator[Message]:
        kind, when = event["event"], event["time"]
        step, metrics = measured(event, self._began)
        if kind == "begin":
            self._environment = event.get("environment", {})
            yield Tags({"status": "running"} | ({"reason": ""} if event["resumed"] else {}))
        elif kind == "epoch":
            yield from self._metrics(metrics, step, when)
        elif kind == "progress":
            yield from self._metrics({f"step/{name}": value for name, value in metrics.items()}, step, when)
        elif kind == "system":
            yield Metrics(when, step, dict(metrics))
        elif kind == "tags":
            yield Tags(event["tags"])
        elif kind == "artifact" and self.config.artifacts:
            yield self._artifact(event["path"])
        elif kind in ("end", "stopped"):
            yield from self._metrics(metrics, step, when)
            if kind == "end":
                yield from self._end(event)

    def _metrics(self, metrics: Mapping[str, float], step: int, when: int) -> Iterator[Message]:
        """Split metrics into messages of a size that one call accepts, and name infinite ones in a tag."""
        items = list(metrics.items())
        for start in range(0, len(items), PER_EVENT):
            yield Metrics(when, step, dict(items[start : start + PER_EVENT]))
        infinite = [name for name, value in items if math.isinf(value) and name not in self._infinite]
        if infinite:
            self._infinite.update(dict.fromkeys(infinite, step))
            yield Tags({"infinite_metrics": ", ".join(f"{name} at {first}" for name, first in self._infinite.items())})

    def _artifact(self, name: str) -> Artifact:
        path = self.folder.inside(name)
        if path is None:
            raise RefusedError("it leads out of the run's folder")
        return Artifact(path, name if path.is_dir() else name.rpartition("/")[0])

    def _end(self, event: Event) -> Iterator[Message]:
        resumed = self._run is not None and self._run.resumed
        yield Tags({"status": event["status"]} | ({"reason": event["reason"]} if event["reason"] or resumed else {}))
        if self.config.artifacts:
            yield TextArtifact("environment.json", json.dumps(self._environment, indent=2) + "\n")
            if self.folder.config.is_file():
                yield Artifact(self.folder.config, "")
        if self.config.checkpoint:
            chosen = next((path for path in (self.folder.selected, self.folder.last) if path.is_file()), None)
            if chosen is not None:
                yield Artifact(chosen, "checkpoints")
        yield End(ENDS.get(event["status"], "FAILED"), event["time"])


def _batches(messages: Iterable[tuple[Event, Message]]) -> Iterator[list[tuple[Event, Message]]]:
    """Group metrics and tags up to the limits of one call; other messages are sent one by one."""
    batch: list[tuple[Event, Message]] = []
    size = 0
    for event, message in messages:
        together = isinstance(message, (Metrics, Tags))
        weight = len(message.values) if isinstance(message, (Metrics, Tags)) else PER_CALL
        if batch and (not together or size + weight > PER_CALL):
            yield batch
            batch, size = [], 0
        batch.append((event, message))
        size += weight
    if batch:
        yield batch


def settled(config: TrackingConfig, folder: str | Path) -> TrackingConfig:
    """Point the options of a run at the store that has it, wherever the run's folder, or this process, is now.

    As for a new run, ``MLFLOW_TRACKING_URI`` is used if nothing else is configured, and the default store if the run's database is gone.

    Args:
        config: as the run recorded it.
        folder: of the run.
    """
    before = Cursor.read(RunFolder(folder).cursor(MLflowTracker.name)).store
    if not before or "***" in before or (config.uri is None and os.environ.get("MLFLOW_TRACKING_URI")):
        return config
    database = sqlite_file(before)
    return config if database is not None and not database.is_file() else dataclasses.replace(config, uri=before)


# --- a run in MLflow's terms --------------------------------------------------------------------------------------------


def _tags(run: Run) -> dict[str, str]:
    tags = {RUN_TAG: run.id, **{name: str(value) for name, value in run.tags.items() if value != ""}}
    with contextlib.suppress(Exception):  # a container may not have a name for its user
        tags.setdefault("mlflow.user", getpass.getuser())
    return tags


def _params(config: Mapping[str, Any]) -> dict[str, str]:
    """Convert settings to strings: structures as JSON, other values as in Python, addresses without passwords."""
    return {
        key: redact(json.dumps(value, default=str) if isinstance(value, (dict, list, tuple)) else str(value))
        for key, value in config.items()
    }


def _dataset(run: Run) -> tuple[str, str] | None:
    name = run.tags.get("task")
    digest = run.tags.get("fingerprint") or run.tags.get("data_fingerprint") or run.tags.get("data") or ""
    return (name, digest or "unknown") if name else None
