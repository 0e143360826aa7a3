"""Bytes of a NoProp-DT step against the number T of blocks. Target: flat with sequential updates (at most 1.05 of the smallest T).

The peak of what a step (``learn``, with the optimiser) allocates above what lies between steps: activations, gradients and temporaries,
by torch's allocation events on a CPU and by the allocator on CUDA (:class:`bpfree.training.meters.StepMemory`). Beside it what lies
between steps, which grows with T whatever the updates: parameters, buffers and the optimiser's state.

With sequential updates a step fills one block. With simultaneous ones in a loop the activations are one block's too, but the gradients
of all blocks wait for the optimiser's step; stacked dense blocks hold the activations of all.

Then the rows of the paper's Table 2 (one-hot embeddings, the paper's blocks and settings, from the shipped studies), with the published
memory of a GPU beside tensors as counted here: without data, and without what CUDA takes for itself.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import measure
import torch

from bpfree import Batch, Budget, Rule, Stepper
from bpfree.cli.output import print_table
from bpfree.config import parse_words, resolve
from bpfree.recipe import Recipe
from bpfree.study.cells import plan
from bpfree.study.file import find_study
from bpfree.training.meters import StepMemory

TARGET, WARM = 1.05, 2
COUNTS = (5, 10, 50)
CASES = {
    "noprop-cnn, sequential": ("noprop-cnn", "mnist", "rule.updates=sequential"),
    "noprop-cnn, simultaneous": ("noprop-cnn", "mnist", "rule.updates=simultaneous"),
    "noprop-mlp, sequential": ("noprop-mlp", "digits", "rule.updates=sequential"),
    "noprop-mlp, simultaneous, loop": ("noprop-mlp", "digits", "rule.execution=loop"),
    "noprop-mlp, simultaneous, stacked": ("noprop-mlp", "digits", "rule.execution=stacked"),
}


def make(case: tuple[str, str, str], T: int, batch_size: int, device: torch.device) -> tuple[Rule, Batch]:
    """Build the rule with T blocks and otherwise its defaults, and a random batch."""
    network, task, setting = case
    recipe = resolve(parse_words(["rule=noprop-dt", f"task={task}", f"network={network}", f"rule.T={T}", f"network.blocks={T}", setting]))
    return build(recipe, batch_size, device)


def build(recipe: Recipe, batch_size: int, device: torch.device) -> tuple[Rule, Batch]:
    """Build the recipe's rule in train mode, and a random batch of its task's shapes."""
    spec = recipe.registry.get("tasks", recipe.names["task"]).spec(recipe.options["task"], None)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(batch_size, *spec.input_shape, generator=generator)
    targets = torch.randint(spec.outputs, (batch_size,), generator=generator)
    torch.manual_seed(0)
    return recipe.build_rule(spec).to(device).train(), Batch(inputs.to(device), targets.to(device))


def peak(rule: Rule, batch: Batch, device: torch.device, *, most: int) -> dict[str, int]:
    """Return bytes of the largest step of an epoch's phases (of the first ``most``), and bytes kept between steps at its end."""
    stepper, memory = Stepper(rule), StepMemory(device)
    for number, phase in enumerate(rule.phases(Budget(epochs=1))):
        with stepper.phase(phase):
            for _ in range(WARM):
                stepper.take(batch)
            if number < most:
                gc.collect()  # or garbage that is freed inside would count as less memory
                with memory.watch():
                    rule.learn(batch, stepper.step)
    kept = [*rule.parameters(), *rule.buffers(), *stepper.updater.tensors()]
    return {"step": memory.step_bytes, "kept": sum(t.numel() * t.element_size() for t in kept)}


def measure_counts(counts: Sequence[int], batch_size: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Return bytes by case and T, growth, and whether cases with a flat target are flat."""
    results: dict[str, dict[str, Any]] = {}
    for label, case in CASES.items():
        found = {T: peak(*make(case, T, batch_size, device), device, most=counts[0]) for T in counts}
        growth = found[counts[-1]]["step"] / found[counts[0]]["step"]
        target = TARGET if "sequential" in label else None
        results[label] = {
            "step_bytes": {T: one["step"] for T, one in found.items()},
            "kept_bytes": {T: one["kept"] for T, one in found.items()},
            "total_bytes": {T: one["step"] + one["kept"] for T, one in found.items()},
            "growth": growth,
            "target_growth": target,
            "reached": None if target is None else growth <= target,
        }
    return results


def measure_table(device: torch.device, *, quick: bool) -> dict[str, dict[str, Any]]:
    """Return bytes of the one-hot rows of Table 2, by task and method."""
    results: dict[str, dict[str, Any]] = {}
    for task in ("mnist", "cifar10", "cifar100")[: 1 if quick else 3]:
        study = find_study(f"noprop/table1-{task}")
        published = {row.label: row.published[""] for row in study.rows}
        for cell in plan(study, load=False).cells:
            if not cell.key.row.endswith("one-hot") or cell.key.seed != study.seeds[0] or (quick and "CT" not in cell.key.row):
                continue
            rule, batch = build(cell.recipe, 8 if quick else int(cell.recipe.settings.batch_size), device)
            found = peak(rule, batch, device, most=1)
            results[f"{task}, {cell.key.row.removesuffix(' one-hot')}"] = {
                "step_bytes": found["step"],
                "kept_bytes": found["kept"],
                "total_bytes": found["step"] + found["kept"],
                "published_mib": published[cell.key.row]["memory_mb"].mean,
            }
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = measure.Benchmark("noprop_memory", __doc__)
    options = benchmark.start(arguments)
    counts, batch_size = ((2, 4), 8) if options.quick else (COUNTS, 128)
    results = measure_counts(counts, batch_size, benchmark.device)
    headers = ["MiB of a step (and in all) at T", *map(str, counts), "growth", "target"]
    rows = [
        [
            label,
            *(f"{result['step_bytes'][T] / 2**20:.2f} ({result['total_bytes'][T] / 2**20:.1f})" for T in counts),
            f"{result['growth']:.2f}",
            "" if result["target_growth"] is None else f"<= {result['target_growth']:g}",
        ]
        for label, result in results.items()
    ]
    print_table(headers, rows, right=range(1, len(headers)))
    table = measure_table(benchmark.device, quick=options.quick)
    print_table(
        ["Table 2, MiB", "of a step", "in all", "published (GPU)"],
        [
            [label, *(f"{result[key] / 2**20:.1f}" for key in ("step_bytes", "total_bytes")), f"{result['published_mib']:.0f}"]
            for label, result in table.items()
        ],
        right=range(1, 4),
    )
    benchmark.finish({"batch": batch_size, "cases": results, "table_2": table})


if __name__ == "__main__":
    main()
