"""Send a run's log to its trackers: by threads while the run trains, and at any time afterwards."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bpfree.errors import BpfreeError, UsageError
from bpfree.files import remove_abandoned
from bpfree.plugins import Plugins, installed_plugins
from bpfree.record.folder import Cursor, RunFolder, read_run
from bpfree.record.log import EventLog
from bpfree.redaction import redact
from bpfree.run import Run
from bpfree.tracking.config import TrackingConfig
from bpfree.tracking.follower import Follower
from bpfree.tracking.mlflow_tracker import settled
from bpfree.tracking.system import SystemMetrics
from bpfree.tracking.tracker import Tracker

__all__ = ["Tracking", "complete", "config_of", "is_sent", "makers", "send"]

logger = logging.getLogger("bpfree.tracking")

Makers = Mapping[str, Callable[[Run, TrackingConfig], Any]]


def makers(config: TrackingConfig, registry: Plugins | None = None) -> Makers:
    """Look up the factories of the trackers in ``tracking.to``, by name.

    Raises:
        UsageError: no plugin registers one.
    """
    registry = installed_plugins() if registry is None else registry
    return {name: registry.get("trackers", name, where="tracking.to") for name in config.to}


def _tracker(name: str, make: Callable[[Run, TrackingConfig], Any], run: Run, config: TrackingConfig) -> Tracker:
    """Make a tracker, and check that it can work here.

    Raises:
        UsageError: it cannot with this configuration.
        BpfreeError: a library is missing.
    """
    try:
        made = make(run, config)
        if not isinstance(made, Tracker):
            raise UsageError(
                f"the tracker {name!r} is not a bpfree.Tracker: {made!r:.80}", where="tracking.to", fix="report it to the plugin's author"
            )
        made.name = name
        made.check()
    except ImportError as error:
        fix = "install the missing package, or remove the tracker from tracking.to"
        raise BpfreeError(f"the tracker {name!r} cannot be used here: {error}", where="tracking.to", fix=fix) from error
    return made


class Tracking:
    """Starts a thread for each tracker that reads the log of a run.

    Args:
        config: the options ``tracking.*``.
        made_by: factories of the trackers, by name.
    """

    def __init__(self, config: TrackingConfig, made_by: Makers) -> None:
        self.config, self._makers = config, made_by
        self._followers: list[Follower] = []
        self._system: SystemMetrics | None = None

    def start(self, run: Run, log: EventLog) -> None:
        """Create or find the run at each tracker.

        Raises:
            UsageError: an option is invalid.
            BpfreeError: a tracker is required, and cannot be reached or used.
        """
        for name, make in self._makers.items() if self.config.enabled else ():
            self._follow(name, make, run)
        if self._followers and self.config.system:
            self._system = SystemMetrics(lambda sample: log.append("system", metrics=sample), self.config.system_interval)
            self._system.start()

    def _follow(self, name: str, make: Callable[[Run, TrackingConfig], Any], run: Run) -> None:
        try:
            tracker = _tracker(name, make, run, self.config)
        except BpfreeError as error:
            if self.config.required or isinstance(error, UsageError):
                raise
            logger.warning("the run is not tracked: %s", error.what)
            return
        follower = Follower(tracker, interval=self.config.interval)
        self._followers.append(follower)
        if not follower.start(tracker.patience):
            if self.config.required:
                what = "the tracking store does not answer" if name == "mlflow" else f"the tracker {name!r} does not answer"
                where = f"tracking.uri={tracker.shown}" if name == "mlflow" else tracker.shown
                fix = "start the server, correct tracking.uri, or set tracking.required=false"
                raise BpfreeError(f"{what}: {redact(follower.reason)}", where=where, fix=fix)
            follower.warn(follower.reason)
        run.tracking.update(follower.cursor.told)

    def stop(self) -> None:
        """Stop the sampling of system metrics."""
        if self._system is not None:
            self._system.stop()
        self._system = None

    def finish(self, run: Run) -> bool:
        """Wait for a limited time until the trackers have all of the log; return whether they have."""
        for follower in self._followers:
            follower.close()
        until = time.monotonic() + self.config.flush_timeout
        complete = True
        for follower in self._followers:
            complete = follower.finish(max(0.0, until - time.monotonic())) and complete
            run.tracking.update(follower.cursor.told)
        self._followers = []
        return complete

    def abandon(self) -> None:
        """Stop at once."""
        for follower in self._followers:
            follower.stop()
        self._followers = []


# --- runs that have ended -----------------------------------------------------------------------------------------------


def send(folder: str | Path, config: TrackingConfig, made_by: Makers | None = None) -> list[dict[str, Any]] | None:
    """Send the data that trackers lack of a run that is no longer trained; a killed run ends as interrupted.

    Args:
        folder: of the run.
        config: the options ``tracking.*``.
        made_by: factories of the trackers, by name; ``None``: those that plugins register.

    Returns:
        The refused events, each with its reason; ``None`` if not everything could be sent.

    Raises:
        BpfreeError: there is no record of a run, a process still trains it, or a tracker cannot be used here.
    """
    place = RunFolder(folder)
    read_run(folder)  # or there is nothing to send
    if place.log.is_held():
        raise BpfreeError("the run is still training", where=str(folder), fix="wait until it ends; its data are sent while it trains")
    remove_abandoned(place.path, "*")
    place.name_copy()
    place.end_if_killed()
    run = read_run(folder)
    trackers = [_tracker(name, make, run, config) for name, make in (makers(config) if made_by is None else made_by).items()]
    answers = [_send(tracker) for tracker in trackers]
    return None if None in answers else [refused for answer in answers for refused in answer or ()]


def _send(tracker: Tracker) -> list[dict[str, Any]] | None:
    follower = Follower(tracker, interval=tracker.config.interval)
    with contextlib.suppress(Exception):  # an unavailable store is detected below
        if follower.cursor.known and not tracker.holds_run():
            follower.cursor.offset, follower.cursor.refused = 0, []
    if follower.cursor.offset >= tracker.folder.log.size:
        return follower.cursor.refused
    follower.start(0.0)
    return follower.cursor.refused if follower.finish(tracker.config.flush_timeout) else None


def complete(folder: str | Path, uri: str | None = None) -> bool:
    """Send the data that trackers lack of a run that has ended, whose process may have been killed while sending.

    The run in a store stays the same, with one value per metric and step. An outage is a warning, and the call can be repeated.

    Args:
        folder: of the run.
        uri: of the MLflow store, whose secrets the run's record does not have; ``None``: the recorded address.

    Raises:
        BpfreeError: there is no record of a run.

    Returns:
        Whether nothing is left to send.
    """
    remove_abandoned(Path(folder), "*")
    run = read_run(folder)
    config = settled(config_of(run), folder) if uri is None else dataclasses.replace(config_of(run), uri=uri)
    if not config.enabled or run.status in ("created", "running") or _has_all(RunFolder(folder), config):
        return True
    try:
        return send(folder, config) is not None
    except Exception as error:
        logger.warning("the tracking of %s could not be completed: %s", run.name, redact(f"{type(error).__name__}: {error}"))
        return False


def is_sent(folder: str | Path) -> bool:
    """Tell whether the trackers of a run have all of its log, according to the run's folder."""
    return _has_all(RunFolder(folder), config_of(read_run(folder)))


def _has_all(place: RunFolder, config: TrackingConfig) -> bool:
    return all(Cursor.read(place.cursor(name)).offset >= place.log.size for name in config.to)


def config_of(run: Run) -> TrackingConfig:
    """Rebuild a run's options ``tracking.*`` from its configuration."""
    known = {item.name for item in dataclasses.fields(TrackingConfig)}
    options = {key.removeprefix("tracking."): value for key, value in run.config.items() if key.startswith("tracking.")}
    return TrackingConfig(**{name: value for name, value in options.items() if name in known})
