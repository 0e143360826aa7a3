"""The best rate of a readout on fixed features: several rates at once, on the validation split, for the rows of a study.

For rules with a phase on features (``Phase.on_features``): the features learn as the row says, are computed once, and readouts with
the candidate rates learn from them side by side, on the same batches with the same dropout, with Adam and the row's schedule. The test
split is not touched. The rate to take is the best of the last epochs, unless it is at an end of the grid.

    python benchmarks/readout_rates.py softhebb-cifar10 --rows "own-prediction twin" --rates 0.0001 0.0003 0.001 0.003

prints, for each row and rate, the accuracy on validation and on the training split (whether the readout has converged).
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import Any

import measure
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bpfree import Phase, Rule
from bpfree.cli.output import print_table
from bpfree.config import parse_words
from bpfree.network.network import evaluating
from bpfree.study.cells import plan
from bpfree.study.file import find_study
from bpfree.study.rows import Cell
from bpfree.tasks.loading import Loader
from bpfree.tasks.task import Split, Task, TaskSpec
from bpfree.training.features import feature_loader, feature_split
from bpfree.training.schedules import shape_of
from bpfree.training.trainer import Trainer

EVALUATE_EVERY = 10


def trained(cell: Cell, task: Task) -> tuple[Rule, Phase]:
    """Return the row's rule at the beginning of its readout's phase, and that phase."""
    rule = cell.recipe.build_rule(task.spec)
    recipe = cell.recipe.pinned(rule)
    phases = list(rule.phases(recipe.settings.budget))
    last = phases[-1]
    if not last.on_features:
        sys.exit(f"{cell.key.row}: its last phase, {last.name!r}, is not on features")
    settings = dataclasses.replace(recipe.settings, select="last")
    rule.phases = lambda budget: phases[:-1] or [dataclasses.replace(last, epochs=0)]  # type: ignore[method-assign]
    Trainer(rule, dataclasses.replace(task, test=task.validation or task.test), settings).fit()
    return rule, last


def raw(split: Split, spec: TaskSpec) -> Loader:
    """Return the batches of a split in its original order."""
    return Loader(split, spec, batch_size=250, device=torch.device("cpu"))


class Readouts(nn.Module):
    """Linear readouts of different rates on the same input; what precedes the linear map is shared.

    Args:
        readout: a rule's, which ends in a linear map; each begins with its weights.
        rates: of Adam.
    """

    def __init__(self, readout: nn.Sequential, rates: Sequence[float]) -> None:
        super().__init__()
        linear: Any = readout[-1]
        self.before = readout[:-1]
        self.rates = list(rates)
        self.weights = nn.ParameterList([linear.weight.detach().clone() for _ in rates])
        self.biases = nn.ParameterList([linear.bias.detach().clone() for _ in rates])

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, ...) to scores (N, rates, classes)."""
        scores = F.linear(self.before(x), torch.cat(list(self.weights)), torch.cat(list(self.biases)))
        return scores.unflatten(1, (len(self.rates), -1))

    def optimizer(self) -> torch.optim.Optimizer:
        """Make Adam with a parameter group per rate."""
        groups = zip(self.weights, self.biases, self.rates, strict=True)
        return torch.optim.Adam([{"params": [w, b], "lr": rate, "base_lr": rate} for w, b, rate in groups], fused=True)

    @torch.no_grad()
    def accuracies(self, loader: Loader) -> list[float]:
        """Return the accuracy of each readout in per cent."""
        right, count = torch.zeros(len(self.rates)), 0
        with evaluating(self):
            for batch in loader:
                right += (self(batch.inputs).argmax(2) == batch.targets.unsqueeze(1)).sum(0)
                count += len(batch)
        return (100 * right / count).tolist()


def sweep(cell: Cell, rates: Sequence[float], examples: int | None) -> list[dict[str, float]]:
    """Return a readout's accuracies per rate: on validation at the end and at its best, on the training split at the end."""
    recipe = cell.recipe
    task = recipe.build_task()
    assert task.validation is not None
    if examples is not None:
        task = dataclasses.replace(task, train=task.train.subset(torch.arange(min(examples, len(task.train)))))
    rule, phase = trained(cell, task)
    print(f"  features learned {time.strftime('%H:%M:%S')}", flush=True)
    spec, size, seed = task.spec, recipe.settings.batch_size, recipe.settings.seed
    train, held = (feature_split(rule, raw(split, spec)) for split in (task.train, task.validation))
    print(f"  features computed {time.strftime('%H:%M:%S')}", flush=True)
    batches = feature_loader(train, spec, batch_size=size, device=torch.device("cpu"), seed=seed)
    looks = [feature_loader(split, spec, batch_size=250, device=torch.device("cpu")) for split in (held, train)]
    torch.manual_seed(seed)
    readouts = Readouts(rule.network.blocks[rule.network.readout or ""], rates)
    optimizer, shape = readouts.optimizer(), shape_of(phase.schedule or recipe.settings.schedule)
    epochs = phase.epochs or 1
    best = [0.0] * len(rates)
    for epoch in range(epochs):
        readouts.train()
        for number, batch in enumerate(batches.batches(epoch)):
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * (1.0 if shape is None else shape((epoch + number / len(batches)) / epochs))
            scores = readouts(batch.inputs)
            target = batch.targets.unsqueeze(1).expand(-1, len(rates))
            loss = F.cross_entropy(scores.flatten(0, 1), target.flatten()) * len(rates)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if (epoch + 1) % EVALUATE_EVERY == 0 or epoch + 1 == epochs:
            last = readouts.accuracies(looks[0])
            best = [max(pair) for pair in zip(best, last, strict=True)]
            print(f"  epoch {epoch + 1}/{epochs}: {' '.join(f'{value:.2f}' for value in last)}", flush=True)
    rows = zip(rates, last, best, readouts.accuracies(looks[1]), strict=True)
    return [dict(zip(("rate", "validation", "best_look", "training"), row, strict=True)) for row in rows]


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = measure.Benchmark("readout_rates", __doc__)
    benchmark.parser.add_argument("study", help="name or file of the study")
    benchmark.parser.add_argument("--rows", nargs="+", help="labels of the rows (default: all whose last phase is on features)")
    benchmark.parser.add_argument("--rates", nargs="+", type=float, default=[1e-4, 3e-4, 1e-3, 3e-3], help="candidate rates")
    benchmark.parser.add_argument("--examples", type=int, help="use only the first N training examples")
    benchmark.parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of all rows")
    options = benchmark.start(arguments)
    words = ["task.validation=0.1", "tracking.enabled=false", *options.set]
    cells = plan(find_study(options.study), parse_words(words), seeds=1).cells
    found = {}
    for cell in cells:
        if cell.key.row not in options.rows if options.rows is not None else not has_features(cell):
            continue
        label = cell.key.row
        print(f"{label} {time.strftime('%H:%M:%S')}", flush=True)
        found[label] = sweep(cell, options.rates, options.examples)
        print_table(("row", "rate", "validation %", "best look", "training %"), [(label, *shown(row)) for row in found[label]])
    benchmark.finish({"study": options.study, "rows": found}, suffix=f"_{options.study}")


def shown(row: dict[str, float]) -> list[str]:
    """Format the cells of a line."""
    return [f"{row['rate']:g}", *(f"{row[key]:.2f}" for key in ("validation", "best_look", "training"))]


def has_features(cell: Cell) -> bool:
    """Tell whether the row's last phase is on features."""
    rule = cell.recipe.build_rule(cell.recipe.spec())
    return list(rule.phases(cell.recipe.settings.budget))[-1].on_features


if __name__ == "__main__":
    main()
