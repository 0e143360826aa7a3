"""Tracking with MLflow that costs a run nothing: hooks put events into a queue, a thread sends them.

What goes there: the flat configuration as parameters; the run's tags, ``status`` and ``reason``; the metrics of each epoch
(step: the epoch), those inside an epoch as ``step/...`` (step: the update), the final ones (step: the last epoch),
``system/...`` (step: milliseconds since the run first began); the data set's name and fingerprint; configuration,
environment, plots, pictures and checkpoint as artifacts, files that are made on the way within a minute.

MLflow stores an infinite value as 1.8e308; it is logged as it is, and the tag ``infinite_metrics`` names it. A store that
is slow, down or gone costs one warning; what is not sent by the end lies in ``tracking-unsent.jsonl`` in the run's folder
(one JSON object per line, see :mod:`bpfree.tracking.events`), and is sent when the run is resumed, or by
:func:`send_unsent`.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bpfree.errors import BpfreeError
from bpfree.hooks import hookimpl
from bpfree.run import Run
from bpfree.tracking.config import TrackingConfig
from bpfree.tracking.environment import environment_text
from bpfree.tracking.events import SPOOL_NAME, Artifact, End, Event, Metrics, Opening, Spool, Tags, Text
from bpfree.tracking.sender import Sender, without_end
from bpfree.tracking.store import RUN_TAG, Store, redact
from bpfree.tracking.system import SystemMetrics

__all__ = ["MLflowTracker", "send_unsent"]

logger = logging.getLogger("bpfree.tracking")

LOCAL_PATIENCE = 120.0
"""Seconds for a local database, which may have to be made first, or wait for others that make it."""

BETWEEN_FILES = 60.0
"""Seconds between uploads of new artifacts while a run trains: an upload takes some milliseconds of the processor."""

PER_EVENT = 900
ENDS = {"finished": "FINISHED", "interrupted": "KILLED"}


class MLflowTracker:
    """Tracks runs, one after the other.

    Args:
        config: where to and what.
        output_folder: folder of runs; the default store is beside it.
    """

    def __init__(self, config: TrackingConfig, output_folder: Path) -> None:
        self.config, self._output_folder = config, Path(output_folder)
        self._sender: Sender | None = None
        self._system: SystemMetrics | None = None
        self._store: Store | None = None
        self._opening: Opening | None = None
        self._infinite: dict[str, int] = {}
        self._began = 0
        self._looks = 0
        self._uploaded: dict[Path, int] = {}  # artifacts that are queued already, and when they were last changed
        self._files_at = 0.0

    # --- hooks ------------------------------------------------------------------------------------------------------

    @hookimpl(tryfirst=True)
    def run_start(self, run: Run) -> None:
        """Create the run in the store, or find it again.

        Raises:
            UsageError: a store that MLflow cannot use.
            BpfreeError: the store is required and cannot be reached.
        """
        if not self.config.enabled:
            return
        store = self._store = Store(self.config.resolve_uri(self._output_folder), self.config.timeout)
        try:
            store.check()
        except ImportError as error:
            self._without_mlflow(error)
            return
        spool = Spool(run.folder / SPOOL_NAME if run.folder is not None else None)
        self._infinite, self._looks = _infinite(run.history), 0
        self._uploaded, self._files_at = {}, time.monotonic()
        sender = self._open(run, store, spool)
        if not sender.start(max(self.config.timeout, LOCAL_PATIENCE) if store.database is not None else self.config.timeout):
            if self.config.required:
                sender.stop()
                fix = "start the server, correct tracking.uri, or set tracking.required=false"
                raise BpfreeError(
                    f"the tracking store does not answer: {redact(sender.reason)}", where=f"tracking.uri={store.shown}", fix=fix
                )
            sender.warn(sender.reason)
        self._sender = sender
        self._publish(run)
        sender.put(Tags(_standing(run, "running") | self._infinite_tag()))
        if self.config.system:
            self._system = SystemMetrics(self._take_sample, self.config.system_interval)
            self._system.start()

    @hookimpl
    def epoch_end(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Queue the metrics of an epoch, and from time to time the files that have come since."""
        self._publish(run)
        self._put_metrics(metrics, step=int(metrics.get("epoch", run.epoch)))
        if self._sender is not None and self.config.artifacts and time.monotonic() - self._files_at >= BETWEEN_FILES:
            for event in self._new_artifacts(run):
                self._sender.put(event)
            self._files_at = time.monotonic()

    @hookimpl
    def progress(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Queue metrics inside an epoch; their step axis is another one, so they have names of their own."""
        self._looks += 1
        step = int(metrics.get("step", self._looks))
        self._put_metrics({f"step/{name}": value for name, value in metrics.items() if name != "step"}, step=step)

    @hookimpl(trylast=True)
    def run_end(self, run: Run) -> None:
        """Queue the results and files, wait for them for a while, and end the run in the store."""
        self.finish(run, _now())

    def finish(self, run: Run, ended: int) -> None:
        """The same for a run that ended at another time (milliseconds since 1970)."""
        if self._system is not None:
            self._system.stop()
        sender = self._sender
        if sender is None:
            return
        self._publish(run)
        self._put_metrics(run.result, step=run.epoch)
        sender.put(Tags(_standing(run, run.status)))
        for event in self._files(run):
            sender.put(event)
        sender.put(End(ENDS.get(run.status, "FAILED"), ended))
        sender.finish(self.config.flush_timeout)
        self._publish(run)
        self._sender = self._system = None

    def _without_mlflow(self, error: ImportError) -> None:
        if self.config.required:
            raise BpfreeError(f"MLflow cannot be imported: {error}", fix="pip install mlflow, or set tracking.enabled=false") from error
        logger.warning("the run is not tracked, as MLflow cannot be imported: %s", error)

    # --- beginning --------------------------------------------------------------------------------------------------

    def _open(self, run: Run, store: Store, spool: Spool) -> Sender:
        again = run.resumed or run.reopened
        left_opening, left = spool.read() if again else (None, [])
        self._began = int(run.tracking.get("mlflow_started") or (left_opening.time if left_opening else _now()))
        opening = self._opening = opening_of(run, store, self.config, self._began)
        opening.run_id = opening.run_id or (left_opening.run_id if left_opening else None)
        earlier = list(self._known(run, without_end(left))) if again else []
        return Sender(store, opening, spool, interval=self.config.interval, earlier=earlier, again=again)

    def _known(self, run: Run, left: list[Event]) -> Iterator[Event]:
        """What is known of the epochs behind a resumed run: its history, and in between what was left unsent.

        The sender drops what the store has; a store that never saw the run gets all of it.
        """
        spooled = {event.step for event in left if isinstance(event, Metrics) and "epoch" in event.values}
        history = [(int(metrics["epoch"]), metrics) for metrics in run.history if "epoch" in metrics]
        events = {step: self._metrics(metrics, step, self._began + int(1000 * metrics.get("seconds", 0))) for step, metrics in history}
        for step, parts in events.items():
            if step < min(spooled, default=math.inf):
                yield from parts
        yield from left
        for step, parts in events.items():
            if spooled and step > max(spooled):
                yield from parts

    def _publish(self, run: Run) -> None:
        """Note in the run where it is tracked, as soon as that is known, and since when."""
        sender, store = self._sender, self._store
        if sender is None or store is None:
            return
        if sender.run_id is not None and self._opening is not None:
            self._began = self._opening.time  # the store's, for a run that was there
        run.tracking["mlflow_started"] = str(self._began)
        if sender.run_id is None or run.tracking.get("mlflow_run_id") == sender.run_id:
            return
        run.tracking.update(mlflow_run_id=sender.run_id, mlflow_uri=store.shown, mlflow_experiment_id=store.experiment_id)

    # --- metrics and files ------------------------------------------------------------------------------------------

    def _take_sample(self, sample: dict[str, float]) -> None:
        now = _now()
        if self._sender is not None:
            self._sender.put(Metrics(now, now - self._began, sample))

    def _put_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        if self._sender is None or not metrics:
            return
        for event in self._metrics(metrics, step, _now()):
            self._sender.put(event)
        infinite = [name for name, value in metrics.items() if math.isinf(value) and name not in self._infinite]
        if infinite:
            self._infinite.update(dict.fromkeys(infinite, step))
            self._sender.put(Tags(self._infinite_tag()))

    def _infinite_tag(self) -> dict[str, str]:
        text = ", ".join(f"{name} at {first}" for name, first in self._infinite.items())
        return {"infinite_metrics": text} if text else {}

    def _metrics(self, metrics: Mapping[str, float], step: int, now: int) -> list[Event]:
        """Events of a size that one call takes; ``epoch`` comes last, so that it tells that the others are there."""
        items = [(name, float(value)) for name, value in sorted(metrics.items(), key=lambda item: item[0] == "epoch")]
        return [Metrics(now, step, dict(items[start : start + PER_EVENT])) for start in range(0, len(items), PER_EVENT)]

    def _files(self, run: Run) -> Iterator[Event]:
        if self.config.artifacts:
            yield Text("environment.json", environment_text())
            if run.folder is not None and (run.folder / "config.yaml").is_file():
                yield Artifact(str(run.folder / "config.yaml"), "")
            yield from self._new_artifacts(run)
            yield from (Artifact(str(path), _folder_of(path, run)) for path in run.artifacts.values() if not path.is_file())
        if self.config.checkpoint and run.folder is not None:
            for name in ("selected.pt", "last.pt"):
                if (run.folder / "checkpoints" / name).is_file():
                    yield Artifact(str(run.folder / "checkpoints" / name), "checkpoints")
                    break

    def _new_artifacts(self, run: Run) -> Iterator[Event]:
        """The files that are new, or have changed since they were queued."""
        for path in run.artifacts.values():
            changed = path.stat().st_mtime_ns if path.is_file() else None
            if changed is not None and self._uploaded.get(path) != changed:
                self._uploaded[path] = changed
                yield Artifact(str(path), _folder_of(path, run))


def send_unsent(folder: Path, config: TrackingConfig, output_folder: Path) -> bool:
    """Send what a run that is over has left in its folder. Returns whether nothing is left.

    Args:
        folder: of the run.
        config: where to, and how long it may take.
        output_folder: folder of runs.
    """
    spool = Spool(Path(folder) / SPOOL_NAME)
    opening, events = spool.read()
    if opening is None:
        return True
    store = Store(config.resolve_uri(output_folder), config.timeout)
    store.check()
    sender = Sender(store, opening, spool, interval=config.interval, earlier=events, again=True)
    sender.start(0.0)
    return sender.finish(config.flush_timeout)


def opening_of(run: Run, store: Store, config: TrackingConfig, began: int) -> Opening:
    """How a run is created in the store, or found again there, by the tag with its own identifier if not by MLflow's.

    Args:
        run: with configuration and tags.
        store: where to.
        config: whose experiment it is in.
        began: milliseconds since 1970.
    """
    opening = Opening(store.shown, config.experiment, run.name, began, _tags(run), _params(run.config), _dataset(run))
    opening.run_id = run.tracking.get("mlflow_run_id")
    return opening


def _infinite(history: Iterable[Mapping[str, float]]) -> dict[str, int]:
    """Metrics that have been infinite, and in which epoch first."""
    first: dict[str, int] = {}
    for metrics in history:
        for name in (name for name, value in metrics.items() if math.isinf(value)):
            first.setdefault(name, int(metrics.get("epoch", 0)))
    return first


def _now() -> int:
    return time.time_ns() // 1_000_000


def _tags(run: Run) -> dict[str, str]:
    tags = {RUN_TAG: run.id, **{name: str(value) for name, value in run.tags.items() if value != ""}}
    with contextlib.suppress(Exception):  # a container may have no name for its user
        tags.setdefault("mlflow.user", getpass.getuser())
    return tags


def _standing(run: Run, status: str) -> dict[str, str]:
    """How the run stands; a resumed run takes back the reason why it was interrupted."""
    return {"status": status, "reason": run.reason} if run.reason or run.resumed else {"status": status}


def _params(config: Mapping[str, Any]) -> dict[str, str]:
    """Parameters are strings: structures as JSON, everything else as Python shows it, passwords in addresses left out."""
    return {
        key: redact(json.dumps(value, default=str) if isinstance(value, (dict, list, tuple)) else str(value))
        for key, value in config.items()
    }


def _dataset(run: Run) -> tuple[str, str] | None:
    name = run.tags.get("task")
    digest = run.tags.get("fingerprint") or run.tags.get("data_fingerprint") or run.tags.get("data") or ""
    return (name, digest or "unknown") if name else None


def _folder_of(path: Path, run: Run) -> str:
    """Where a file goes in the store: its place in the run's folder."""
    if run.folder is None or not path.is_relative_to(run.folder):
        return path.name if path.is_dir() else ""
    inside = path.relative_to(run.folder)
    folder = inside if path.is_dir() else inside.parent
    return "" if folder == Path(".") else folder.as_posix()
