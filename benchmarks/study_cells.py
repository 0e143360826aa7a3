"""Collect the finished cells of a study in a small file of results, beside those of other studies that the file has.

A row of the file has a run for each seed: test score, validation scores by epoch, score of the probed features, tuned settings, and
processor seconds. Cells of the same study that the file already has stay, unless they were run again.

    python benchmarks/study_cells.py feedback-depth --runs runs --to benchmarks/results/feedback_studies-cpu.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
import torch

from bpfree.files import write_text
from bpfree.study.file import find_study
from bpfree.study.store import CellRecord, CellStore
from bpfree.version import __version__


def cell(record: CellRecord, tuned: Sequence[str]) -> dict[str, Any]:
    """Return what is kept of a finished cell; shares are in per cent."""
    metric, result, history = record.primary, record.result, record.history

    def shown(value: float) -> float:
        return round(100 * value, 3) if metric.share else value

    chosen = {key: record.key.identity["config"][key] for key in tuned}
    kept: dict[str, Any] = {"seed": record.key.seed, f"test_{metric.name}": shown(result[f"test/{metric.name}"])}
    by_epoch = [shown(epoch[f"val/{metric.name}"]) for epoch in history if f"val/{metric.name}" in epoch]
    if by_epoch:
        kept[f"validation_{metric.name}_by_epoch"] = by_epoch
    if f"test/linear_probe/{metric.name}" in result:
        kept["probed"] = shown(result[f"test/linear_probe/{metric.name}"])
    if "train/processor_seconds" in result:
        kept["processor_seconds"] = round(result["train/processor_seconds"], 1)
    return kept | ({"tuned": chosen} if chosen else {})


def cells(store: CellStore, tuned: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the finished cells of a study's folder, by ``ROW`` or ``ROW / COLUMN``, without trials."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((store.folder / "cells").glob("*.json")):
        record = store.read(path.stem)
        if record is not None and record.status == "finished" and record.key.trial is None:
            name = " / ".join(filter(None, (record.key.row, record.key.column)))
            found.setdefault(name, []).append(cell(record, tuned))
    return {name: sorted(rows, key=lambda row: int(row["seed"])) for name, rows in sorted(found.items())}


def merged(old: dict[str, list[dict[str, Any]]], new: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Return the cells of both; the new ones replace old ones of the same row and seed."""
    rows = dict(old)
    for name, runs in new.items():
        seeds = {run["seed"] for run in runs}
        rows[name] = sorted([*(run for run in rows.get(name, []) if run["seed"] not in seeds), *runs], key=lambda run: int(run["seed"]))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Collect a study's cells."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study", help="its name, or the path of its file")
    parser.add_argument("settings", nargs="*", help="KEY=VALUE words that the study was run with")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs (the option output)")
    parser.add_argument("--to", type=Path, required=True, metavar="FILE", help="file of results; it is created if it is not there")
    parser.add_argument("--note", help="what a reader of the figures must know")
    options = parser.parse_args(arguments)
    study = find_study(options.study)
    found = cells(CellStore.of(options.runs, study.name, study.path), list(study.tune.space) if study.tune else [])
    if not found:
        raise SystemExit(f"{options.runs} has no finished cell of {study.name}: name the folder of its runs with --runs")
    content: dict[str, Any] = json.loads(options.to.read_text(encoding="utf-8")) if options.to.is_file() else {}
    content |= {
        "benchmark": options.to.stem.rpartition("-")[0],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "bpfree": __version__},
        "hardware": {"cpu": measure.cpu_name(), "cores": os.cpu_count(), "gpu": None},
        "threads": 1,
    }
    if options.note:
        content["note"] = options.note
    studies = content.setdefault("studies", {})
    before = studies.get(study.name, {})
    studies[study.name] = {
        "command": " ".join(["bpfree study run", study.name, *options.settings]),
        "cells": merged(before.get("cells", {}), found),
    }
    write_text(options.to, json.dumps(content, indent=1) + "\n")
    for name, runs in studies[study.name]["cells"].items():
        print(name, *(next(value for key, value in run.items() if key.startswith("test_")) for run in runs))


if __name__ == "__main__":
    main()
