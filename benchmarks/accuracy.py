"""How well NoProp-DT learns, beside its ceiling, its floor and its own parts. Each row is a `bpfree train` command.

``digits``: noprop-dt on noised labels, predicting along its mean path, its variant with T=1, its own-prediction twin, back-propagation,
the frozen random features, the linear classifier and direct feedback alignment; 30 epochs, 5 seeds, one thread.
``mnist``: the same without T=1; 2 epochs, 3 seeds. ``cifar10``: noprop-dt alone, 2 epochs, one seed; ``--paper``: with the paper's
own block and batch size.

Each row has its own prediction, its features as a converged linear probe reads them (penalty chosen on validation), and the floor of its
network: the best such readout of the inputs, of a block of the untrained network, or of all together (``bpfree.training.floor``).

From the same runs of noprop-dt come its best single block (chosen on each run's validation split), the mean of its blocks,
and the other kind of inference.

Targets: digits at least 97.5 % and within 1 point of back-propagation; MNIST at least 98.5 % in two epochs and 3 minutes.

With ``--output FOLDER`` the runs are kept, and a second call resumes where the first was interrupted.
"""

from __future__ import annotations

import dataclasses
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure

from bpfree import Task, runner
from bpfree.config import parse_words, resolve
from bpfree.document.tables import markdown_table
from bpfree.recipe import Recipe
from bpfree.run import Run
from bpfree.training.floor import measure_floor
from bpfree.training.trainer import Interrupted

Row = dict[str, Any]
DEFAULTS = {"digits": (30, 5), "mnist": (2, 3), "cifar10": (2, 1)}
"""Epochs and seeds of each part."""
PAPER_BATCH = 128


@dataclass(frozen=True)
class Variant:
    """A line of the table: its label, its settings, and whether its parts are lines of their own."""

    label: str
    words: tuple[str, ...]
    parts: bool = False


PAPERS = ("rule=noprop-dt", "rule.state=noised")
CHAIN = Variant("noprop-dt", PAPERS, parts=True)
TWIN = Variant("noprop-dt, own-prediction twin", (*PAPERS, "twin=true"))
REFERENCES = (Variant("frozen", ("rule=frozen",)), Variant("linear", ("rule=linear",)))
BACKPROP, DFA = Variant("backprop", ("rule=backprop",)), Variant("dfa", ("rule=dfa",))
VARIANTS = {
    "digits": (CHAIN, Variant("noprop-dt, T=1", (*PAPERS, "rule.T=1")), TWIN, BACKPROP, DFA, *REFERENCES),
    "mnist": (CHAIN, TWIN, BACKPROP, DFA, *REFERENCES),
    "cifar10": (CHAIN,),
}


def best_block(run: Run) -> str:
    """Name the block whose own accuracy on validation was best after the last epoch."""
    last = next(metrics for metrics in reversed(run.history) if "val/t1/accuracy" in metrics)
    blocks = {name.split("/")[1]: value for name, value in last.items() if name.startswith("val/t") and name.endswith("/accuracy")}
    return max(blocks, key=blocks.__getitem__)


def parts_of(run: Run) -> dict[str, Callable[[Run], str]]:
    """Return the further accuracies of a noprop-dt run, by label: a function that gives the result's key."""
    other = next(name for name in ("deterministic", "sampled") if f"test/{name}/accuracy" in run.result)
    return {
        "its best block": lambda run: f"test/{best_block(run)}/accuracy",
        "mean of its blocks": lambda run: "test/mean/accuracy",
        f"{other} inference": lambda run: f"test/{other}/accuracy",
    }


def train(words: Sequence[str], folder: Path, task: Task | None) -> Run:
    """Start a run in the folder, or resume the existing one; for a finished run only the test is repeated."""
    begun = sorted(folder.glob("*/checkpoints/last.pt"))
    if begun:
        return runner.resume(str(begun[-1]), output=str(folder), quiet=True)
    return runner.run(resolve(parse_words([*words, "tracking.enabled=false", f"output={folder}"])), quiet=True, task=task)


FLOORS: dict[str, Row] = {}
"""Of networks, by all that a floor depends on."""


def floor_of(words: Sequence[str], seeds: int, task: Task | None) -> Row:
    """Return the floor of a row's network over the same seeds; measured once for rows that share network and initialisation."""
    recipe = resolve(parse_words(words))
    own = recipe.names["rule"] if recipe.names["rule"] not in ("backprop", "dfa", "frozen") else ""
    key = repr((recipe.names["network"], own, recipe.options["network"], recipe.options["rule"] if own else None, recipe.task, seeds))
    if key not in FLOORS:
        FLOORS[key] = measured_floor(recipe, seeds, task or recipe.build_task())
    return FLOORS[key]


def measured_floor(recipe: Recipe, seeds: int, task: Task) -> Row:
    """Measure the floor over the first n seeds."""
    recipes = (dataclasses.replace(recipe, settings=dataclasses.replace(recipe.settings, seed=seed)) for seed in range(seeds))
    found = measure_floor(task, [each.build_rule(task.spec) for each in recipes])
    return {"of": found.name, "penalty": found.best.penalty, "accuracies": list(found.test), "mean": statistics.fmean(found.test)}


