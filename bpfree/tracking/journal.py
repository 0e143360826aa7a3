"""The run's own record, whatever becomes of the tracking store: ``run.json`` and ``metrics.jsonl`` in its folder.

Both are strict JSON: a number that is not finite is the string ``NaN``, ``Infinity`` or ``-Infinity`` (which ``float``
reads), because ``null`` would not tell a diverged loss from a missing one.
"""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bpfree.errors import BpfreeError
from bpfree.files import write_text
from bpfree.hooks import hookimpl
from bpfree.run import Run
from bpfree.tracking.events import strict

__all__ = ["Journal", "ended_as", "recorded"]

BETWEEN_WRITES = 1.0


def ended_as(folder: Path) -> dict[str, Any]:
    """The end of a run as its journal records it; empty if it cannot be read."""
    try:
        content = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def recorded(folder: Path) -> Run:
    """A run as its journal has it, to be looked at or told of; not to be trained.

    Raises:
        BpfreeError: there is no record in this folder.
    """
    content = _read(folder / "run.json")
    if "id" not in content or "name" not in content:
        raise BpfreeError("there is no record of a run", where=str(folder), fix="give a run's folder")
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return Run(
        content["id"],
        content["name"],
        folder=folder,
        config=content["config"],
        tags=content["tags"],
        total_epochs=content["total_epochs"],
        resumed=True,
        status=content["status"],
        reason=content["reason"],
        epoch=content["epoch"],
        history=[_numbers(json.loads(line)) for line in lines if _epoch(line) is not None],
        result=_numbers(content["result"]),
        artifacts={name: folder / place for name, place in content["artifacts"].items()},
        tracking=content["tracking"],
    )


class Journal:
    """Writes ``metrics.jsonl`` (a line per epoch) and ``run.json`` (how the run stands, replaced atomically)."""

    def __init__(self) -> None:
        self._times: dict[str, Any] = {}
        self._written = 0.0

    @hookimpl
    def run_start(self, run: Run) -> None:
        """Begin the files; a resumed run drops the epochs after the one that it goes on from."""
        if run.folder is None:
            return
        run.folder.mkdir(parents=True, exist_ok=True)
        old = _read(run.folder / "run.json") if run.resumed else {}
        self._times = {"started": old.get("started") or _now(), "resumed": list(old.get("resumed") or [])}
        if run.resumed:
            self._times["resumed"].append(_now())
        _restart_metrics(run, run.folder / "metrics.jsonl")
        self._write(run, run.folder, status="running")

    @hookimpl
    def epoch_end(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Add a line."""
        if run.folder is None:
            return
        with (run.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(_line(metrics))
        if time.monotonic() - self._written >= BETWEEN_WRITES:
            self._write(run, run.folder, status="running")

    @hookimpl
    def run_end(self, run: Run) -> None:
        """Write how it ended."""
        if run.folder is None:
            return
        self._times["ended"] = _now()
        self._write(run, run.folder, status=run.status)

    def _write(self, run: Run, folder: Path, status: str) -> None:
        content = {
            "id": run.id,
            "name": run.name,
            "status": status,
            "reason": run.reason,
            **self._times,
            "updated": _now(),
            "epoch": run.epoch,
            "total_epochs": run.total_epochs,
            "result": run.result,
            "tags": run.tags,
            "tracking": run.tracking,
            "artifacts": {name: os.path.relpath(path, folder) for name, path in run.artifacts.items()},
            "config": run.config,
        }
        write_text(folder / "run.json", json.dumps(strict(content), indent=2, allow_nan=False, default=str) + "\n")
        self._written = time.monotonic()


def _restart_metrics(run: Run, path: Path) -> None:
    """An empty file, or the lines up to the epoch that a resumed run goes on from; its history fills what is missing."""
    lines: dict[float, str] = {}
    if run.resumed:
        lines = {metrics["epoch"]: _line(metrics) for metrics in run.history if "epoch" in metrics}
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            epoch = _epoch(line)
            if epoch is not None:
                lines[epoch] = f"{line}\n"
    write_text(path, "".join(lines[epoch] for epoch in sorted(lines) if epoch <= run.epoch))


def _epoch(line: str) -> float | None:
    """The epoch of a line; ``None`` if a crash has cut it off."""
    try:
        return float(json.loads(line)["epoch"])
    except (ValueError, KeyError, TypeError):
        return None


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Inverse of ``strict``."""
    return {name: float(value) for name, value in metrics.items()}


def _line(metrics: Mapping[str, float]) -> str:
    return json.dumps(strict(metrics), allow_nan=False, default=float) + "\n"


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="milliseconds")
