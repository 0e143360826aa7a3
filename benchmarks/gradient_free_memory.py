"""Bytes that a step of ``spsa`` takes beyond the parameters, over those of a prediction. Target: at most 1.05.

The peak of what is allocated in a step in place, and in a forward pass in eval mode without a graph on the same batch, by torch's
allocation events on a CPU and by the allocator on CUDA (:class:`bpfree.training.meters.StepMemory`). The network is wide, so that a
direction that was kept as a whole would be the largest tensor by far. Beside it one step of rule ``evolution`` with noise of rank 1 and of
back-propagation without an optimiser's state, on the same network.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import measure
import torch
from bpfree_gradient_free.evolution import Evolution, EvolutionConfig
from bpfree_gradient_free.spsa import SPSA, SPSAConfig

from bpfree import Batch, OptimizerConfig, Rule, Stepper, TaskSpec
from bpfree.baselines import Backprop
from bpfree.cli.output import print_table
from bpfree.network.builders import MLPConfig, mlp
from bpfree.training.meters import StepMemory

WIDTH, DEPTH, BATCH, TARGET, WARM = 1024, 4, 128, 1.05, 2


def peak(work: Callable[[], Any], device: torch.device) -> int:
    """Return the peak bytes of a call, after some calls to warm up."""
    for _ in range(WARM):
        work()
    memory = StepMemory(device)
    gc.collect()  # or garbage that is freed inside would count as less memory
    with memory.watch():
        work()
    return memory.step_bytes


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = measure.Benchmark("gradient_free_memory", __doc__)
    options = benchmark.start(arguments)
    device = benchmark.device
    width, count = (256, BATCH) if options.quick else (WIDTH, BATCH)
    spec = TaskSpec("vectors", (width,), 10)
    batch = Batch(torch.randn(count, width, device=device), torch.randint(10, (count,), device=device))

    def stepper(kind: type[Rule], config: Any = None) -> Stepper:
        torch.manual_seed(0)
        rule = kind(mlp(spec, MLPConfig(widths=[width] * DEPTH)), spec, config)
        return Stepper(rule, OptimizerConfig("sgd", lr=1e-4), device=device)

    plain = stepper(Backprop)

    def predict() -> None:
        with torch.no_grad():
            plain.rule.eval()
            plain.rule.network(batch.inputs)
            plain.rule.train()

    works: dict[str, Callable[[], Any]] = {"a prediction": predict}
    for label, kind, config in (
        ("spsa", SPSA, SPSAConfig(directions=1, noise="gaussian")),
        ("spsa, 8 directions", SPSA, SPSAConfig(directions=8)),
        ("spsa, optimiser", SPSA, SPSAConfig(directions=1, in_place=False)),
        ("evolution, rank 1, 8 members", Evolution, EvolutionConfig(population=8, rank=1, chunk=2)),
        ("backprop", Backprop, None),
    ):
        made = stepper(kind, config)
        works[label] = lambda made=made: made.take(batch)
    found = {label: peak(work, device) for label, work in works.items()}
    inference = found["a prediction"]
    results = {}
    for label, size in found.items():
        target = TARGET if label in ("spsa", "spsa, 8 directions") else None
        ratio = size / inference
        results[label] = {
            "peak_bytes": size,
            "over_inference": ratio,
            "target": target,
            "reached": None if target is None else ratio <= target,
        }
    rows = [
        [
            label,
            f"{result['peak_bytes'] / 1024:,.0f}",
            f"{result['over_inference']:.3f}",
            "" if result["target"] is None else f"<= {TARGET:g}",
        ]
        for label, result in results.items()
    ]
    print_table(["step", "KiB", "over inference", "target"], rows, right=range(1, 4))
    weights = sum(p.numel() * p.element_size() for p in plain.rule.parameters())
    print(f"the parameters take {weights / 1024:,.0f} KiB")
    benchmark.finish({"steps": results, "parameter_bytes": weights})


if __name__ == "__main__":
    main()
