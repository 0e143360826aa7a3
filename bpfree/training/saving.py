"""The checkpoints of one run: their contents, and resuming from one."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bpfree.errors import BpfreeError
from bpfree.record.folder import RunFolder, read_run
from bpfree.redaction import redacted
from bpfree.training.checkpoint import FIX, check_rule, read_checkpoint, write_checkpoint
from bpfree.training.setup import Setup
from bpfree.training.state import RunState
from bpfree.version import __version__

__all__ = ["Checkpoints"]


class Checkpoints:
    """Writes a run's checkpoints, if it has a folder, and reads the one that it resumes from.

    The first of several processes writes and reads; all of them call each method.

    Args:
        setup: the run's.
        state: of the run.

    Attributes:
        saved_at, saved_epoch: when the last one was written (on the monotonic clock), and after which epoch.
        trouble: why one could not be written, if any since the last one that was.
    """

    def __init__(self, setup: Setup, state: RunState) -> None:
        self._setup, self._run, self._task, self._state, self._world = setup, setup.run, setup.task, state, setup.world
        self._writes = self._world.from_first(lambda: setup.run.folder is not None)
        self.saved_at, self.saved_epoch, self.trouble = time.monotonic(), -1, ""

    def _identity(self) -> dict[str, Any]:
        return {
            "bpfree": __version__,
            "config": redacted(self._setup.recipe),
            "rule": type(self._setup.rule).__name__,
            "task": self._task.spec.recorded(),
            "seed": self._setup.config.seed,
            "budget": dataclasses.asdict(self._setup.budget),
            "phases_begun": self._state.begun,
            "stages": self._task.stages_recorded(),
        }

    def _write(self, name: str, content: dict[str, Any]) -> Path | None:
        if self._run.folder is None:
            return None
        path = RunFolder(self._run.folder).checkpoints / name
        write_checkpoint(path, self._identity() | content)
        return path

    def save(self, weights: Mapping[str, Any] | None = None) -> Path | None:
        """Write the state (``last.pt``), with the rule's weights or others; ``None`` if nothing is written here."""
        if not self._writes:
            return None
        about = {"id": self._run.id, "name": self._run.name}
        training = self._state.state_dict() | {"run": about, "fingerprint": self._task.fingerprint()}
        weights = self._state.team.weights() if weights is None else weights
        path = self._world.from_first(lambda: self._write("last.pt", {"weights": weights, "training": training}))
        if path is not None and self._world.first and self._setup.config.checkpoint.keep == "all" and not self._state.at.batch:
            self._keep(path)
        self.saved_at, self.saved_epoch, self.trouble = time.monotonic(), self._state.at.epoch, ""
        return path if self._world.first else None

    def _keep(self, path: Path) -> None:
        """Give the checkpoint a name of its own, which no later one replaces."""
        kept = path.with_name(f"epoch-{self._state.at.epoch:04d}.pt")
        kept.unlink(missing_ok=True)
        try:
            os.link(path, kept)
        except OSError:  # a file system without links
            shutil.copy(path, kept)

    def save_selected(self, weights: Mapping[str, Any], score: float) -> None:
        """Write the weights that will be tested (``selected.pt``)."""
        self._write("selected.pt", {"weights": weights, "score": score})

    def _history(self, path: Path) -> list[dict[str, float]]:
        """Read the learning curves so far from the log in the checkpoint's folder."""
        if self._run.history or not self._writes:
            return self._run.history
        try:
            return read_run(path.parent.parent).history
        except BpfreeError:
            return []

    def read(self, path: Path) -> Mapping[str, Any]:
        """Read a checkpoint and restore its position; weights follow when the phases have been replayed.

        Raises:
            BpfreeError: it is of another rule or other data, or holds weights only.
        """
        several = self._world.size > 1  # then the first process reads it for all
        saved: dict[str, Any] = self._world.from_first(lambda: read_checkpoint(path, device="cpu" if several else self._setup.device))
        check_rule(saved, self._setup.rule, path)
        training = saved.get("training")
        if training is None:
            raise BpfreeError("the checkpoint holds weights only: a run cannot be resumed from it", where=str(path), fix="use last.pt")
        if training.get("fingerprint") != self._task.fingerprint():
            raise BpfreeError(
                "the checkpoint was made on other data",
                where=f"{path}, task {saved['task']['name']}",
                fix="resume with the same task, split and data",
            )
        try:
            self._state.take_position(training)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # bpfree did not write it
            raise BpfreeError(
                f"the checkpoint's state of training is not as bpfree writes it: {error}", where=str(path), fix=FIX
            ) from error
        self._run.resumed, self._run.epoch = True, self._state.at.epoch
        self._run.history = [metrics for metrics in self._history(path) if metrics["epoch"] <= self._run.epoch]
        return saved
