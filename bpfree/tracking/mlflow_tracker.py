"""The tracker ``mlflow``: a thread reads the run's log, and sends new events without delaying the run.

It sends the telling part of the configuration as parameters; the run's tags, ``status`` and ``reason``; the metrics of each epoch
(step: the epoch), those inside an epoch as ``step/...`` (step: the update), the final ones (step: the last epoch),
``system/...`` (step: milliseconds since the run first began); the data set's name, fingerprint, schema and sizes; configuration,
environment, plots and pictures as artifacts, during the run within a minute; and the checkpoint, inside an MLflow model where the run
has one, among the artifacts otherwise.

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

from bpfree.record.folder import Cursor, RunFolder, read_run
from bpfree.record.log import Event
from bpfree.redaction import redact
from bpfree.run import Run
from bpfree.tracking.config import TrackingConfig, sqlite_file
from bpfree.tracking.events import Artifact, DataSet, End, Message, Metrics, Model, Opening, Tags, TextArtifact
from bpfree.tracking.store import NOTE_TAG, RUN_TAG, Store
from bpfree.tracking.tracker import RefusedError, Tracker, measured

__all__ = ["MLflowTracker", "settled", "source_tags"]

LOCAL_PATIENCE = 120.0
"""Time limit for a local database, which this or another process may have to create first."""

PER_EVENT, PER_CALL = 900, 1000
POSITIONS = ("epoch", "samples", "progress", "seconds")
"""Metrics inside an epoch that say how far training is, not how it goes: charts of them are diagonals."""
MODEL_TAGS = ("rule", "network", "task", "study", "study_row", "mlflow.user", "mlflow.source.name", "mlflow.source.type", NOTE_TAG)
"""Tags of a run that its model has too."""
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
        begins = (event for event, _ in self.folder.log.read(without=("progress", "system")) if event["event"] == "begin")
        self._environment = next(begins, {}).get("environment", {})
        opening = Opening(
            self.shown, self.config.experiment, _name(run), began, _tags(run, self._environment), _params(run), _dataset(run), wanted
        )
        opening.resumed = run.resumed
        opening.ended = run.status != "running" and any(event["event"] == "end" for event in seen)
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
        if self.store.model_id:
            self.known["mlflow_model_id"] = self.store.model_id
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
            yield from self._metrics({f"step/{name}": value for name, value in metrics.items() if name not in POSITIONS}, step, when)
        elif kind == "system":
            yield Metrics(when, step, dict(metrics))
        elif kind == "tags":
            yield Tags(_texts(event["tags"]))
        elif kind == "model":
            yield from self._model()
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
        has_model = event["status"] == "finished" and self.config.logs_model(
            in_study=self._run is not None and "study_cell" in self._run.tags
        )
        models = list(self._model()) if has_model else []
        yield from models
        if self.config.checkpoint and not models and (chosen := self._checkpoint()):
            yield Artifact(chosen, "checkpoints")
        yield End(ENDS.get(event["status"], "FAILED"), event["time"])

    def _checkpoint(self) -> Path | None:
        return next((path for path in (self.folder.selected, self.folder.last) if path.is_file()), None)

    def _model(self) -> Iterator[Model]:
        """Make the message of the run's model; none without a checkpoint, or where rule and network cannot be built from the record."""
        run, checkpoint = read_run(self.folder.path), self._checkpoint()
        if checkpoint is None or "rule.name" not in run.config:
            return
        measured = {"end": ("test/",), "epoch": ("val/", "train/")}
        lasts = {event["event"]: event for event, _ in self.folder.log.read(without=("progress", "system")) if event["event"] in measured}
        metrics = [
            Metrics(event["time"], int(event["epoch"]), {name: value for name, value in values.items() if name.startswith(measured[kind])})
            for kind, event in lasts.items()
            for values in [event["result" if kind == "end" else "metrics"]]
        ]
        tags = {key: text for key, text in _tags(run, self._environment).items() if key in MODEL_TAGS}
        yield Model(run, checkpoint, tags, _params(run), metrics, _dataset(run), self.config.register)


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


