"""Write a run's log, and start its readers."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from bpfree.hooks import hookimpl
from bpfree.record.environment import environment
from bpfree.record.folder import RunFolder
from bpfree.record.log import FORMAT, EventLog
from bpfree.redaction import redacted
from bpfree.run import Run

__all__ = ["Reader", "Recorder"]

logger = logging.getLogger("bpfree.tracking")

BETWEEN_FILES = 60.0
"""Seconds between checks for new artifacts while a run trains; trackers upload each, which takes processor time."""


class Reader(Protocol):
    """Reads the log of a run while it grows."""

    def start(self, run: Run, log: EventLog) -> None:
        """Start to read the log, which has the run's beginning.

        Raises:
            BpfreeError: the run must not be trained.
        """

    def stop(self) -> None:
        """Stop adding events to the log, because the run ends."""

    def finish(self, run: Run) -> bool:
        """Read to the end of the complete log; return whether all of it has arrived."""

    def abandon(self) -> None:
        """Stop at once, because the run was refused."""


class Recorder:
    """Records the events of a run in its folder, and starts the readers; does nothing for a run without a folder.

    Args:
        readers: of the log.
    """

    def __init__(self, readers: Iterable[Reader] = ()) -> None:
        self._readers, self._reading = list(readers), list[Reader]()
        self._folder: RunFolder | None = None
        self._log: EventLog | None = None
        self._noted: dict[Path, int] = {}
        self._looked = 0.0

    @hookimpl(tryfirst=True)
    def run_start(self, run: Run) -> None:
        """Record that the run begins, and start the readers.

        Raises:
            BpfreeError: another process trains this run, or a reader refuses it.
        """
        if run.folder is None:
            return
        self._folder = RunFolder(run.folder)
        self._log, self._noted, self._looked = self._folder.log, {}, time.monotonic()
        self._log.open()
        config: dict[str, Any] = redacted(run.config)
        about: dict[str, Any] = {"total_epochs": run.total_epochs, "resumed": run.resumed, "epoch": run.epoch}
        about |= {"metrics": run.metrics, "parameters": run.parameters, "data": run.data, "environment": environment()}
        self._log.append("begin", format=FORMAT, id=run.id, name=run.name, config=config, tags=run.tags, **about)
        self._reading = []
        try:
            for reader in self._readers:
                self._reading.append(reader)
                reader.start(run, self._log)
        except BaseException:
            self._refuse(run)
            raise

    def _refuse(self, run: Run) -> None:
        """Remove the files of a run that a reader refuses, but keep those of earlier sessions."""
        assert self._log is not None
        assert self._folder is not None
        for reader in self._reading:
            reader.abandon()
        self._reading = []
        if not run.resumed and not run.reopened:
            self._log.close()
            for path in (self._log.path, *self._folder.cursors()):
                path.unlink(missing_ok=True)
            self._log = None

    @hookimpl(tryfirst=True)
    def epoch_end(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Record an epoch, and from time to time new files."""
        if self._log is None:
            return
        self._log.append("epoch", epoch=int(metrics.get("epoch", run.epoch)), metrics=metrics)
        if time.monotonic() - self._looked >= BETWEEN_FILES:
            self._note_artifacts(run)

    @hookimpl(tryfirst=True)
    def progress(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Record the means of some steps, but not the progress of an evaluation between two steps."""
        if self._log is not None and not metrics.keys() & {"evaluation", "features"}:
            self._log.append("progress", metrics=metrics)

    @hookimpl(trylast=True)
    def run_end(self, run: Run) -> None:
        """Record how the run ended, and let the readers read to the end.

        Raises:
            BpfreeError: the record could not be written.
        """
        if self._log is None:
            return
        for reader in self._reading:
            reader.stop()
        self._note_artifacts(run)
        self._log.append("end", status=run.status, reason=run.reason, epoch=run.epoch, result=run.result, tags=run.tags)
        try:
            self._log.close()
        finally:
            for reader in self._reading:
                reader.finish(run)
            self._log, self._reading = None, []

    def _note_artifacts(self, run: Run) -> None:
        """Record the files that are new, or have changed since they were recorded."""
        assert self._log is not None
        assert self._folder is not None
        self._looked = time.monotonic()
        for name, path in run.artifacts.items():
            changed = path.stat().st_mtime_ns if path.exists() else None
            if changed is None or self._noted.get(path) == changed:
                continue
            self._noted[path], inside = changed, self._folder.relative(path)
            if inside is None:
                logger.warning("the artifact %s lies outside of the run's folder, and is not recorded: %s", name, path)
            else:
                self._log.append("artifact", path=inside)
