"""Records of cells: a JSON file each, replaced atomically, and a lock while a process works on the cell.

The events of a cell's run are in the log of the run's folder, which the record of the cell names.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bpfree import system
from bpfree.errors import BpfreeError, DiskError
from bpfree.files import inside, write_text
from bpfree.leaves import Leaf
from bpfree.metric import Metric
from bpfree.record.folder import RunFolder, read_run
from bpfree.record.log import strict
from bpfree.run import Run, as_file

__all__ = ["SHARE", "CellKey", "CellRecord", "CellStore"]

Status = Literal["running", "interrupted", "finished", "diverged", "failed", "timeout", "refused", "paused", "pruned"]

ABOUT = ("result", "history", "tags", "tracking", "metrics")
"""Fields that a record keeps of a run whose folder is not on this machine."""

OWNER = "study-file"
"""Name of the file in a study's folder that holds the path of the study's file."""

SHARE = 0.9
"""Share of its threads' time that a run must have had a processor, for its seconds to be comparable."""


@dataclass(frozen=True)
class CellKey:
    """The key of a cell: its place in the table, and everything that its results depend on.

    Attributes:
        id: hash of the identity, 16 hex digits.
        row, column: labels; in a record, those of the table that asked for the cell first.
        seed: of the repetition.
        trial: number of the trial, for a cell of tuning, which never sees the test split.
        identity: everything that the results depend on.
        leaves: the settings that give the recipe, for other processes; records do not have them.
    """

    id: str
    row: str
    column: str
    seed: int
    trial: int | None = None
    identity: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    leaves: Sequence[Leaf] = field(default=(), compare=False, repr=False)

    @property
    def number(self) -> str:
        """Number of the seed, or of the trial."""
        return str(self.seed) if self.trial is None else f"trial {self.trial}"

    @property
    def label(self) -> str:
        """Label of the cell while it runs."""
        number = f"seed {self.seed}" if self.trial is None else self.number
        return " ".join(filter(None, [self.row, self.column and f"[{self.column}]", number]))


@dataclass
class CellRecord:
    """The record of a cell: its status and its run.

    Attributes:
        key: of the cell.
        status: ``finished``, ``diverged``, ``failed``, ``timeout``; ``running`` and ``interrupted`` are resumed from their checkpoint;
            ``refused`` never began (its data are not there, say) and is tried again; a trial that is ``paused`` waits at a rung to be
            compared with others, and is resumed unless it is ``pruned`` there.
        reason: why it did not finish, or which measurement failed.
        run: name of the run's folder in the output folder.
        elapsed: seconds that it took in all, evaluation and everything else included.
        parallel: the most cells that ran at the same time on its machine.
        place: the run's folder.
        about: the run, once its log was read; for a run on another machine, the fields that the machine sent.
    """

    key: CellKey
    status: Status = "running"
    reason: str = ""
    run: str = ""
    started: str = ""
    updated: str = ""
    elapsed: float = 0.0
    parallel: int = 1
    place: Path | None = field(default=None, repr=False, compare=False)
    about: Run | None = field(default=None, repr=False, compare=False)

    def seen(self) -> Run:
        """Return the run as read from its log; an empty run without a log."""
        if self.about is None and self.place is not None:
            with suppress(BpfreeError):
                self.about = read_run(self.place)
        return self.about or Run("", "")

    @property
    def result(self) -> dict[str, float]:
        """Final metrics of the run."""
        return self.seen().result

    @property
    def history(self) -> list[dict[str, float]]:
        """Metrics of each epoch of the run."""
        return self.seen().history

    @property
    def primary(self) -> Metric:
        """Primary metric of the run."""
        return self.seen().primary

    @property
    def tags(self) -> dict[str, str]:
        """Tags of the run: device, versions, data fingerprint."""
        return self.seen().tags

    @property
    def tracking(self) -> dict[str, str]:
        """Address and identifier of the MLflow run."""
        return self.seen().tracking

    @property
    def is_final(self) -> bool:
        """Whether the cell is not run again without ``retry``."""
        return self.status in ("finished", "diverged", "failed", "timeout")

    @property
    def processor_share(self) -> float | None:
        """Processor seconds over threads times wall seconds, of training on a CPU; ``None`` where they were not measured.

        For a cell without a result (a timeout, say) it is measured up to the last epoch.
        """
        last = self.history[-1] if self.history else {}
        wall = self.result.get("train/seconds", last.get("seconds"))
        processor = self.result.get("train/processor_seconds", last.get("processor_seconds"))
        try:
            threads = int(self.tags.get("threads", ""))
        except ValueError:
            return None
        if self.tags.get("device", "cpu") != "cpu" or not wall or processor is None or threads < 1:
            return None
        return processor / (threads * wall)

    @property
    def comparable(self) -> bool:
        """Whether the cell's seconds can be compared with those of other cells.

        On a CPU: if its threads had a processor for more than nine tenths of the time, whatever else ran at the same time. On a
        GPU, and without measured processor seconds: if it was the only cell on its machine.
        """
        share = self.processor_share
        return self.parallel <= 1 if share is None else share > SHARE

    def to_json(self) -> str:
        """Convert to the JSON of a cell's file: the key's fields are on the top level, its id as ``cell``."""
        own = {name: getattr(self, name) for name in ("status", "reason", "run", "started", "updated", "elapsed", "parallel")}
        if self.about is not None and (self.place is None or not RunFolder(self.place).log.size):
            own |= {name: getattr(self.about, name) for name in ABOUT}
        key = {name: getattr(self.key, name) for name in ("row", "column", "seed", "trial", "identity")}
        return json.dumps(strict({"cell": self.key.id, **key, **own}), indent=2, default=str) + "\n"

    @classmethod
    def from_json(cls, text: str) -> CellRecord:
        """Read a record that :meth:`to_json` wrote.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: the text is not a record.
        """
        content = json.loads(text)
        parts = {name: content.pop(name) for name in ("row", "column", "seed", "trial", "identity") if name in content}
        facts = {name: content.pop(name) for name in ABOUT if name in content}
        known = cls(CellKey(content.pop("cell"), **parts), **content)
        if facts:
            known.about = Run("", "", **facts)
            known.about.result = {key: float(value) for key, value in known.result.items()}
            known.about.history = [{key: float(value) for key, value in metrics.items()} for metrics in known.history]
        return known


