"""NoProp-DT on real targets beside ridge regression and back-propagation: R2, coverage of 90 % intervals, CRPS.

``diabetes`` (442 patients): five-fold cross-validation, repeated with other folds and seeds. Each patient is predicted by models that have
neither learned from them nor been calibrated on them. Each method chooses one number by five inner folds of what it learns from (the
length of training, or the penalty), and measures its residuals on the same folds (``calibration.folds=5``).

``digits-angle`` (1,797 pictures, four rotations of each to learn from, one to be tested on): five folds of pictures, each with a seed of
its own. A tenth of the pictures that are learned from is held out, on which penalty and residuals are measured; rotations of one picture
are in one split.

Ridge regression and back-propagation predict normal distributions of one residual variance, NoProp-DT what its sampled chains draw.

    python benchmarks/noprop_regression.py --save
    python benchmarks/noprop_regression.py --cells FOLDER --only diabetes/0      # one repeat, kept, for a later run
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import measure
import torch
from bpfree_noprop import NoPropDT
from bpfree_noprop.blocks import NETWORKS
from bpfree_noprop.dt import NoPropDTConfig
from torch import Tensor

import bpfree
from bpfree import BudgetConfig, DataSource, OptimizerConfig, Split, Task, TrainConfig
from bpfree.baselines import Backprop
from bpfree.cli.output import print_table
from bpfree.tasks import angles
from bpfree.tasks.digits import DIGITS
from bpfree.tasks.intervals import central, crps, gaussian_crps
from bpfree.tasks.linear import Ridge, choose_penalty
from bpfree.tasks.task import folds, split_validation
from bpfree.training.config import CalibrationConfig, EvaluationConfig
from bpfree.training.trainer import Trainer

LEVEL, Z, DRAWS, INNER, OUTER = 0.9, 1.6448536269514722, 399, 5, 5


class Setting(NamedTuple):
    """What is tried of a part.

    Attributes:
        T, width, depth: of NoProp's blocks.
        rate, decay, batch: of its optimiser; of back-propagation the batch alone, which has the rule's own rate.
        epochs: of NoProp, from which the inner folds choose.
        ceiling: likewise of back-propagation.
    """

    T: int
    width: int
    depth: int
    rate: float
    decay: float
    batch: int
    epochs: tuple[int, ...]
    ceiling: tuple[int, ...]


SETTINGS = {
    "diabetes": Setting(5, 32, 1, 3e-3, 0.1, 32, (10, 15), (3, 5, 8)),
    "digits-angle": Setting(10, 64, 3, 1e-3, 1e-3, 64, (15,), (15,)),
}
REPEATS = {"diabetes": 5, "digits-angle": 1}


# --- tasks ------------------------------------------------------------------------------------------------------------


def tasks(part: str, repeat: int, quick: bool) -> Iterator[tuple[Task, Tensor]]:
    """Yield the task of each outer fold, and which examples (or pictures) its test split has."""
    whole = bpfree.load_task("diabetes" if part == "diabetes" else "digits", validation=0)
    joined = Split(torch.cat([whole.train.inputs, whole.test.inputs]), torch.cat([whole.train.targets, whole.test.targets]))
    joined = joined.subset(torch.arange(120)) if quick else joined
    for number, held in enumerate(folds(joined, OUTER, repeat)):
        kept = torch.ones(len(joined), dtype=torch.bool)
        kept[held] = False
        train, test = joined.subset(kept.nonzero().flatten()), joined.subset(held)
        if part == "diabetes":
            yield Task(bpfree.TaskSpec("diabetes", (10,), 1, "real", *moments(train.inputs), scale=1.0), train, None, test), held
        else:
            upright = DataSource(DIGITS.spec, lambda config, root, parts=(train, test): parts, DIGITS.Config)
            config = angles.DigitsAngleConfig(angle_seed=number)
            turned, tested = angles.load(upright, config, None)
            learned, validation = split_validation(turned, 0.1, number)
            yield Task(angles.spec(upright, "digits-angle", config, None), learned, validation, tested), held


def moments(inputs: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(inputs.mean(0).tolist()), tuple(inputs.std(0).tolist())


def inner(task: Task, seed: int) -> list[tuple[Split, Split]]:
    """Return what is learned from and what is held out: the validation split, or folds of the training split."""
    if task.validation is not None:
        return [(task.train, task.validation)]
    parts = folds(task.train, INNER, seed)
    kept = [torch.ones(len(task.train), dtype=torch.bool).index_fill(0, part, False).nonzero().flatten() for part in parts]
    return [(task.train.subset(rest), task.train.subset(part)) for rest, part in zip(kept, parts, strict=True)]


# --- methods ----------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """What a method says of each test example: (N,) each, in the target's units."""

    mean: Tensor
    crps: Tensor
    covered: Tensor
    width: Tensor
    chosen: float
    mean_of_draws: Tensor | None = None


