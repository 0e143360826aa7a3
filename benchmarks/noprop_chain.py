"""Does NoProp's chain earn its steps? Readouts of the finished cells of a study, and paired comparisons of them.

Each cell has trained blocks on one kind of states, and has predicted with every readout (``rule.readout``), and with the control in which
each block gets the state of another example of the same predicted class. The comparisons are one family (Holm), paired by seed:

- the chain of analytic states less that of states drawn from q(z|y), which have to be learned: the same within 0.3 points?
- the chain less the mean of its own estimates along the path, of q(z|y);
- the best chain or path, less the best ensemble of blind blocks, and less the better large block, which has as many
  operations. Which is best is chosen on validation, as a mean over seeds.

    bpfree study run noprop/chain-cifar10-short threads=1 device=cpu
    python benchmarks/noprop_chain.py noprop/chain-cifar10-short --save
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import measure

from bpfree.cli.output import print_table
from bpfree.config import parse_words
from bpfree.study.cells import plan
from bpfree.study.differences import Difference, Paired, judge
from bpfree.study.file import find_study
from bpfree.study.rows import TableRow
from bpfree.study.worklist import Worklist

READOUTS = ("chain", "path", "mean", "product", "chain_swapped", "path_swapped")
PAPER, ANALYTIC, BLIND, LARGE = "q(z|y)", "analytic", "blind", "one large block"


class Way(NamedTuple):
    """A row of the study with a readout."""

    row: str
    readout: str

    def __str__(self) -> str:
        return f"{self.row}, {self.readout}"


Scores = Mapping[Way, Mapping[int, float]]
"""Accuracy in per cent by seed."""


def scores_of(rows: Sequence[TableRow], split: str) -> dict[Way, dict[int, float]]:
    """Collect the accuracy of every readout of the finished cells: ``test`` from results, ``val`` from the last epoch."""
    found: dict[Way, dict[int, float]] = {}
    for row in rows:
        predicts = str(row.recipe.flat()["rule.readout"])
        for record in row.finished:
            known = record.result if split == "test" else record.history[-1]
            for readout in READOUTS:
                key = f"{split}/accuracy" if readout == predicts else f"{split}/{readout}/accuracy"
                if key in known:
                    found.setdefault(Way(row.written.label, readout), {})[record.key.seed] = 100 * known[key]
    return found


def chosen(validation: Scores, *rows: str, leave: Sequence[str] = (), readouts: Sequence[str]) -> Way | None:
    """Return the way that is best on validation, as a mean over seeds, of those whose rows begin so; ``None``: there are none."""
    ways = [way for way in validation if way.row.startswith(tuple(rows)) and not way.row.startswith(tuple(leave))]
    return max((way for way in ways if way.readout in readouts), key=lambda way: statistics.fmean(validation[way].values()), default=None)


def pairs(validation: Scores) -> Iterator[tuple[Way, Way]]:
    """Yield the ways that are compared."""
    yield Way(ANALYTIC, "chain"), Way(PAPER, "chain")
    yield Way(PAPER, "chain"), Way(PAPER, "path")
    variant = chosen(validation, "", leave=(LARGE, BLIND), readouts=("chain", "path"))
    for other in (chosen(validation, BLIND, readouts=("mean", "product")), chosen(validation, LARGE, readouts=("chain",))):
        if variant and other:
            yield variant, other


def compared(columns: Mapping[str, tuple[Scores, Scores]]) -> dict[str, Difference]:
    """Judge the comparisons of all columns as one family; each has test and validation scores."""
    family: dict[object, tuple[object, Paired]] = {}
    for column, (scores, validation) in columns.items():
        for ours, theirs in pairs(validation):
            seeds = sorted(scores.get(ours, {}).keys() & scores.get(theirs, {}).keys())
            if seeds:
                gains = [scores[ours][seed] - scores[theirs][seed] for seed in seeds]
                family[f"{column}: {ours} - {theirs}".removeprefix(": ")] = (column, Paired(gains))
    return {str(name): difference for name, difference in judge(family).items()}


def told(name: str, found: Difference) -> list[str]:
    """Format a comparison as a line of the table."""
    interval = found.interval
    ends = "" if interval is None else f"{interval.low:+.2f} to {interval.high:+.2f}"
    return [name, f"{found.gain:+.2f}", ends, f"{len(found.gains)}", f"{found.adjusted:.3f}"]


def recorded(found: Difference) -> dict[str, Any]:
    """Return what a result file keeps of a comparison."""
    interval = found.interval
    ends = None if interval is None else [interval.low, interval.high]
    return {"gains": list(found.gains), "gain": found.gain, "interval_95": ends, "p": found.p, "p_holm": found.adjusted}


def table(scores: Scores) -> tuple[list[str], list[list[str]]]:
    """Return headers and lines: the mean over seeds of each row and readout."""
    lines = []
    for label in dict.fromkeys(way.row for way in scores):
        means = {way.readout: statistics.fmean(found.values()) for way, found in scores.items() if way.row == label}
        lines.append([label, *(f"{means[name]:.2f}" if name in means else "" for name in READOUTS)])
    return ["test accuracy, %", *READOUTS], lines


def by_row(scores: Scores) -> dict[str, dict[str, list[float]]]:
    """Return the accuracies by row and readout, as a result file has them."""
    found: dict[str, dict[str, list[float]]] = {}
    for way, values in scores.items():
        found.setdefault(way.row, {})[way.readout] = [round(value, 3) for _, value in sorted(values.items())]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = measure.Benchmark("noprop_chain", __doc__)
    benchmark.parser.add_argument("study", help="name or file of the study, whose cells have been run")
    benchmark.parser.add_argument("--seeds", type=int, help="number of seeds (default: the study's)")
    benchmark.parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings with which the study was run")
    options = benchmark.start(arguments)
    words = [f"device={options.device}", f"threads={options.threads}", *options.set]
    rows = Worklist(plan(find_study(options.study), parse_words(words), seeds=options.seeds), older=True).table()
    columns = {}
    for column in dict.fromkeys(row.column for row in rows):
        part = [row for row in rows if row.column == column]
        columns[column] = scores_of(part, "test"), scores_of(part, "val")
        headers, lines = table(columns[column][0])
        print_table(headers, lines, right=range(1, len(headers)))
    differences = compared(columns)
    print_table(
        ["difference, points", "gain", "95 %", "seeds", "p (Holm)"], [told(*each) for each in differences.items()], right=range(1, 5)
    )
    benchmark.finish(
        {
            "cells": f"bpfree study run {options.study} threads={options.threads} device={options.device}",
            "unit": "accuracy in per cent, by seed",
            "columns": {name: {"test": by_row(test), "validation": by_row(held)} for name, (test, held) in columns.items()},
            "comparisons": {name: recorded(each) for name, each in differences.items()},
        },
        suffix="_" + options.study.rpartition("/")[2].removeprefix("chain-").replace("-", "_"),
    )


if __name__ == "__main__":
    main()