class CellStore:
    """The folder of a study's cells.

    Args:
        output: folder of runs.
        study: name of the study.
    """

    def __init__(self, output: Path, study: str) -> None:
        self.output, self.study = output, study
        self.folder_of_all = output / "studies"
        self.folder = self.folder_of_all / study

    @classmethod
    def of(cls, output: Path, study: str, path: Path | None) -> CellStore:
        """Return the store of a study; two existing study files of the same name have different stores.

        Args:
            output: folder of runs.
            study: name of the study.
            path: of its file.
        """
        store = cls(output, study)
        with suppress(OSError, ValueError):
            owner = Path((store.folder / OWNER).read_text(encoding="utf-8").strip())
            if path is not None and owner != path.resolve() and owner.is_file():
                return cls(output, f"{study}-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:6]}")
        return store

    def claim(self, path: Path | None) -> None:
        """Record which study file the folder belongs to.

        Args:
            path: of the study's file.
        """
        if path is not None:
            with suppress(OSError):  # reported when the first cell is written
                write_text(self.folder / OWNER, f"{path.resolve()}\n")

    def path_of(self, cell: str) -> Path:
        """Return the file of a cell."""
        return self.folder / "cells" / f"{cell}.json"

    def run_of(self, key: CellKey) -> str:
        """Name the folder of a cell's run, which does not depend on the process that runs it."""
        config = key.identity["config"]
        twin = "-twin" if config.get("twin") else ""
        digest = hashlib.sha256(f"{self.study}\0{key.id}".encode()).hexdigest()[:12]
        trains = as_file(config.get("rule.name") or config["program.name"])
        return f"{trains}{twin}-{as_file(config['task.name'])}-s{key.seed}-{digest}"

    def read(self, cell: str) -> CellRecord | None:
        """Read the record of a cell; ``None`` if it does not exist or cannot be read."""
        try:
            known = CellRecord.from_json(self.path_of(cell).read_text(encoding="utf-8"))
            known.place = inside(self.output, known.run)
            return known
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def seen(self, cell: str) -> CellRecord | None:
        """Read a cell's record; a running cell whose worker has died counts as interrupted."""
        known = self.read(cell)
        if known is not None and known.status == "running":
            known.status = "running" if self._is_held(cell) else "interrupted"
        return known

    def _is_held(self, cell: str) -> bool:
        """Tell whether a process works on the cell; this changes nothing, so that other users may call it too."""
        try:
            with self._lock_of(cell).open("rb") as file:
                return not system.lock(file.fileno(), shared=True)
        except OSError:
            return False

    def _lock_of(self, cell: str) -> Path:
        return self.folder / "cells" / f".{cell}.lock"

    def write(self, record: CellRecord) -> None:
        """Write the record of a cell.

        Raises:
            DiskError: the folder cannot be written.
        """
        record.updated = now()
        try:
            write_text(self.path_of(record.key.id), record.to_json())
        except OSError as error:
            raise DiskError(
                f"cannot write the records of the study: {error.strerror}", where=str(self.folder), fix="choose another with output=FOLDER"
            ) from error

    @contextmanager
    def lock(self, cell: str) -> Iterator[bool]:
        """Lock a cell inside the context; yield ``False`` if another process has the lock, which a crash releases."""
        path = self._lock_of(cell)  # the file is kept: removing it would race with a process that has just opened it
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("wb")
        except OSError as error:
            raise DiskError(
                f"cannot write the records of the study: {error.strerror}", where=str(self.folder), fix="choose another with output=FOLDER"
            ) from error
        with file:
            try:
                free = system.lock(file.fileno())
            except OSError:  # a file system without locks
                free = True
            yield free

    def others(self, cells: set[str]) -> list[CellRecord]:
        """List the finished cells in the folder other than the given ones: of other settings, seeds or sources."""
        found = (self.read(path.stem) for path in sorted(self.folder.glob("cells/*.json")) if path.stem not in cells)
        return [record for record in found if record is not None and record.status == "finished"]

    def begin(self, key: CellKey, before: CellRecord | None, *, restart: bool = False) -> CellRecord:
        """Make the record of a cell that is about to run, with the state of the run that it resumes.

        Args:
            key: of the cell.
            before: its record so far.
            restart: whether it starts without the earlier checkpoint.
        """
        kept = before if before is not None and not before.is_final else CellRecord(key, started=now())
        parallel = 1 if before is None or restart else before.parallel  # its checkpoint holds the seconds up to then
        run = self.run_of(key)
        return CellRecord(key, run=run, started=kept.started, elapsed=kept.elapsed, parallel=parallel, place=self.output / run)


def now() -> str:
    """Return the local time with its offset."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
