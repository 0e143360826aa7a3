"""Bytes kept during the credit of forward gradients, against depth. Target: flat for local losses (at most 1.05 of depth 4).

The peak of what ``rule.credit`` allocates, beyond parameters, buffers and ``.grad``, which is there and is added to. Networks of 4, 16
and 64 hidden layers of width 256, batch 128, one direction. By torch's allocation events on a CPU and by the allocator on CUDA
(:class:`bpfree.training.meters.StepMemory`), so derivatives and temporaries are in it.

With local losses all that a block needs is dropped before the next one. A global loss is known only at the end, and its derivative
is what each layer's noise is multiplied with: until then each layer keeps at least its input and its noise (for noise on weights,
the noise alone, which is as large as the weights). Back-propagation keeps the inputs too, and so does local back-propagation, which
sums the losses before its one reverse pass.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import measure
import torch
from bpfree_forward_gradient.options import ForwardGradientConfig, LocalForwardGradientConfig
from bpfree_forward_gradient.rules import ForwardGradient, LocalBackprop, LocalForwardGradient

from bpfree import Batch, Rule, TaskSpec
from bpfree.baselines import Backprop
from bpfree.cli.output import print_table
from bpfree.network.builders import MLPConfig, mlp
from bpfree.training.meters import StepMemory
from bpfree.training.stepper import new_step

WIDTH, BATCH, TARGET = 256, 128, 1.05
SPEC = TaskSpec("vectors", (WIDTH,), 10)
DEPTHS = (4, 16, 64)
WARM = 2


def rules(depth: int, device: torch.device) -> dict[str, Rule]:
    """Build the rules, each with its own network."""

    def network() -> Any:
        return mlp(SPEC, MLPConfig(widths=[WIDTH] * depth))

    made = {
        "backprop": Backprop(network(), SPEC),
        "activities": ForwardGradient(network(), SPEC, ForwardGradientConfig(tangents=1)),
        "weights": ForwardGradient(network(), SPEC, ForwardGradientConfig(tangents=1, perturb="weights")),
        "local blockwise": LocalForwardGradient(network(), SPEC, LocalForwardGradientConfig(losses="blockwise")),
        "local groupwise": LocalForwardGradient(network(), SPEC, LocalForwardGradientConfig(losses="all")),
        "local-backprop": LocalBackprop(network(), SPEC),
    }
    return {name: rule.to(device) for name, rule in made.items()}


def peak(rule: Rule, batch: Batch, device: torch.device) -> int:
    """Return the peak bytes of one credit, after some warm-up calls."""
    step = new_step(rule)
    parameters = list(rule.parameters())
    for _ in range(WARM):
        rule.credit(batch, step)
        step.index += 1
    for parameter in parameters:
        parameter.grad = None
    memory = StepMemory(device)
    gc.collect()  # or garbage that is freed inside would count as less memory
    with memory.watch():  # .grad is made inside, so that its replacement is seen, and does not count
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        rule.credit(batch, step)
    return memory.step_bytes - sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def measure_depths(depths: Sequence[int], device: torch.device) -> dict[str, dict[int, int]]:
    """Return the peak bytes by rule and depth."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(BATCH, WIDTH, generator=generator), torch.randint(SPEC.outputs, (BATCH,), generator=generator)
    batch = Batch(inputs.to(device), targets.to(device))
    sizes: dict[str, dict[int, int]] = {}
    for depth in depths:
        for name, rule in rules(depth, device).items():
            sizes.setdefault(name, {})[depth] = peak(rule, batch, device)
    return sizes


def summary(sizes: dict[str, dict[int, int]], depths: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Return growth and bytes per layer, and whether rules with a flat target are flat."""
    first, last = depths[0], depths[-1]
    result: dict[str, dict[str, Any]] = {}
    for name, by_depth in sizes.items():
        growth = by_depth[last] / by_depth[first]
        target = TARGET if name.startswith("local ") else None
        result[name] = {
            "peak_bytes": by_depth,
            "growth": growth,
            "bytes_per_layer": (by_depth[last] - by_depth[first]) / (last - first),
            "target_growth": target,
            "reached": None if target is None else growth <= target,
        }
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = measure.Benchmark("forward_gradient_memory", __doc__)
    options = benchmark.start(arguments)
    depths = (2, 4) if options.quick else DEPTHS
    found = summary(measure_depths(depths, benchmark.device), depths)
    headers = ["KiB at depth", *map(str, depths), "growth", "KiB per layer", "target"]
    rows = [
        [
            name,
            *(f"{result['peak_bytes'][depth] / 1024:,.0f}" for depth in depths),
            f"{result['growth']:.2f}",
            f"{result['bytes_per_layer'] / 1024:,.0f}",
            "" if result["target_growth"] is None else f"<= {result['target_growth']:g}",
        ]
        for name, result in found.items()
    ]
    print_table(headers, rows, right=range(1, len(headers)))
    activation, weights = BATCH * WIDTH * 4, (WIDTH + 1) * WIDTH * 4
    print(f"one layer's activations take {activation / 1024:.0f} KiB, its parameters {weights / 1024:.0f} KiB")
    benchmark.finish({"rules": found, "activation_bytes_per_layer": activation, "parameter_bytes_per_layer": weights})


if __name__ == "__main__":
    main()
