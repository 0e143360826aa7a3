"""NoProp-DT's simultaneous step against the raw forward and backward passes of its blocks. Target: at most 1.05.

Ours is ``credit``: noise, embeddings, the T block losses and the head's loss, and their backward passes. The other side is a
loop over the same block modules with the same inputs and loss (in its cheapest form) on noised labels made beforehand: no
rule code, no noise, no head. Dropping ``.grad`` is in both, the optimiser's step in neither. The head's loss and the noise
are thus part of what is called overhead.

Also reported: milliseconds of a whole step (``learn``, with the optimiser) of each network; for the paper's own block at
T=10 and batch 128 that is the cost per step that the README quotes. Random inputs of digits' and MNIST's shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import measure
import torch
import torch.nn.functional as F

from bpfree import Batch
from bpfree.config import parse_words, resolve
from bpfree.rule import Rule
from bpfree.training.updater import new_step

TARGET = 1.05


@dataclass(frozen=True)
class Case:
    """A network at the sizes of a task; ``repeat`` steps make one measurement."""

    network: str
    task: str
    batch: int
    repeat: int


CASES = (Case("noprop-mlp", "digits", 64, 40), Case("noprop-cnn", "mnist", 64, 4), Case("noprop-paper", "mnist", 128, 1))


def make(case: Case, device: torch.device, batch_size: int) -> tuple[Rule, Batch]:
    """The rule with its default configuration (T=10), and a random batch."""
    recipe = resolve(parse_words(["rule=noprop-dt", f"task={case.task}", f"network={case.network}"]))
    spec = recipe.registry.get("tasks", case.task).spec(recipe.options["task"], None)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(batch_size, *spec.input_shape, generator=generator)
    targets = torch.randint(spec.outputs, (batch_size,), generator=generator)
    return recipe.build_rule(spec).to(device).train(), Batch(inputs.to(device), targets.to(device))


def raw_passes(rule: Any, batch: Batch) -> Callable[[], None]:
    """Forward and backward of each block on noised labels made now."""
    blocks = list(rule.network.blocks.values())
    u = F.one_hot(batch.targets, rule.spec.outputs).float()
    states = [rule.schedule.signal[t] * u + rule.schedule.noise[t] * torch.randn_like(u) for t in range(len(blocks))]
    weights = [0.5 * rule.config.eta * float(rule.schedule.dsnr[t + 1]) / len(u) for t in range(len(blocks))]
    parameters = list(rule.parameters())

    def work() -> None:
        for block, z, weight in zip(blocks, states, weights, strict=True):
            loss = F.mse_loss(block(batch.inputs, z).softmax(1), u, reduction="sum") * weight
            loss.backward()
        drop(parameters)

    return work


def credit_only(rule: Rule, batch: Batch, step: Any) -> Callable[[], None]:
    """The rule's own part of a step."""
    parameters = list(rule.parameters())

    def work() -> None:
        rule.credit(batch, step)
        step.index += 1
        drop(parameters)

    return work


def drop(parameters: Sequence[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def measure_case(case: Case, device: torch.device, pairs: int, *, quick: bool) -> dict[str, Any]:
    """The ratio, and the cost of a whole step."""
    torch.manual_seed(0)
    repeat = 1 if quick else case.repeat * (10 if device.type == "cuda" else 1)
    rule, batch = make(case, device, 8 if quick else case.batch)
    step = new_step(rule)
    arms = (
        measure.timed(credit_only(rule, batch, step), device, repeat=repeat),
        measure.timed(raw_passes(rule, batch), device, repeat=repeat),
    )
    measure.interleaved(*arms, 1)
    result = measure.compared(measure.interleaved(*arms, pairs), TARGET)
    whole = measure.timed(lambda: rule.learn(batch, step), device, repeat=repeat)
    whole()
    times = sorted(whole().wall for _ in range(1 if quick else 5))
    return result | {"batch": len(batch), "T": rule.config.T, "learn_seconds": times, "learn_median_ms": 1000 * times[len(times) // 2]}


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = measure.Benchmark("noprop_step", __doc__, pairs=11)
    benchmark.parser.add_argument("--network", choices=[case.network for case in CASES], help="only this one")
    options = benchmark.start(arguments)
    results = {
        f"{case.network}, {case.task}, batch {case.batch}": measure_case(case, benchmark.device, options.pairs, quick=options.quick)
        for case in CASES
        if options.network in (None, case.network)
    }
    measure.show_ratios(results)
    for label, result in results.items():
        print(f"{label}: {result['learn_median_ms']:.2f} ms per step with the optimiser (T={result['T']})")
    benchmark.finish(results)


if __name__ == "__main__":
    main()
