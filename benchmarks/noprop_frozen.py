"""NoProp on the features of a stem that SoftHebb has trained: CIFAR-10 without back-propagation across blocks anywhere. Aim: 82 %.

The stem is that of a run of SoftHebb on the same split, which may have been interrupted once its pass without labels was over:

    bpfree train rule=softhebb task=cifar10 task.validation=0.1 budget.epochs=51
    python benchmarks/noprop_frozen.py --stem RUN --work FOLDER

Features of all images are computed once and kept in FOLDER in half precision: the stem's maps of 1536 x 4 x 4, and their means over a
grid of 2 x 2 places. All is computed in bf16, which takes half the time where the processor has units for it. On the features learn

* ``chain``: T blocks of ``noprop-dt``, each on its noised label, as ``network.stem=run:RUN network.shared=true network.places=2
  network.dropout=P`` makes them; and ``blind``: the same blocks without a noised label;
* ``head``: one perceptron of as many parameters and two hidden layers, by back-propagation;
* ``linear``: a linear readout; and ``published``: SoftHebb's own, on all places.

Rows have the same budget, batches, schedule and trials: rate and dropout that are best on the validation split with one seed are trained
with three seeds, and tested once. Each result is kept in FOLDER, so that a command that was stopped goes on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import measure
import torch
from bpfree_noprop import NoPropDT, NoPropDTConfig, noprop_network
from torch import Tensor, nn

import bpfree
from bpfree import Network, OptimizerConfig, Rule, Split, Task, TaskSpec, TrainConfig
from bpfree.cli.output import print_table
from bpfree.options import ScheduleConfig
from bpfree.training.config import BudgetConfig, EvaluationConfig
from bpfree.training.environment import autocast
from bpfree.training.trainer import Trainer

AIM = 0.82
PLACES = 2
AT_ONCE = 250


@dataclass(frozen=True)
class Sizes:
    """Sizes of the heads and the length of their training."""

    T: int = 3
    width: int = 128
    epochs: int = 6
    readout_epochs: int = 50
    batch: int = 256
    seeds: int = 3


ROWS = ("chain", "blind", "head", "linear", "published")
TRIALS = ((2e-3, 0.0), (2e-3, 0.2))  # rate, dropout of the features
HALVINGS = ScheduleConfig("milestones", milestones=[0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9], gamma=0.5)  # the readout's of Journe et al.


# --- features -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def maps(body: nn.Module, spec: TaskSpec, images: Tensor) -> Tensor:
    """Return the stem's maps (N, C, H, W) of raw images."""
    x = spec.normalise(images).contiguous(memory_format=torch.channels_last)
    with autocast(x.device, "bf16"):
        made: Tensor = body(x)
    return made.float()


def kept(path: Path, shape: Sequence[int]) -> Tensor:
    """Map a file of half-precision numbers into memory; a new one is made of zeros."""
    return torch.from_file(str(path), shared=True, size=torch.Size(shape).numel(), dtype=torch.float16).view(*shape)


def features(body: nn.Module, task: Task, folder: Path) -> dict[str, Task]:
    """Return the tasks of all places of the stem's maps (``published``) and of their means over a grid (``pooled``)."""
    splits = {"train": task.train, "validation": task.validation, "test": task.test}
    example = maps(body, task.spec, task.train.batch(torch.arange(1))[0])[0]
    whole, pooled = {}, {}
    for name, split in splits.items():
        assert isinstance(split, Split)
        large = kept(folder / f"{name}-maps", (len(split), example.numel()))
        small = kept(folder / f"{name}-pooled", (len(split), len(example) * PLACES**2))
        done = folder / f"{name}-done"
        for place in range(int(done.read_text()) if done.is_file() else 0, len(split), AT_ONCE):
            part = slice(place, place + AT_ONCE)
            found = maps(body, task.spec, split.inputs[part])
            large[part], small[part] = found.flatten(1), nn.functional.adaptive_avg_pool2d(found, PLACES).flatten(1)
            done.write_text(str(part.stop))
        whole[name], pooled[name] = Split(large, split.targets), Split(small, split.targets)
    return {
        name: Task(TaskSpec("features", tuple(made["train"].inputs.shape[1:]), 10, scale=1.0), **made)
        for name, made in (("published", whole), ("pooled", pooled))
    }


# --- heads ----------------------------------------------------------------------------------------------------------------


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def chain(spec: TaskSpec, dropout: float, sizes: Sizes, *, state: Any = "noised") -> Rule:
    """Make T blocks that see the features, which are flat already."""
    network = noprop_network(spec, nn.Flatten, blocks=sizes.T, width=sizes.width, dropout=dropout)
    return NoPropDT(network, spec, NoPropDTConfig(T=sizes.T, state=state))


def blind(spec: TaskSpec, dropout: float, sizes: Sizes) -> Rule:
    return chain(spec, dropout, sizes, state="noise")


def head(spec: TaskSpec, dropout: float, sizes: Sizes) -> Rule:
    """Make a perceptron with the parameters of :func:`chain`, to be trained by back-propagation."""
    wanted, second = count(chain(spec, dropout, sizes)), 2 * sizes.width
    first = round((wanted - second * (spec.outputs + 3) - spec.outputs) / (spec.input_size + 3 + second))
    layers = [(spec.input_size, first), (first, second)]
    parts: list[nn.Module] = [nn.Dropout(dropout)]
    for inputs, outputs in layers:
        parts += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
    return backprop({"body": nn.Sequential(*parts), "readout": nn.Linear(second, spec.outputs)}, spec)