def row(label: str, runs: Sequence[Run], words: Sequence[str], key: Callable[[Run], str] = lambda run: "test/accuracy") -> Row:
    """Make one line of the table from the runs of all seeds."""
    scores = [run.result[key(run)] for run in runs]
    probed = [run.result["test/linear_probe/accuracy"] for run in runs if "test/linear_probe/accuracy" in run.result]
    return {
        "probed": probed,
        "label": label,
        "accuracies": scores,
        "mean": statistics.fmean(scores),
        "deviation": statistics.stdev(scores) if len(scores) > 1 else None,
        "seconds": statistics.median(run.result["train/seconds"] for run in runs),
        "processor_seconds": statistics.median(run.result["train/processor_seconds"] for run in runs),
        "parameters": runs[0].result["parameters"],
        "parameters_trained": runs[0].result["parameters_trained"],
        "command": shlex.join(["bpfree", "train", *words]),
    }


def rows_of(variant: Variant, common: Sequence[str], seeds: int, folder: Path, task: Task | None) -> list[Row]:
    """Train a variant with every seed; returns its row, and those of its parts."""
    words = [*variant.words, *common]
    runs = []
    for seed in range(seeds):
        place = folder / variant.label.replace(", ", "-").replace(" ", "-") / f"s{seed}"
        runs.append(train([*words, f"seed={seed}"], place, task))
        print(f"{variant.label}, seed {seed}: {runs[-1].status}, {runs[-1].result.get('test/accuracy', float('nan')):.2%}", file=sys.stderr)
    rows = [row(variant.label, runs, words) | {"floor": floor_of(words, seeds, task)}]
    if variant.parts:
        rows += [row(f"- {name}", runs, words, key) for name, key in parts_of(runs[0]).items()]
        rows[1]["blocks"] = [best_block(run) for run in runs]
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """Format the table as in the README."""
    headers = ["method", "own prediction", "probed", "floor", "own less floor", "parameters trained", "processor seconds"]
    lines: list[list[str]] = []
    floor: Row = {}
    for line in rows:
        part = line["label"].startswith("- ")
        floor = floor if part else line["floor"]
        probed = "" if part or not line["probed"] else f"{100 * statistics.fmean(line['probed']):.2f}"
        gain = f"{100 * (line['mean'] - floor['mean']):+.2f}"
        costs = ["the same runs", ""] if part else [f"{line['parameters_trained']:,.0f}", f"{line['processor_seconds']:.1f}"]
        own = f"{100 * line['mean']:.2f}" + ("" if line["deviation"] is None else f" ± {100 * line['deviation']:.2f}")
        name = line["label"].replace("- ", "– ")
        lines.append([name, own, probed, f"{100 * floor['mean']:.2f}", gain, *costs])
    return markdown_table(headers, lines, range(1, len(headers))).replace("|  |", "| |")


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = measure.Benchmark("accuracy", __doc__)
    benchmark.parser.add_argument("part", choices=list(DEFAULTS), help="task to train on")
    benchmark.parser.add_argument("--paper", action="store_true", help="the paper's own block and batch size (mnist, cifar10)")
    benchmark.parser.add_argument("--epochs", type=int, help="epochs of each run")
    benchmark.parser.add_argument("--seeds", type=int, help="runs of each row")
    benchmark.parser.add_argument("--output", type=Path, help="folder in which runs are kept, and resumed")
    options = benchmark.start(arguments)
    epochs, seeds = (1, 1) if options.quick else (options.epochs or DEFAULTS[options.part][0], options.seeds or DEFAULTS[options.part][1])
    common = [
        "evaluation.protocols=[linear-probe]",
        f"task={options.part}",
        f"budget.epochs={epochs}",
        f"device={options.device}",
        f"threads={options.threads}",
    ]
    if options.paper:
        common += ["network=noprop-paper", f"batch_size={PAPER_BATCH}"]
    task = smoke_task(options.part) if options.quick and options.part != "digits" else None
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.output or Path(temporary)
        try:
            variants = (CHAIN,) if options.paper else VARIANTS[options.part]
            rows = [line for variant in variants for line in rows_of(variant, common, seeds, folder, task)]
        except Interrupted as error:
            print(error, file=sys.stderr)
            sys.exit(error.exit_code)
    print(markdown(rows))
    for command in dict.fromkeys(line["command"] for line in rows):
        print(f"    {command}")
    suffix = f"_{options.part}{'_paper' if options.paper else ''}"
    benchmark.finish({"rows": rows, "epochs": epochs, "seeds": list(range(seeds)), "markdown": markdown(rows)}, suffix=suffix)


def smoke_task(name: str) -> Task:
    """Make a few random examples in a task's shapes."""
    spec = resolve(parse_words([f"task={name}", "rule=linear"])).registry.get("tasks", name).spec(None, None)
    return measure.synthetic_task(spec, train=64, held=32)


if __name__ == "__main__":
    main()
