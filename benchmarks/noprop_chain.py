"""Does NoProp's chain earn its steps? Readouts of the finished cells of a study, and paired comparisons of them.

Each cell has trained blocks on one kind of states, and has predicted with every readout (``rule.readout``), and with the control in which
each block gets the state of another example of the same predicted class. The comparisons are one family (Holm), paired by seed:

- the chain of analytic states less that of states drawn from q(z|y), which have to be learned: the same within 0.3 points?
- the chain less the mean of its own estimates along the path, of q(z|y);
- the best of all that a chain computes, less the best ensemble of blind blocks, and less the better one of the large blocks, which have as
  many operations. Which is best is chosen on validation, as a mean over seeds.

    bpfree study run noprop/chain-cifar10-short threads=1 device=cpu
    python benchmarks/noprop_chain.py noprop/chain-cifar10-short --save
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
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


def best(scores: Scores, ways: Sequence[Way]) -> Way:
    """Return the way with the best mean over seeds."""
    return max(ways, key=lambda way: statistics.fmean(scores[way].values()))


def chosen(validation: Scores) -> tuple[Way, Way, Way]:
    """Choose on validation the best way in which states are used, the best ensemble of blind blocks, and the better large block."""
    large = [way for way in validation if way.row.startswith(LARGE) and way.readout == "chain"]
    blind = [way for way in validation if way.row.startswith(BLIND) and way.readout in ("mean", "product")]
    others = [way for way in validation if not way.row.startswith((LARGE, BLIND)) and way.readout in ("chain", "path", "mean", "product")]
    return best(validation, others), best(validation, blind), best(validation, large)


def compared(scores: Scores, validation: Scores) -> dict[str, Difference]:
    """Judge the comparisons as one family."""
    variant, ensemble, large = chosen(validation)
    pairs = [
        (Way(ANALYTIC, "chain"), Way(PAPER, "chain")),
        (Way(PAPER, "chain"), Way(PAPER, "path")),
        (variant, ensemble),
        (variant, large),
    ]
    family: dict[object, tuple[object, Paired]] = {}
    for ours, theirs in pairs:
        seeds = sorted(scores[ours].keys() & scores[theirs].keys())
        family[f"{ours} - {theirs}"] = ("", Paired([scores[ours][seed] - scores[theirs][seed] for seed in seeds]))
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


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = measure.Benchmark("noprop_chain", __doc__)
    benchmark.parser.add_argument("study", help="name or file of the study, whose cells have been run")
    benchmark.parser.add_argument("--seeds", type=int, help="number of seeds (default: the study's)")
    benchmark.parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings with which the study was run")
    options = benchmark.start(arguments)
    words = [f"device={options.device}", f"threads={options.threads}", *options.set]
    rows = Worklist(plan(find_study(options.study), parse_words(words), seeds=options.seeds), older=True).table()
    scores, validation = scores_of(rows, "test"), scores_of(rows, "val")
    labels = list(dict.fromkeys(way.row for way in scores))
    table = [
        [label, *(f"{statistics.fmean(scores[way].values()):.2f}" if (way := Way(label, name)) in scores else "" for name in READOUTS)]
        for label in labels
    ]
    print_table(["test accuracy, %", *READOUTS], table, right=range(1, len(READOUTS) + 1))
    differences = compared(scores, validation)
    print_table(
        ["difference, points", "gain", "95 %", "seeds", "p (Holm)"], [told(*each) for each in differences.items()], right=range(1, 5)
    )
    benchmark.finish(
        {
            "unit": "accuracy in per cent, by seed",
            "test": {label: {way.readout: list(scores[way].values()) for way in scores if way.row == label} for label in labels},
            "validation": {label: {way.readout: list(validation[way].values()) for way in scores if way.row == label} for label in labels},
            "comparisons": {name: recorded(each) for name, each in differences.items()},
        },
        suffix="" if options.study.endswith("chain-cifar10") else "_" + options.study.rpartition("-")[2],
    )


if __name__ == "__main__":
    main()