def linear(spec: TaskSpec, dropout: float, sizes: Sizes) -> Rule:
    return backprop({"body": nn.Dropout(dropout), "readout": nn.Linear(spec.input_size, spec.outputs)}, spec)


def backprop(blocks: dict[str, nn.Module], spec: TaskSpec) -> Rule:
    network = Network(blocks, input_shape=spec.input_shape, readout="readout")
    made: Rule = bpfree.installed_plugins().get("rules", "backprop")(network, spec)
    return made


MAKERS = {"chain": chain, "blind": blind, "head": head, "linear": linear, "published": linear}


def fitted(row: str, task: Task, rate: float, dropout: float, seed: int, sizes: Sizes, *, test: bool) -> dict[str, Any]:
    """Train a row with these settings and return its accuracies, size and seconds."""
    torch.manual_seed(seed)
    rule = MAKERS[row](task.spec, dropout, sizes)
    readout = row in ("linear", "published")
    epochs = sizes.readout_epochs if row == "published" else sizes.epochs
    config = TrainConfig(
        seed=seed,
        device="cpu",
        threads=1,
        precision="bf16",
        batch_size=64 if row == "published" else sizes.batch,
        budget=BudgetConfig(epochs=epochs),
        optimizer=OptimizerConfig("adam" if readout else "adamw", lr=rate, weight_decay=0.0 if readout else 0.01),
        schedule=HALVINGS if row == "published" else ScheduleConfig("cosine"),
        evaluation=EvaluationConfig(every=epochs, test=test),
    )
    run = Trainer(rule, task, config).fit()
    found = run.history[-1] | run.result
    scores = {key: value for key, value in found.items() if key.startswith(("val/", "test/")) and key.endswith("accuracy")}
    return {"rate": rate, "dropout": dropout, "seed": seed, "parameters": count(rule), "seconds": found["train/seconds"], **scores}


def remembered(path: Path, **arguments: Any) -> dict[str, Any]:
    """Return the result of :func:`fitted`, from its file if it was made before."""
    if not path.is_file():
        path.write_text(json.dumps(fitted(**arguments), indent=1))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def measured(row: str, task: Task, folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Try the row's settings with one seed on validation, then train the best with all seeds, and test these."""
    stem, common = f"{row}-{sizes.width}", {"row": row, "task": task, "sizes": sizes}
    trials = [{"rate": rate, "dropout": dropout} for rate, dropout in ([(1e-3, 0.5)] if row == "published" else TRIALS)]
    tried = [
        remembered(folder / f"{stem}-{trial['rate']:g}-{trial['dropout']:g}.json", **common, **trial, seed=0, test=False)
        for trial in trials
    ]
    best = max(range(len(tried)), key=lambda place: tried[place]["val/accuracy"])
    seeds = range(1 if row == "published" else sizes.seeds)
    tested = [remembered(folder / f"{stem}-tested-{seed}.json", **common, **trials[best], seed=seed, test=True) for seed in seeds]
    return {"tried": tried, "tested": tested}


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = measure.Benchmark("noprop_frozen", __doc__)
    benchmark.parser.add_argument("--stem", required=True, help="folder of a run of softhebb on CIFAR-10")
    benchmark.parser.add_argument("--work", type=Path, required=True, help="folder for features (3.7 GB) and results")
    benchmark.parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS), help="measure only these")
    benchmark.parser.add_argument("--all-places", action="store_true", help="of the stem's maps, four times the features, for every row")
    benchmark.parser.add_argument("--width", type=int, default=Sizes().width, help="units of the blocks' layers (default %(default)s)")
    options = benchmark.start(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    saved = bpfree.load(options.stem)
    body = saved.network.without_readout().eval().to(memory_format=torch.channels_last)
    task = bpfree.load_task("cifar10", validation=0.1, **({"subset": 400} if options.quick else {}))
    sizes = replace(Sizes(), T=2, width=8, epochs=1, readout_epochs=1, batch=64, seeds=1) if options.quick else Sizes(width=options.width)
    tasks = features(body, task, options.work)
    usual, folder = tasks["published" if options.all_places else "pooled"], options.work / ("all" if options.all_places else "pooled")
    folder.mkdir(exist_ok=True)
    results = {row: measured(row, tasks.get(row, usual), folder, sizes) for row in options.rows}
    table = [[row, *summary(found)] for row, found in results.items()]
    print_table(["on the stem's features", "parameters", "rate", "dropout", "validation", "test", "aim"], table, right=range(1, 7))
    benchmark.finish({"stem": str(type(saved.rule).__name__), "sizes": vars(sizes), "rows": results})


def summary(found: dict[str, Any]) -> list[str]:
    first, scores = found["tested"][0], torch.tensor([[each[f"{split}/accuracy"] for split in ("val", "test")] for each in found["tested"]])
    means = [f"{100 * float(mean):.2f}" for mean in scores.mean(0)]
    return [f"{first['parameters']:,}", f"{first['rate']:g}", f"{first['dropout']:g}", *means, f"{100 * AIM:.0f}"]


if __name__ == "__main__":
    main()