def _name(run: Run) -> str:
    """Name the run: a study's cell by its place in the table, since others of the study have the same rule and task."""
    if not (row := run.tags.get("study_row")):
        return run.name
    column, trial = run.tags.get("study_column"), run.tags.get("study_trial")
    number = f"trial {trial}" if trial else f"seed {run.tags.get('seed', '')}"
    return f"{row} [{column}] {number}" if column else f"{row} {number}"


def _tags(run: Run, environment: Mapping[str, Any]) -> dict[str, str]:
    """Convert tags, and add those that MLflow's interface shows: user, source, commit and description."""
    tags = {RUN_TAG: run.id, **_texts(run.tags)}
    with contextlib.suppress(Exception):  # a container may not have a name for its user
        tags.setdefault("mlflow.user", getpass.getuser())
    return tags | source_tags(environment) | {NOTE_TAG: _note(run, str(environment.get("command", "")))}


def source_tags(environment: Mapping[str, Any]) -> dict[str, str]:
    """Convert the recorded command line and commit to the tags in which MLflow's interface looks for them."""
    command, git = str(environment.get("command", "")), environment.get("git", {})
    tags = {"mlflow.source.type": "LOCAL", "mlflow.source.name": command.split()[0] if command else "bpfree"}
    tags |= {"command": command} if command else {}
    if git.get("commit"):
        tags |= {"mlflow.source.git.commit": git["commit"], "mlflow.source.git.dirty": str(git["dirty"]).lower()}
    return tags


def _note(run: Run, command: str) -> str:
    """Describe the run in Markdown."""
    tags = run.tags
    parts = [f"{_code(tags, 'rule') or _code(tags, 'program')}", f"on {_code(tags, 'task')}" if tags.get("task") else ""]
    parts += [f"with the network {_code(tags, 'network')}" if tags.get("network") else ""]
    what = " ".join(part for part in parts if part) or f"`{run.name}`"
    place = f"\n\nA cell of the study {_code(tags, 'study')}." if tags.get("study") else ""
    return f"{what}, seed {tags.get('seed', '?')}.{place}" + (f"\n\n```\n{command}\n```" if command else "")


def _code(tags: Mapping[str, str], name: str) -> str:
    return f"`{tags[name]}`" if tags.get(name) else ""


def _texts(tags: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in tags.items() if value not in ("", None)}


def _params(run: Run) -> dict[str, str]:
    """Convert the telling settings to strings: structures as JSON, other values as in Python, addresses without passwords."""
    keys = run.config if run.parameters is None else [key for key in run.parameters if key in run.config]
    return {
        key: redact(json.dumps(value, default=str) if isinstance(value, (dict, list, tuple)) else str(value))
        for key, value in ((key, run.config[key]) for key in keys)
    }


def _dataset(run: Run) -> DataSet | None:
    name = run.tags.get("task")
    digest = run.tags.get("fingerprint") or run.tags.get("data_fingerprint") or run.tags.get("data") or ""
    if not name:
        return None
    sizes = run.data.get("examples")
    profile = (
        None if not sizes else json.dumps({"num_rows": sum(sizes.values())} | {f"{split}_rows": size for split, size in sizes.items()})
    )
    return DataSet(name[:500], (digest or "unknown")[:36], _schema(run.data), profile)


def _schema(data: Mapping[str, Any]) -> str | None:
    """Describe the inputs and targets of a task as MLflow does: columns where they have names, tensors otherwise."""
    spec = data.get("spec")
    if not spec or spec.get("structure") is not None:
        return None
    if names := spec.get("input_names"):
        return json.dumps({"mlflow_colspec": [{"name": name, "type": "double", "required": True} for name in names]})
    features = [_tensor(data.get("dtype", "float32"), [-1, *spec["input_shape"]])]
    kinds = {"classes": ("int64", [-1]), "tokens": ("int64", [-1, *spec["input_shape"]]), "none": None}
    targets = kinds.get(spec["targets"], ("float32", [-1, *(spec.get("output_shape") or [spec["outputs"]])]))
    parts = {"features": json.dumps(features), "targets": targets and json.dumps([_tensor(*targets)])}
    return json.dumps({"mlflow_tensorspec": parts})


def _tensor(dtype: str, shape: list[int]) -> dict[str, Any]:
    return {"type": "tensor", "tensor-spec": {"dtype": dtype, "shape": shape}}
