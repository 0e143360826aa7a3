"""The runs in a folder: found, filtered, sorted, compared and deleted."""

from __future__ import annotations

import datetime
import fnmatch
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpfree.errors import BpfreeError, UsageError, nearest
from bpfree.record.folder import RunFolder, read_run
from bpfree.run import Run

__all__ = ["STATUSES", "Known", "delete", "differing", "find_runs", "refusal", "selected", "since", "sorted_by", "value_of"]

STATUSES = ("running", "finished", "diverged", "interrupted", "failed")
SHORT = ("rule", "network", "task", "program")
"""Sections whose name a filter means."""
UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
SPLITS = ("test", "val", "train")


@dataclass(frozen=True)
class Known:
    """A run in a folder.

    Attributes:
        run: as its log has it.
        folder: its place.
        began: local time of its first event.
    """

    run: Run
    folder: Path
    began: datetime.datetime

    @property
    def resumable(self) -> bool:
        """Whether it can be resumed from a checkpoint."""
        return RunFolder(self.folder).last.is_file() and self.run.status in ("interrupted", "failed")

    @property
    def failed(self) -> bool:
        """Whether it came to nothing: it failed or diverged, or was killed before its first checkpoint."""
        return self.run.status in ("failed", "diverged") or (self.run.status == "interrupted" and not self.resumable)


def find_runs(output: Path) -> Iterator[Known]:
    """Read the runs in a folder, the oldest name first.

    Raises:
        UsageError: no such folder.
    """
    if not output.is_dir():
        raise UsageError("no such folder", where=str(output), fix="give the folder of runs (their setting output)")
    for folder in sorted(output.iterdir()):
        if not folder.name.startswith(".") and (known := known_at(folder)) is not None:
            yield known


def known_at(folder: Path) -> Known | None:
    """Read the run in a folder; ``None`` if it is no run's."""
    try:
        run = read_run(folder)
    except BpfreeError:
        return None
    event, _ = next(RunFolder(folder).log.read())
    return Known(run, folder, datetime.datetime.fromtimestamp(event["time"] / 1000))


def selected(runs: Iterable[Known], filters: Mapping[str, str], after: datetime.datetime | None = None) -> list[Known]:
    """Return the runs that all filters match.

    Args:
        runs: to choose from.
        filters: by ``status``, ``study``, ``rule``, ``task``, or any key of the configuration; a value may have the wildcards ``*`` and
            ``?``, and a number matches an equal one.
        after: when they began at the earliest.

    Raises:
        UsageError: a status that is none; or a key that no run has.
    """
    runs = list(runs)
    if "status" in filters and not any(fnmatch.fnmatch(each, filters["status"]) for each in STATUSES):
        raise UsageError(f"unknown status {filters['status']!r}", where="status", fix=f"known: {', '.join(STATUSES)}")
    for key in filters:
        if runs and key not in ("status", "study", *SHORT) and not any(key in known.run.config for known in runs):
            guess = nearest(key, {name for known in runs for name in known.run.config})
            raise UsageError(
                f"no run has the setting {key}", where=key, fix=f"did you mean {guess}?" if guess else "see bpfree runs show RUN"
            )
    return [
        known
        for known in runs
        if (after is None or known.began >= after) and all(_matches(known.run, key, wanted) for key, wanted in filters.items())
    ]


def _matches(run: Run, key: str, wanted: str) -> bool:
    if key in ("status", "study"):
        value: Any = run.status if key == "status" else run.tags.get("study", "")
    else:
        value = run.config.get(f"{key}.name" if key in SHORT else key)
    text = {None: "none", True: "true", False: "false"}.get(value, str(value)) if not isinstance(value, list) else str(value)
    try:
        return float(text) == float(wanted)
    except ValueError:
        return fnmatch.fnmatch(text.lower(), wanted.lower())