def normal(mean: Tensor, variance: float, y: Tensor, chosen: float) -> Found:
    """Score normal distributions of one variance."""
    half = torch.full_like(mean, Z * math.sqrt(variance))
    return Found(mean, gaussian_crps(mean, math.sqrt(variance), y), (mean - y).abs() <= half, 2 * half, chosen)


def ridge(task: Task, setting: Setting, seed: int) -> Found:
    """Fit the closed form; the penalty is that of the smallest squared error where it was held out."""
    device = torch.device("cpu")

    def features(split: Split) -> Split:
        return Split(task.spec.normalise(split.inputs).flatten(1), split.targets)

    def predicted(readout: Ridge, penalty: float, split: Split) -> Tensor:
        return torch.cat(list(readout.fit(penalty).scores(features(split).inputs))).flatten()

    parts = [(Ridge(features(rest), 1, device), held) for rest, held in inner(task, seed)]

    def error(penalty: float) -> float:
        squares = [(predicted(readout, penalty, held) - held.targets.flatten()).square() for readout, held in parts]
        return float(torch.cat(squares).mean())

    best = choose_penalty(lambda penalty: -error(penalty)).penalty
    return normal(predicted(Ridge(features(task.train), 1, device), best, task.test), error(best), task.test.targets.flatten(), best)


def config_of(setting: Setting, epochs: int, seed: int, optimizer: OptimizerConfig | None = None) -> TrainConfig:
    """Return settings of a training of which the weights alone are wanted."""
    quiet = EvaluationConfig(test=False, every=10**9, alternatives=False)
    config = TrainConfig(seed=seed, budget=BudgetConfig(epochs=epochs), batch_size=setting.batch, device="cpu", evaluation=quiet)
    config.optimizer = optimizer or config.optimizer
    return config


def backprop(task: Task, setting: Setting, seed: int) -> Found:
    """Train the core's multilayer perceptron, on standardised targets."""
    unit, centre = task.train.targets.std(), task.train.targets.mean()

    def standard(split: Split) -> Split:
        return replace(split, targets=(split.targets - centre) / unit)

    def predicted(train: Split, epochs: int, split: Split) -> Tensor:
        torch.manual_seed(seed)
        rule = Backprop(bpfree.mlp(task.spec), task.spec)
        Trainer(rule, Task(task.spec, standard(train), None, standard(task.test)), config_of(setting, epochs, seed)).fit()
        with torch.no_grad():
            return rule.eval().network(task.spec.normalise(split.inputs)).flatten() * unit + centre

    def error(epochs: int) -> float:
        squares = [(predicted(rest, epochs, held) - held.targets.flatten()).square() for rest, held in inner(task, seed)]
        return float(torch.cat(squares).mean())

    errors = {epochs: error(epochs) for epochs in setting.ceiling}
    best = min(errors, key=errors.__getitem__)
    return normal(predicted(task.train, best, task.test), errors[best], task.test.targets.flatten(), best)


