"""What is known of cells: one JSON file each, replaced atomically, and a lock while a process works on it."""

from __future__ import annotations

import dataclasses
import datetime
import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bpfree.errors import BpfreeError
from bpfree.files import write_text
from bpfree.tracking.events import strict

if TYPE_CHECKING:
    from bpfree.study.worker import Job

__all__ = ["Outcome", "State"]

Status = Literal["running", "interrupted", "finished", "diverged", "failed", "timeout", "refused"]


@dataclass
class Outcome:
    """How a cell stands.

    Attributes:
        cell: its hash.
        row, column, seed: its place in the table that asked for it first.
        status: ``finished``, ``diverged``, ``failed``, ``timeout``; ``running`` and ``interrupted`` go on from their checkpoint;
            ``refused`` never began (its data are not there, say) and is tried again.
        reason: why it did not finish, or what of it could not be measured.
        run: name of the run's folder in the output folder.
        result: metrics of the end.
        history: metrics of each epoch, as the run noted them.
        tags: of the run: device, versions, data fingerprint.
        elapsed: seconds that it took in all, evaluation and everything else included.
        tracking: where its MLflow run is.
        trial: number of the trial, for a cell of tuning.
        parallel: the most cells that ran at the same time on its machine; whether its seconds can be compared says
            :func:`bpfree.study.timing.comparable`.
        identity: what the numbers depend on.
    """

    cell: str
    row: str
    column: str
    seed: int
    status: Status = "running"
    reason: str = ""
    run: str = ""
    started: str = ""
    updated: str = ""
    result: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    elapsed: float = 0.0
    parallel: int = 1
    trial: int | None = None
    tracking: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)

    @property
    def is_final(self) -> bool:
        """Whether it is left alone unless asked for again."""
        return self.status in ("finished", "diverged", "failed", "timeout")


class State:
    """The folder of a study's cells.

    Args:
        output: folder of runs.
        study: name of the study.
    """

    def __init__(self, output: Path, study: str) -> None:
        self.folder_of_all = output / "studies"
        self.folder = self.folder_of_all / study

    def path_of(self, cell: str) -> Path:
        """The file of a cell."""
        return self.folder / "cells" / f"{cell}.json"

    def read(self, cell: str) -> Outcome | None:
        """What is known of a cell; ``None`` for nothing, or a file that cannot be read."""
        try:
            content = json.loads(self.path_of(cell).read_text(encoding="utf-8"))
            known = Outcome(**content)
            known.result = {key: float(value) for key, value in known.result.items()}
            known.history = [{key: float(value) for key, value in metrics.items()} for metrics in known.history]
        except (OSError, ValueError, TypeError, AttributeError):
            return None
        return known

    def seen(self, cell: str) -> Outcome | None:
        """The same for readers: what nobody works on any more is not running."""
        known = self.read(cell)
        if known is not None and known.status == "running":
            known.status = "running" if self._is_held(cell) else "interrupted"
        return known

    def _is_held(self, cell: str) -> bool:
        """Whether a process works on the cell; changes nothing, so that others may look too."""
        try:
            with self._lock_of(cell).open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def _lock_of(self, cell: str) -> Path:
        return self.folder / "cells" / f".{cell}.lock"

    def write(self, outcome: Outcome) -> None:
        """Note how a cell stands.

        Raises:
            BpfreeError: the folder cannot be written.
        """
        outcome.updated = now()
        try:
            write_text(self.path_of(outcome.cell), json.dumps(strict(dataclasses.asdict(outcome)), indent=2, default=str) + "\n")
        except OSError as error:
            raise BpfreeError(
                f"cannot write the state of the study: {error.strerror}", where=str(self.folder), fix="choose another with output=FOLDER"
            ) from error

    @contextmanager
    def lock(self, cell: str) -> Iterator[bool]:
        """Whether the cell is ours while the context lasts; ``False`` if another process has it. A crash releases it."""
        path = self._lock_of(cell)  # stays behind: to remove it would race with who just opened it
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("w")
        except OSError as error:
            raise BpfreeError(
                f"cannot write the state of the study: {error.strerror}", where=str(self.folder), fix="choose another with output=FOLDER"
            ) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    def others(self, cells: set[str]) -> int:
        """How many finished cells lie here that are none of these: of other settings, seeds or sources."""
        found = (self.read(path.stem) for path in self.folder.glob("cells/*.json") if path.stem not in cells)
        return sum(outcome is not None and outcome.status == "finished" for outcome in found)

    def begin(self, job: Job, before: Outcome | None) -> Outcome:
        """The record of a cell that is about to run; with what is known of the run that it resumes."""
        kept = before if before is not None and not before.is_final else None
        goes_on = before if before is not None and not job.restart else None  # its checkpoint holds the seconds of then
        return Outcome(
            job.cell,
            job.row,
            job.column,
            job.seed,
            run=job.run_id,
            started=kept.started if kept is not None else now(),
            elapsed=kept.elapsed if kept is not None else 0.0,
            parallel=goes_on.parallel if goes_on is not None else 1,
            trial=job.trial,
            identity=dict(job.identity),
        )


def now() -> str:
    """Local time with its offset."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
