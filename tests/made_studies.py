"""Studies with results that no one trained: for tests of reports, and to look at them."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bpfree.config import parse_words
from bpfree.run import Run
from bpfree.study.cells import Plan, plan
from bpfree.study.file import read_study
from bpfree.study.rows import Cell, TableRow, Trial, Tuned
from bpfree.study.store import CellKey, CellRecord

RULES = ("backprop", "dfa", "frozen", "linear")
TAGS = {
    "device_name": "a processor",
    "threads": "1",
    "torch": "2.9",
    "python": "3.12",
    "bpfree": "0.1",
    "plugin": "bpfree",
    "plugin_version": "0.1",
}


def cell_record(
    key: CellKey, status: str = "running", *, elapsed: float = 0.0, run: str = "", parallel: int = 1, **facts: Any
) -> CellRecord:
    """A record whose run has these facts: ``result``, ``history``, ``tags``, ``tracking``."""
    about = Run("", "", **facts)
    return CellRecord(key, status, elapsed=elapsed, run=run, parallel=parallel, about=about)  # type: ignore[arg-type]


def planned(
    folder: Path,
    *,
    rows: Sequence[str] = ("BP", "DFA", "frozen"),
    columns: Sequence[str] = (),
    seeds: int = 3,
    metric: str = "",
    published: Mapping[str, float] | None = None,
    controls: Sequence[str] = (),
    targets: Mapping[str, float] | None = None,
    words: Sequence[str] = (),
    title: str = "A made study",
) -> Plan:
    """A plan of rows that share the shipped rules."""
    import json

    numbers = {row: {metric: value} for row, value in (published or {}).items()} if metric else {}
    content = {
        "title": title,
        "paper": "Someone et al., 2024, Table 1",
        "notes": "Numbers that were made up.\nNobody trained them.",
        "settings": {"task": "digits", "threads": 1, "device": "cpu", "budget.epochs": 20},
        "seeds": seeds,
        "columns": [{"label": label, "settings": {"batch_size": 32 * (place + 1)}} for place, label in enumerate(columns)],
        "controls": list(controls),
        "rows": [
            {
                "label": row,
                "settings": {"rule": RULES[place % len(RULES)], "optimizer.lr": round(0.001 * (1 + place), 4)},
                "published": ({label: numbers.get(row, {}) for label in columns} if columns else numbers.get(row, {})),
            }
            for place, row in enumerate(rows)
        ],
    }
    path = folder / "made.yaml"
    path.write_text(json.dumps(content))  # which is YAML as well
    study = dataclasses.replace(read_study(path), targets=dict(targets or {}))
    return plan(study, parse_words([f"output={folder}/runs", *words]))


def lines_of(made: Plan, outcomes: Mapping[str, CellRecord | None] | None = None) -> list[TableRow]:
    """The plan's lines, with outcomes by the cells' hashes; by default all are finished, see :func:`outcome`."""
    return [
        dataclasses.replace(
            row,
            records=[
                outcome(cell, made.study.rows.index(row.written)) if outcomes is None else outcomes.get(cell.key.id) for cell in row.cells
            ],
        )
        for row in made.rows
    ]


def outcome(cell: Cell, number: int, *, epochs: int = 20, loss: bool = False, blocks: int = 0, parallel: int = 1) -> CellRecord:
    """A finished cell; the rows with greater numbers learn less, and more slowly."""
    place = random.Random(f"{cell.key.row} {cell.key.column} {cell.key.seed}")
    best = 0.985 - 0.011 * number + place.gauss(0, 0.004)
    rate, cost = 0.5 / (1 + 0.4 * number), 0.05 * (1 + number % 5) * (1 + place.random() / 10)
    history = []
    for epoch in range(1, epochs + 1):
        accuracy = min(1.0, max(0.0, best - 0.8 * math.exp(-rate * epoch) + place.gauss(0, 0.004)))
        metrics = {"epoch": float(epoch), "samples": 1617.0 * epoch, "seconds": cost * epoch, "steps": 26.0 * epoch}
        metrics |= {"forwards": 1617.0 * epoch * (3 + number % 3), "peak_memory_mb": 1.5 + number % 4, "train/loss": 2.3 * (1 - accuracy)}
        metrics |= {"val/loss": 2.5 * (1 - accuracy) + 0.02} | ({} if loss else {"val/accuracy": accuracy})
        for block in range(1, blocks + 1):
            metrics[f"val/b{block}/accuracy"] = accuracy * (0.7 + 0.3 * block / blocks)
            metrics[f"alignment/b{block}/cosine"] = (1 - math.exp(-0.2 * epoch)) * (0.4 + 0.5 * block / blocks) / (1 + 0.2 * number)
        if blocks:
            metrics["val/mean/accuracy"] = accuracy * 0.98
        history.append(metrics)
    result = {"train/seconds": cost * epochs, "train/samples_per_second": 1617 / cost, "train/samples": 1617.0 * epochs}
    result |= {"train/forwards": 1617.0 * epochs * (3 + number % 3), "train/peak_memory_mb": 1.5 + number % 4, "train/steps": 26.0 * epochs}
    result |= {"parameters": 59146.0 * (1 + number % 3), "parameters_trained": 59146.0 if number % 2 == 0 else 1290.0}
    result |= {"test/loss": 2.5 * (1 - best)} | ({} if loss else {"test/accuracy": min(1.0, best)})
    result |= {f"test/b{block}/accuracy": best * (0.7 + 0.3 * block / blocks) for block in range(1, blocks + 1)}
    result |= {"test/mean/accuracy": best * 0.98} if blocks else {}
    spans = ("all", "1", "0", "1")
    tags = {**TAGS, "network": "mlp", "reverse_span": spans[number % 4], "downstream_weights": "all" if number % 4 == 0 else "0"}
    tags |= {"rule_lines": str(20 + 17 * number), "own_network": str(number % 4 == 3), "data_fingerprint": "same"}
    return cell_record(
        cell.key, "finished", run=f"run-{cell.key.row}-{cell.key.seed}", result=result, history=history, tags=tags, parallel=parallel
    )


def tuned(number: int, *, keys: Sequence[str] = ("optimizer.lr",), trials: int = 8) -> Tuned:
    """Trials with a best learning rate in the middle, and one that diverged."""
    place = random.Random(number)
    made = [Trial({}, "finished", 93.0 - number, 4.0)]
    for trial in range(1, trials):
        settings = {key: 10 ** place.uniform(-4, -0.5) if key == "optimizer.lr" else round(place.uniform(0, 0.9), 3) for key in keys}
        rate = settings.get("optimizer.lr", 0.01)
        if trial == trials - 1:
            made.append(Trial(settings, "diverged", None, 1.0))
        else:
            made.append(Trial(settings, "finished", 96.5 - number - 4 * (math.log10(rate) + 2.2) ** 2 + place.gauss(0, 0.3), 4.0))
    return Tuned(list(keys), made, trials, logarithmic=["optimizer.lr"])
