"""The floors of a study's rows, without training any of them: for tables that are too expensive to train again.

For each task and network of the study, the best converged linear readout of the inputs, of a block of the untrained network, or of
all together, chosen by mean validation over the study's seeds (``bpfree.training.floor``). With ``--beside FILE`` (a result of this
folder) each row's own accuracy, measured earlier, and its distance from the floor are shown, too.

    python benchmarks/floors.py claims --beside claims-cpu.json
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure

from bpfree.cli.output import print_table
from bpfree.config import parse_words
from bpfree.study.cells import plan
from bpfree.study.file import find_study
from bpfree.study.floors import Known, floor_key, measure_floor_of
from bpfree.study.worker import TaskCache

RESULTS = Path(__file__).parent / "results"


def known(path: Path, study: str) -> dict[str, float]:
    """Return the mean accuracy in per cent of a committed result, by row (``ROW`` or ``ROW / COLUMN``)."""
    content = json.loads(path.read_text())
    if "studies" not in content:
        return {label: row["test_accuracy"]["mean"] for label, row in content["rows"].items()}
    cells: dict[str, list[dict[str, Any]]] = content["studies"][study]["cells"]
    return {label: statistics.fmean(map(accuracy, row)) for label, row in cells.items()}


def accuracy(cell: dict[str, Any]) -> float:
    """Return the accuracy of a cell in per cent."""
    return float(cell["test_accuracy"] if "test_accuracy" in cell else 100 - cell["test_error"])


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = measure.Benchmark("floors", __doc__)
    benchmark.parser.add_argument("study", help="name or file of the study")
    benchmark.parser.add_argument("--rows", nargs="+", help="labels of the rows (default: all)")
    benchmark.parser.add_argument("--seeds", type=int, help="number of seeds (default: the study's)")
    benchmark.parser.add_argument("--beside", help="a result in benchmarks/results with the rows' accuracies")
    benchmark.parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of all rows")
    options = benchmark.start(arguments)
    words = ["tracking.enabled=false", f"threads={options.threads}", *options.set]
    made = plan(find_study(options.study), parse_words(words), seeds=1 if options.quick else options.seeds)
    accuracies = known(RESULTS / options.beside, options.study) if options.beside else {}
    tasks, found, known_before, rows = TaskCache(), dict[str, Any](), Known(), []
    for place, cell in {(cell.key.row, cell.key.column): cell for cell in reversed(made.cells)}.items():
        if options.rows and cell.key.row not in options.rows:
            continue
        key = floor_key(cell)
        if key not in found:
            print(f"{cell.key.row}: {cell.recipe.names['network']} on {cell.recipe.names['task']}", file=sys.stderr, flush=True)
            found[key] = measure_floor_of(cell.recipe, made.seeds, tasks, known_before)
        floor, own = found[key], accuracies.get(cell.key.row, accuracies.get(f"{cell.key.row} / {cell.key.column}"))
        mean = 100 * statistics.fmean(floor.test)
        row = {"row": place[0], "column": place[1], "network": floor.network, "of": floor.source, "penalty": floor.penalty}
        row |= {"floor": list(floor.test), "validation": list(floor.validation), "inputs": list(floor.inputs), "skipped": floor.skipped}
        rows.append({**row, "readings": floor.readings, "own": own, "own_less_floor": None if own is None else own - mean})
    shown = [
        [row["row"], row["of"], f"{100 * statistics.fmean(row['floor']):.2f}", *(("", "") if row["own"] is None else numbers(row))]
        for row in reversed(rows)
    ]
    print_table(["row", "floor of", "floor %", "own %", "own less floor"], shown)
    benchmark.finish({"study": options.study, "seeds": list(made.seeds), "rows": rows[::-1]}, suffix=f"_{options.study.replace('/', '-')}")


def numbers(row: dict[str, Any]) -> tuple[str, str]:
    """Format a row's own accuracy, and its distance from the floor."""
    return f"{row['own']:.2f}", f"{row['own_less_floor']:+.2f}"


if __name__ == "__main__":
    main()