def since(text: str, now: datetime.datetime | None = None) -> datetime.datetime:
    """Read a time: ``2026-11-30``, ``2026-11-30 14:00``, ``today``, or how long ago: ``30m``, ``12h``, ``7d``, ``2w``.

    Raises:
        UsageError: it is none of these.
    """
    now = now or datetime.datetime.now()
    if text == "today":
        return now.replace(hour=0, minute=0, second=0, microsecond=0)
    if found := re.fullmatch(r"(\d+)([mhdw])", text):
        return now - datetime.timedelta(**{UNITS[found[2]]: int(found[1])})
    try:
        return datetime.datetime.fromisoformat(text).replace(tzinfo=None)
    except ValueError:
        raise UsageError(f"{text!r} is no time", where="--since", fix="give 2026-11-30, today, or how long ago: 12h, 7d") from None


def value_of(run: Run, key: str) -> float:
    """Return a number of a run by its key: ``accuracy`` (of the test), ``val/loss`` (of the last epoch), ``seconds``; NaN without one."""
    last = run.history[-1] if run.history else {}
    for name in (key, f"test/{key}", f"train/{key}", f"val/{key}"):
        for values in (run.result, last):
            if name in values:
                return values[name]
    return math.nan


def sorted_by(runs: Iterable[Known], key: str) -> list[Known]:
    """Sort runs by a number, the best first, those without one last; or by ``date``, the newest first.

    Raises:
        UsageError: no run has this number.
    """
    runs = list(runs)
    if key == "date":
        return sorted(runs, key=lambda known: known.began, reverse=True)
    values = {known.folder: value_of(known.run, key) for known in runs}
    if runs and all(math.isnan(value) for value in values.values()):
        known_keys = {name for known in runs for name in (*known.run.result, *(known.run.history[-1] if known.run.history else ()))}
        guess = nearest(key, [*(name.rpartition("/")[2] for name in known_keys), *known_keys])
        fix = f"did you mean {guess}?" if guess else "a metric, such as accuracy or val/loss; or date"
        raise UsageError(f"no run has a number {key!r}", where="--sort", fix=fix)
    metric = next((known.run.metric(key) for known in runs if not math.isnan(values[known.folder])), None)
    greater = metric is not None and metric.greater and not key.endswith("seconds")
    return sorted(runs, key=lambda known: math.inf if math.isnan(value := values[known.folder]) else -value if greater else value)


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return the settings in which runs differ, with the value of each run; ``None`` where it has no such setting."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    found = {key: [run.config.get(key) for run in runs] for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


# --- deleting -----------------------------------------------------------------------------------------------------------------


def refusal(folder: Path, *, studies: bool = False) -> str:
    """Say why a folder is not deleted; the empty string if it may be.

    Args:
        folder: of the run.
        studies: whether runs of a study may be deleted, whose records name them.
    """
    if folder.is_symlink():
        return "a symbolic link, not a run's folder"
    known = known_at(folder)
    if known is None:
        return "no run's folder" if folder.is_dir() else "no such run"
    if RunFolder(folder).log.is_held():
        return "in use by a process"
    if not studies and "study" in known.run.tags:
        return f"a run of the study {known.run.tags['study']}, whose report needs it"
    return ""


def size_of(folder: Path) -> int:
    """Count the bytes of the files in a folder, without following symbolic links."""
    return sum((Path(place) / name).lstat().st_size for place, _, names in os.walk(folder) for name in names)


def delete(folder: Path, *, studies: bool = False) -> None:
    """Delete a run's folder; what symbolic links in it point to stays.

    Args:
        folder: of the run.
        studies: as of :func:`refusal`.

    Raises:
        BpfreeError: it is no run's folder, in use, or cannot be deleted.
    """
    if reason := refusal(folder, studies=studies):
        raise BpfreeError(f"this is {reason}", where=str(folder), fix="nothing was deleted")
    away = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    try:
        with RunFolder(folder).log as log:
            log.open()  # and hold it, so that no process resumes the run meanwhile
            folder.rename(away)  # first of all in one step, so that there never is a part of a run
            shutil.rmtree(away)
    except OSError as error:
        raise BpfreeError(f"cannot delete the run: {error.strerror}", where=str(folder), fix="delete what is left of it by hand") from error