def noprop(task: Task, setting: Setting, seed: int) -> Found:
    """Train NoProp-DT; the length is that of the smallest error of block 1 (which sees noise for a label) where it was held out."""

    def trained(epochs: int) -> tuple[float, NoPropDT]:
        torch.manual_seed(seed)
        builder = NETWORKS["noprop-mlp"]
        network = builder.build(task.spec, builder.Config(blocks=setting.T, width=setting.width, depth=setting.depth))
        rule = NoPropDT(network, task.spec, NoPropDTConfig(T=setting.T))
        config = config_of(setting, epochs, seed, OptimizerConfig("adamw", lr=setting.rate, weight_decay=setting.decay))
        config.calibration = CalibrationConfig(folds=0 if task.validation is not None else INNER)
        run = Trainer(rule, task, config).fit()
        return run.result["calibration/t1/residual_variance"], rule.eval()

    found = {epochs: trained(epochs) for epochs in setting.epochs}
    best = min(found, key=lambda epochs: found[epochs][0])
    rule, inputs, y = found[best][1], task.spec.normalise(task.test.inputs), task.test.targets.flatten()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        mean, draws = rule.predict(inputs, generator).flatten(), rule.sample(inputs, DRAWS, generator).flatten(1)
    low, high = central(draws, LEVEL)
    return Found(mean, crps(draws, y), (low <= y) & (y <= high), high - low, best, draws.mean(0))


METHODS = {"noprop-dt": noprop, "backprop": backprop, "ridge": ridge}


# --- figures ----------------------------------------------------------------------------------------------------------


def cell(part: str, repeat: int, number: int, quick: bool) -> dict[str, Any]:
    """Predict the examples of an outer fold: what each method says, by the number of the example."""
    setting = SETTINGS[part]._replace(epochs=(1,), ceiling=(1,)) if quick else SETTINGS[part]
    task, held = next(itertools.islice(tasks(part, repeat, quick), number, None))
    y = task.test.targets.flatten()
    rows: dict[str, dict[str, Any]] = {}
    for name, method in METHODS.items():
        found = method(task, setting, OUTER * repeat + number)
        values = {key: value.double().tolist() for key, value in found._asdict().items() if isinstance(value, Tensor)}
        rows[name] = {**values, "chosen": [found.chosen], "r2_by_fold": [r2(found.mean, y)]}
    return {"places": held.tolist(), "truth": y.tolist(), "methods": rows}


