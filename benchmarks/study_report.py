"""How long the report of a study takes, and how large its page is.

200 cells with made-up results (20 rows, 2 columns, 5 seeds; 100 epochs of curves each, with six blocks, targets, tuning and a control):
at most 20 s and 5 MB.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import measure

from bpfree.config import parse_words
from bpfree.run import Run
from bpfree.study.cells import Plan, plan
from bpfree.study.file import read_study
from bpfree.study.report import report_on, write_report
from bpfree.study.rows import Cell, TableRow, Trial, Tuned
from bpfree.study.store import CellRecord

SECONDS, MEGABYTES = 20.0, 5.0
"""What is to be kept to."""
ROWS, COLUMNS, SEEDS, EPOCHS, BLOCKS = 20, 2, 5, 100, 6
QUICK_ROWS, QUICK_EPOCHS = 3, 5
RULES = ("backprop", "dfa", "frozen", "linear")


def planned(folder: Path, rows: int) -> Plan:
    """Plan a study of this many rows."""
    content = {
        "title": "A report of many cells",
        "settings": {"task": "digits", "device": "cpu"},
        "seeds": SEEDS,
        "columns": [{"label": f"column {number}", "settings": {"batch_size": 32 * (number + 1)}} for number in range(COLUMNS)],
        "rows": [
            {"label": f"row {number}", "settings": {"rule": RULES[number % 4], "optimizer.lr": 0.001 * (number + 1)}}
            for number in range(rows)
        ],
        "controls": [f"row {rows - 1}"],
    }
    path = folder / "study.yaml"
    path.write_text(json.dumps(content), encoding="utf-8")  # which is YAML as well
    study = replace(read_study(path), targets={f"column {number}": 80.0 for number in range(COLUMNS)})
    return plan(study, parse_words([f"output={folder}"]))


def finished(cell: Cell, row: int, epochs: int) -> CellRecord:
    """Make a finished cell with an artificial curve; rows with greater numbers learn less."""
    chance = random.Random(f"{cell.key.row} {cell.key.column} {cell.key.seed}")
    best, seconds = 0.98 - 0.01 * row + chance.gauss(0, 0.003), 0.05 * (1 + row % 5)
    history = []
    for epoch in range(1, epochs + 1):
        accuracy = best - 0.8 * math.exp(-epoch / 8) + chance.gauss(0, 0.003)
        metrics = {"epoch": epoch, "samples": 1617 * epoch, "seconds": seconds * epoch, "forwards": 4851 * epoch, "peak_memory_mb": 2 + row}
        metrics |= {"train/loss": 1 - accuracy, "val/loss": 1 - accuracy, "val/accuracy": accuracy}
        for block in range(1, BLOCKS + 1):
            metrics |= {f"val/b{block}/accuracy": accuracy * block / BLOCKS, f"alignment/b{block}/cosine": chance.random() * block / BLOCKS}
        history.append({key: float(value) for key, value in metrics.items()})
    result = {"test/accuracy": best, "train/seconds": seconds * epochs, "train/peak_memory_mb": 2.0 + row, "train/samples": 1617.0 * epochs}
    result |= {"train/forwards": 4851.0 * epochs, "parameters": 59146.0, "parameters_trained": 1290.0}
    result |= {f"test/b{block}/accuracy": best * block / BLOCKS for block in range(1, BLOCKS + 1)}
    tags = {"network": "mlp", "reverse_span": "1", "downstream_weights": "0", "rule_lines": "40", "torch": "2", "threads": "1"}
    return CellRecord(cell.key, status="finished", about=Run("", "", result=result, history=history, tags=tags))


def made_lines(made: Plan, epochs: int) -> list[TableRow]:
    """Make the lines of a study with all cells finished and all rows tuned."""
    labels = [row.label for row in made.study.rows]
    lines = []
    for line in made.rows:
        row = labels.index(line.written.label)
        rates = [Trial({"optimizer.lr": 10 ** (-trial / 4)}, "finished", 90 - row - abs(trial - 8), 1.0) for trial in range(1, 20)]
        tuned = Tuned(["optimizer.lr"], [Trial({}, "finished", 80.0, 1.0), *rates], 20, logarithmic=["optimizer.lr"])
        lines.append(dataclasses.replace(line, records=[finished(cell, row, epochs) for cell in line.cells], tuned=tuned))
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = measure.Benchmark("study_report", __doc__)
    options = benchmark.start(arguments)
    rows, epochs = (QUICK_ROWS, QUICK_EPOCHS) if options.quick else (ROWS, EPOCHS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = planned(folder, rows)
        lines = made_lines(made, epochs)
        began = time.perf_counter()
        page = write_report(report_on(made, lines, ["study", "run", "study.yaml"]), folder)
        seconds = time.perf_counter() - began
        sizes = {kind: file.stat().st_size for kind, file in (("page", page), ("markdown", page.with_suffix(".md")))}
    megabytes = sizes["page"] / 1e6
    reached = seconds <= SECONDS and megabytes <= MEGABYTES
    print(f"{len(made.cells)} cells: {seconds:.2f} s (target <= {SECONDS:g} s), {megabytes:.2f} MB (target <= {MEGABYTES:g} MB)")
    benchmark.finish(
        {
            "cells": len(made.cells),
            "epochs": epochs,
            "seconds": seconds,
            "bytes": sizes,
            "target_seconds": SECONDS,
            "target_megabytes": MEGABYTES,
            "reached": reached,
        }
    )


if __name__ == "__main__":
    main()
