"""The trainer with everything on against a bare PyTorch loop. Target: at most 1.05 of its time, aim 1.03.

Ours is ``bpfree.runner.run`` with the rule ``backprop``: MLflow in a SQLite store, system metrics, journal, plots,
checkpoints, step metrics; its time is the run's own ``train/seconds``. The bare loop runs the same modules from the same
initial weights on the same resident tensors in the same batch order (both taken from ``bpfree.tasks.loading``) with the
same fused Adam. Evaluation and checkpoints are in neither. That both end with the same weights is checked.

MLP 784-300-300-10, batch 64, MNIST's training split, 5 epochs, at least 7 interleaved pairs. Without BPFREE_DATA (or with
``--synthetic``) random tensors of MNIST's shape take its place, and the result says so.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import measure
import torch
import torch.nn.functional as F
from measure import Cost, Stopwatch
from torch import nn

from bpfree import Task, runner
from bpfree.config import parse_words, resolve
from bpfree.recipe import Recipe
from bpfree.tasks.loading import Loader
from bpfree.training import state
from bpfree.training.checkpoint import read_checkpoint
from bpfree.training.meters import Clock

TARGET = 1.05
EXAMPLES = 54_000
"""MNIST's training split, without its validation split."""


class CountingClock(Clock):
    """The trainer's clock, which also counts processor time."""

    processor = 0.0

    def start(self) -> None:
        super().start()
        self._began = time.process_time()

    def stop(self) -> None:
        super().stop()
        CountingClock.processor += time.process_time() - self._began


class Arms:
    """The two loops over one recipe and task.

    Attributes:
        weights: that each arm ended with last.
    """

    def __init__(self, recipe: Recipe, task: Task, device: torch.device) -> None:
        self.recipe, self.task, self.device = recipe, task, device
        self.epochs = recipe.settings.budget.epochs or 0
        self.loader = Loader(task.train, task.spec, batch_size=recipe.settings.batch_size, device=device, seed=recipe.settings.seed)
        self.weights: dict[str, dict[str, torch.Tensor]] = {}

    def trainer(self) -> Cost:
        """Return the training time that the run reports, and the processor time between the same points."""
        CountingClock.processor = 0.0
        with mock.patch.object(state, "Clock", CountingClock):
            run = runner.run(self.recipe, quiet=True, task=self.task)
        assert run.status == "finished", run.reason
        assert run.folder is not None
        saved = read_checkpoint(run.folder / "checkpoints" / "last.pt")["weights"]
        self.weights["trainer"] = {name.removeprefix("network.blocks."): value.cpu() for name, value in saved.items()}
        return Cost(run.result["train/seconds"], CountingClock.processor)

    def bare(self) -> Cost:
        """Return the cost of the bare loop."""
        kept, size = self.loader.resident, self.loader.batch_size
        assert kept is not None
        assert kept.targets is not None
        blocks = self.recipe.build_rule(self.task.spec).network.blocks
        model = nn.Sequential(*(layer for block in blocks.values() for layer in (block if isinstance(block, nn.Sequential) else [block])))
        model.to(self.device).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
        with Stopwatch(self.device) as watch:
            for epoch in range(self.epochs):
                order = self.loader.order(epoch).to(self.device)
                for start in range(0, len(order), size):
                    chosen = order[start : start + size]
                    inputs, targets = kept.inputs.index_select(0, chosen), kept.targets.index_select(0, chosen)
                    F.cross_entropy(model(inputs), targets).backward()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
        self.weights["bare"] = {name: value.cpu() for name, value in blocks.state_dict().items()}
        return watch.cost

    def agree(self) -> bool:
        """Tell whether both arms ended with the same weights, up to the last bits on a GPU."""
        ours, bare = self.weights["trainer"], self.weights["bare"]
        tolerance = 0.0 if self.device.type == "cpu" else 1e-2
        return all(torch.allclose(ours[name], value, rtol=0, atol=tolerance) for name, value in bare.items())


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = measure.Benchmark("trainer_overhead", __doc__, pairs=7)
    benchmark.parser.add_argument("--synthetic", action="store_true", help="random tensors in place of MNIST")
    benchmark.parser.add_argument("--epochs", type=int, default=5, help="epochs of each run")
    options = benchmark.start(arguments)
    real = not options.synthetic and not options.quick and bool(os.environ.get("BPFREE_DATA"))
    epochs = 1 if options.quick else options.epochs
    with tempfile.TemporaryDirectory() as folder:
        recipe = resolve(parse_words(settings(options.device, options.threads, epochs, Path(folder))))
        spec = recipe.registry.get("tasks", "mnist").spec(None, None)
        task = recipe.build_task() if real else measure.synthetic_task(spec, train=1280 if options.quick else EXAMPLES)
        arms = Arms(recipe, task, benchmark.device)
        if not options.quick:  # lazy imports, the store's tables, the processor's clock
            measure.interleaved(arms.trainer, arms.bare, 1)
        pairs = measure.interleaved(arms.trainer, arms.bare, options.pairs)
    result = measure.compared(pairs, TARGET) | {
        "data": "MNIST" if real else "synthetic",
        "examples": len(task.train),
        "epochs": epochs,
        "steps": epochs * len(arms.loader),
        "same_weights": arms.agree(),
    }
    measure.show_ratios({f"{epochs} epochs of {result['data']}": result})
    ours, bare = result["median_seconds"]
    result["extra_microseconds_per_step"] = 1e6 * (ours - bare) / result["steps"]
    print(f"{result['extra_microseconds_per_step']:.1f} us more per step; same final weights: {result['same_weights']}")
    benchmark.finish(result)


def settings(device: str, threads: int, epochs: int, folder: Path) -> list[str]:
    """Return the configuration of the trainer's runs."""
    return [
        *("rule=backprop", "task=mnist", "network=mlp", "network.widths=[300,300]", "batch_size=64", f"budget.epochs={epochs}"),
        *("optimizer.name=adam", "optimizer.lr=0.001", f"device={device}", f"threads={threads}"),
        *("tracking.enabled=true", "tracking.system=true", f"tracking.uri=sqlite:///{folder}/mlflow.db", f"output={folder}/runs"),
    ]


if __name__ == "__main__":
    main()
