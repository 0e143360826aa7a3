"""What two workers save: 16 equal cells with one worker and with two, and how soon a finished study answers.

Every command is a separate process, from its start to its report, so that starting Python, torch and the workers counts. At least 1.7
times the speed of one worker on two free cores, and an answer within 5 s.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import measure

TARGET, SECONDS = 1.7, 5.0
CELLS, EPOCHS = 16, 60
QUICK_CELLS, QUICK_EPOCHS = 2, 1
HEADERS = ("pair", "one worker, s", "two workers, s", "speed-up")


def written(folder: Path, cells: int, epochs: int) -> Path:
    """Write a study of this many cells that differ in their seed alone."""
    content = {
        "title": "Equal cells",
        "settings": {"task": "digits", "rule": "backprop", "device": "cpu", "threads": 1, "network.width": 256, "budget.epochs": epochs},
        "seeds": cells,
        "rows": [{"label": "backprop"}],
    }
    path = folder / "study.yaml"
    path.write_text(json.dumps(content), encoding="utf-8")  # which is YAML as well
    return path


def run(study: Path, jobs: int) -> float:
    """Return the seconds of ``bpfree study run`` in an empty folder, or in that of an earlier run with as many jobs."""
    folder = study.parent / f"jobs-{jobs}"
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "bpfree", "study", "run", str(study), "--jobs", str(jobs), "--quiet"]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "MLFLOW_DISABLE_TELEMETRY": "true"}
    since = time.perf_counter()
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - since


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = measure.Benchmark("study_workers", __doc__, pairs=2)
    options = benchmark.start(arguments)
    cells, epochs = (QUICK_CELLS, QUICK_EPOCHS) if options.quick else (CELLS, EPOCHS)
    pairs, again = [], []
    for number in range(options.pairs):
        with tempfile.TemporaryDirectory() as place:
            study = written(Path(place), cells, epochs)
            order = (1, 2) if number % 2 == 0 else (2, 1)
            seconds = {jobs: run(study, jobs) for jobs in order}
            again.append(run(study, 1))
        pairs.append((seconds[1], seconds[2]))
        print(f"pair {number + 1}: {seconds[1]:.1f} s, {seconds[2]:.1f} s; again: {again[-1]:.2f} s", flush=True)
    ratios = [one / two for one, two in pairs]
    rows = [(f"{number}", f"{one:.1f}", f"{two:.1f}", f"{one / two:.2f}") for number, (one, two) in enumerate(pairs, start=1)]
    measure.print_table(HEADERS, rows, right=range(1, 4))
    print(f"\n{cells} cells: {max(ratios):.2f} times as fast with two workers (target {TARGET})")
    print(f"finished, again: {max(again):.2f} s (target {SECONDS:g})")
    benchmark.finish(
        {
            "cells": cells,
            "epochs": epochs,
            "seconds": [{"one": one, "two": two} for one, two in pairs],
            "ratios": ratios,
            "target_ratio": TARGET,
            "again_seconds": again,
            "target_again_seconds": SECONDS,
        }
    )


if __name__ == "__main__":
    main()
