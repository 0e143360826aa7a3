"""Telling the store what a process that was killed could not: everything once more, of which the store takes what it lacks."""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import math
from pathlib import Path

from bpfree.run import Run
from bpfree.tracking.config import TrackingConfig
from bpfree.tracking.events import SPOOL_NAME, Spool
from bpfree.tracking.journal import recorded
from bpfree.tracking.mlflow_tracker import ENDS, MLflowTracker, opening_of
from bpfree.tracking.store import Store, redact

__all__ = ["complete"]

logger = logging.getLogger("bpfree.tracking")

NOT_ENDED = ("created", "running")


def complete(folder: Path) -> bool:
    """Bring the store to where a run that has ended left it, or would have.

    Args:
        folder: of the run, with its journal.

    Raises:
        BpfreeError: there is no journal.

    Returns:
        Whether nothing is left to send; outages are warnings.
    """
    run = recorded(folder)
    config = _config(run)
    if not config.enabled or run.status in NOT_ENDED:
        return True
    try:
        if not _left(folder) and _is_there(run, Store(config.resolve_uri(folder.parent), config.timeout), config):
            return True
        tracker = MLflowTracker(config, folder.parent)
        tracker.run_start(run)
        tracker.finish(run, _ended(folder))
    except Exception as error:
        logger.warning("the tracking of %s could not be completed: %s", run.name, redact(f"{type(error).__name__}: {error}"))
        return False
    return not _left(folder)


def _config(run: Run) -> TrackingConfig:
    """The run's own options, without what only a run that trains has."""
    known = {item.name for item in dataclasses.fields(TrackingConfig)}
    options = {key.removeprefix("tracking."): value for key, value in run.config.items() if key.startswith("tracking.")}
    config = TrackingConfig(**{name: value for name, value in options.items() if name in known})
    return dataclasses.replace(config, required=False, system=False)


def _left(folder: Path) -> bool:
    """Whether something waits to be sent; what the store has refused does not."""
    return bool(Spool(folder / SPOOL_NAME).read()[1])


def _is_there(run: Run, store: Store, config: TrackingConfig) -> bool:
    """Events are sent in order, the end last: a run that has ended with these results is there whole."""
    wanted = dict.fromkeys(run.result, math.nan) | ({"epoch": float(run.epoch)} if run.history else {})
    return store.has(opening_of(run, store, config, 0), ENDS.get(run.status, "FAILED"), wanted)


def _ended(folder: Path) -> int:
    """When the journal says that the run ended, in milliseconds since 1970."""
    text = json.loads((folder / "run.json").read_text(encoding="utf-8"))["ended"]
    return int(1000 * datetime.datetime.fromisoformat(text).timestamp())