def joined(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the outer folds of a repeat, which have an example in one of them each."""
    methods = {
        name: {key: [value for each in cells for value in each["methods"][name][key]] for key in row}
        for name, row in cells[0]["methods"].items()
    }
    return {**{key: [value for each in cells for value in each[key]] for key in ("places", "truth")}, "methods": methods}


def r2(made: Tensor, y: Tensor) -> float:
    return float(1 - (y - made).square().sum() / (y - y.mean()).square().sum())


def by_example(cells: Sequence[dict[str, Any]], method: str, key: str) -> Tensor:
    """Return the mean over repeats of a value of each example (N,)."""
    count = len(cells[0]["places"])
    total = torch.zeros(count, dtype=torch.float64)
    for each in cells:
        total[torch.tensor(each["places"])] += torch.tensor(each["methods"][method][key], dtype=torch.float64)
    return total / len(cells)


def figures(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Summarise the repeats of a part."""
    count = len(cells[0]["places"])
    error = math.sqrt(LEVEL * (1 - LEVEL) / count)
    found: dict[str, Any] = {"examples": count, "repeats": len(cells), "binomial_error_of_coverage": error, "methods": {}}
    for method in METHODS:
        rows = [each["methods"][method] for each in cells]
        truths = [torch.tensor(each["truth"], dtype=torch.float64) for each in cells]
        scores = [r2(torch.tensor(row["mean"], dtype=torch.float64), y) for row, y in zip(rows, truths, strict=True)]
        coverage = [statistics.fmean(row["covered"]) for row in rows]
        about: dict[str, Any] = {
            "r2": statistics.fmean(scores),
            "r2_by_repeat": scores,
            "r2_by_fold": [value for row in rows for value in row["r2_by_fold"]],
            "crps": float(by_example(cells, method, "crps").mean()),
            "coverage": statistics.fmean(coverage),
            "coverage_by_repeat": coverage,
            "within_two_binomial_errors": abs(statistics.fmean(coverage) - LEVEL) <= 2 * error,
            "width": statistics.fmean(value for row in rows for value in row["width"]),
            "chosen": [value for row in rows for value in row["chosen"]],
        }
        if "mean_of_draws" in rows[0]:
            drawn = [r2(torch.tensor(row["mean_of_draws"], dtype=torch.float64), y) for row, y in zip(rows, truths, strict=True)]
            about["r2_of_mean_of_draws"] = statistics.fmean(drawn)
        found["methods"][method] = about
    for other in ("ridge", "backprop"):
        difference = by_example(cells, "noprop-dt", "crps") - by_example(cells, other, "crps")
        share = float(difference.mean()) / found["methods"][other]["crps"]
        spread = float(difference.std()) / math.sqrt(count)
        found[f"crps_less_{other}"] = {"mean": float(difference.mean()), "standard_error": spread, "share": share}
    return found


def show(part: str, found: dict[str, Any]) -> None:
    """Print a table of a part."""
    rows = []
    for name, row in found["methods"].items():
        drawn = f"{row['r2_of_mean_of_draws']:.3f}" if "r2_of_mean_of_draws" in row else ""
        interval = f"{100 * row['coverage']:.1f} ± {200 * found['binomial_error_of_coverage']:.1f}"
        rows.append([name, f"{row['r2']:.3f}", drawn, f"{row['crps']:.4g}", interval, f"{row['width']:.3g}"])
    print(f"\n{part}: {found['examples']} examples, {found['repeats']} repeats")
    print_table(("method", "R2", "R2, mean of draws", "CRPS", "coverage of 90 %, %", "width"), rows, right=range(1, 6))
    for other in ("ridge", "backprop"):
        less = found[f"crps_less_{other}"]
        print(f"CRPS of noprop-dt less {other}'s: {less['mean']:.4g} ± {less['standard_error']:.2g} ({100 * less['share']:.1f} %)")


def kept(options: Any, part: str, repeat: int, number: int) -> dict[str, Any] | None:
    """Return an outer fold: as it was kept, or computed if it is wanted."""
    path = None if options.cells is None else options.cells / f"{part}-{repeat}-{number}.json"
    if path is not None and path.is_file():
        known: dict[str, Any] = json.loads(path.read_text())
        return known
    if options.only and not any(f"{part}/{repeat}/{number}/".startswith(f"{each}/") for each in options.only):
        return None
    found = cell(part, repeat, number, options.quick)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = measure.Benchmark("noprop_regression", __doc__)
    benchmark.parser.add_argument("--cells", type=Path, metavar="FOLDER", help="where finished folds are kept, and looked for")
    benchmark.parser.add_argument(
        "--only", nargs="+", default=[], metavar="PART/REPEAT", help="compute these alone, or PART, or PART/REPEAT/FOLD"
    )
    options = benchmark.start(arguments)
    results: dict[str, Any] = {}
    for part, repeats in REPEATS.items():
        known = []
        for repeat in range(1 if options.quick else repeats):
            found = [each for number in range(OUTER) if (each := kept(options, part, repeat, number)) is not None]
            known += [joined(found)] if len(found) == OUTER else []
        if known:
            results[part] = {"settings": SETTINGS[part]._asdict(), "draws": DRAWS, **figures(known)}
            show(part, results[part])
    benchmark.finish(results)


if __name__ == "__main__":
    main()
