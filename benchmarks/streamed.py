"""Memory and speed of streamed rules: saved bytes against depth, and the step against a hand-written loop.

(a) Bytes that tensors saved for backward hold at their peak, of a streamed rule (a local linear head at each block) and of
back-propagation, at depths 2 to 32, width 256, batch 64. Target: at most 1.05 of depth 2 at depth 32 for the streamed rule.

(b) Seconds of ``rule.learn`` at width 256, depth 4, batch 64, against a plain loop over the same blocks, heads, losses and
optimiser (one fused Adam). Target: at most 1.06, the median of interleaved pairs. Both end with the same weights, checked.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import measure
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree import Batch, Network, Step, Streamed, TaskSpec
from bpfree.baselines import Backprop
from bpfree.cli.output import print_table
from bpfree.network.builders import MLPConfig, mlp
from bpfree.network.trace import Trace
from bpfree.training.stepper import new_step

SPEC = TaskSpec("vectors", (784,), 10)
WIDTH, DEPTH, BATCH, TARGET = 256, 4, 64, 1.06
DEPTHS = (2, 4, 8, 16, 32)
STEPS = 100


class LocalHeads(Streamed):
    """A linear head and the task's loss at every block."""

    def __init__(self, network: Network, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.heads = nn.ModuleDict({name: nn.Linear(network.shapes[name].numel(), spec.outputs) for name in network.hidden})

    def local_loss(self, trace: Trace, batch: Batch, step: Step) -> Tensor:
        return self.spec.loss(self.heads[trace.name](trace.output), batch)


def make_batch(device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(BATCH, *SPEC.input_shape, generator=generator), torch.randint(SPEC.outputs, (BATCH,), generator=generator)
    return Batch(inputs.to(device), targets.to(device))


def memory(device: torch.device, depths: Sequence[int]) -> dict[str, dict[int, int]]:
    """Return the peak saved bytes by rule and depth."""
    sizes: dict[str, dict[int, int]] = {"streamed": {}, "backprop": {}}
    batch = make_batch(device)
    for depth in depths:
        network = mlp(SPEC, MLPConfig(depth=depth, width=WIDTH))
        for name, rule in (("streamed", LocalHeads(network, SPEC)), ("backprop", Backprop(network, SPEC))):
            rule.to(device)
            step = new_step(rule)
            sizes[name][depth] = measure.saved_bytes(lambda rule=rule, step=step: rule.credit(batch, step))
    return sizes


def plain_loop(rule: LocalHeads, batch: Batch) -> Callable[[], None]:
    """Return the rule's mathematics as a hand-written loop."""
    blocks = list(rule.network.blocks.values())
    heads = [*rule.heads.values(), nn.Identity()]
    optimizer = torch.optim.Adam(rule.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        x = batch.inputs
        for block, head in zip(blocks, heads, strict=True):
            h = block(x)
            F.cross_entropy(head(h), batch.targets).backward()
            x = h.detach()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def speed(device: torch.device, pairs: int, steps: int) -> dict[str, Any]:
    """Compare the rule's step with the plain loop's, ``steps`` steps at a time."""
    torch.manual_seed(0)
    batch = make_batch(device)
    rule = LocalHeads(mlp(SPEC, MLPConfig(depth=DEPTH, width=WIDTH)), SPEC).to(device)
    twin = copy.deepcopy(rule)
    handed = new_step(rule)

    def ours() -> None:
        rule.learn(batch, handed)
        handed.index += 1

    arms = measure.timed(ours, device, repeat=steps), measure.timed(plain_loop(twin, batch), device, repeat=steps)
    measure.interleaved(*arms, 1)
    result = measure.compared(measure.interleaved(*arms, pairs), TARGET)
    same = all(torch.equal(a, b) for a, b in zip(rule.parameters(), twin.parameters(), strict=True))
    return result | {"same_weights": same, "steps_per_measurement": steps}


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = measure.Benchmark("streamed", __doc__, pairs=21)
    options = benchmark.start(arguments)
    sizes = memory(benchmark.device, DEPTHS[:2] if options.quick else DEPTHS)
    rows = [[str(depth), *(f"{sizes[name][depth] / 1024:,.0f}" for name in sizes)] for depth in sizes["streamed"]]
    print_table(["depth", "streamed KiB", "backprop KiB"], rows, right=range(3))
    result = speed(benchmark.device, options.pairs, 3 if options.quick else STEPS)
    measure.show_ratios({f"step, width {WIDTH}, depth {DEPTH}": result})
    print(f"same final weights: {result['same_weights']}")
    growth = {name: max(by_depth.values()) / by_depth[2] for name, by_depth in sizes.items()}
    benchmark.finish({"saved_bytes": sizes, "growth_over_depth_2": growth, "step": result})


if __name__ == "__main__":
    main()
