"""NoProp on a stream of classes: digits, four and then three at a time, with few or no examples of earlier stages.

Rows: ``noprop-dt``, all of whose blocks learn in every stage; *by stage*, in which each stage teaches blocks of its own and those of
earlier stages keep their weights; and back-propagation (a perceptron, so another network), each at its default rate.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import measure
import torch
from bpfree_noprop import NoPropDT, NoPropDTConfig
from bpfree_noprop.blocks import DenoisingBlock

import bpfree
from bpfree import Budget, Phase, Rule, Stage, Task
from bpfree.cli.output import print_table
from bpfree.training.config import BudgetConfig, EvaluationConfig
from bpfree.training.trainer import Trainer

EACH, STAGES = 2, 3
KEPT = (0, 60, 200)
SCORES = ("average_incremental", "last", "forgetting")


class ByStage(NoPropDT):
    """Each stage teaches two blocks of its own; those of earlier stages keep their weights, later ones do not count yet."""

    stage = 0

    def start_stage(self, stage: Stage) -> None:
        self.stage = stage.index

    def phases(self, budget: Budget) -> Iterable[Phase]:
        own = self.network.names[EACH * self.stage : EACH * (self.stage + 1)]
        return [Phase(f"stage {self.stage + 1}", epochs=budget.epochs, groups=(*own, "head"))]

    def denoisers(self) -> Iterator[tuple[int, DenoisingBlock]]:
        return itertools.islice(super().denoisers(), EACH * (self.stage + 1))


def noprop(task: Task, kind: type[NoPropDT] = NoPropDT) -> Rule:
    T = EACH * STAGES
    return kind(bpfree.build_network("noprop-mlp", task.spec, blocks=T), task.spec, NoPropDTConfig(T=T, state="noised"))


def backprop(task: Task) -> Rule:
    rule: Rule = bpfree.installed_plugins().get("rules", "backprop")(bpfree.mlp(task.spec), task.spec)
    return rule


ROWS = {"noprop": noprop, "by stage": lambda task: noprop(task, ByStage), "back-propagation": backprop}


def made(row: str, task: Task, seed: int) -> Rule:
    torch.manual_seed(seed)
    return ROWS[row](task)


def scores(rule: Rule, task: Task, kept: int, seed: int, epochs: int) -> list[float]:
    """Train a rule on the stream, and return its test scores in per cent."""
    memory = bpfree.Memory(total=kept, choose="herding") if kept else None
    stream = bpfree.class_stream(task, start=4, increment=3, memory=memory)
    evaluation = EvaluationConfig(every=epochs, alternatives=False)
    config = bpfree.TrainConfig(seed=seed, batch_size=32, device="cpu", budget=BudgetConfig(epochs=epochs), evaluation=evaluation)
    result = Trainer(rule, stream, config).fit().result
    return [100 * float(result[f"test/{name}/accuracy"]) for name in SCORES]


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = measure.Benchmark("noprop_streams", __doc__)
    options = benchmark.start(arguments)
    task = bpfree.load_task("digits")
    seeds, epochs = (1, 1) if options.quick else (3, 10)
    results: dict[str, Any] = {}
    for kept, row in itertools.product(KEPT, ROWS):
        each = [scores(made(row, task, seed), task, kept, seed, epochs) for seed in range(seeds)]
        found = torch.tensor(each, dtype=torch.float64)
        results[f"{row}, {kept} kept"] = {name: found[:, place].tolist() for place, name in enumerate(SCORES)}
    table = [[label, *(_shown(values) for values in result.values())] for label, result in results.items()]
    print_table(["test, %", *SCORES], table, right=range(1, 4))
    benchmark.finish({"epochs_of_a_stage": epochs, "seeds": seeds, "rows": results})


def _shown(values: list[float]) -> str:
    found = torch.tensor(values)
    return f"{found.mean():.1f}" + (f" ± {found.std():.1f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
