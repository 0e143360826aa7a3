"""NoProp-DT's predictions against one pass through their stems. Target: at most 1.15 for ``noprop-cnn``, T = 10, batches of 128.

The stems are what the blocks compute of the input alone, as the modules that they are, in eval mode and without gradients; the rest is the
chain: the label's path, the joined layers, the mixing of states and the head.

Also, each in pairs with ``predict``: the whole chain as one module without batch norms (``rule.folded()``), that module compiled by
``torch.compile`` into one graph, and as a program of ``torch.export``; the same for single images, where calls cost more than numbers. And
draws: ``rule.sample`` of 20 chains for each example against 20 sampled predictions, which compute the stems each time.

Random inputs of MNIST's shape; T = 10.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import measure
import noprop_step
import torch
from torch import Tensor

TARGET = 1.15
DRAWS = 20


@dataclass(frozen=True)
class Case:
    """A network, examples at a time, repetitions in one measurement, and whether the target is its."""

    network: str
    batch: int
    repeat: int
    target: bool = False

    def __str__(self) -> str:
        return f"{self.network}, batch {self.batch}"


CASES = (Case("noprop-cnn", 128, 2, target=True), Case("noprop-cnn", 1, 40))


def stems(rule: Any, inputs: Tensor) -> Callable[[], None]:
    """Return one pass through all stems."""

    @torch.no_grad()
    def work() -> None:
        for block in rule.network.blocks.values():
            block.stem(inputs)

    return work


def predicting(model: Callable[[Tensor], Tensor], inputs: Tensor) -> Callable[[], None]:
    """Return a prediction without gradients."""

    @torch.no_grad()
    def work() -> None:
        model(inputs)

    return work


def ways(rule: Any, inputs: Tensor) -> tuple[dict[str, Callable[[Tensor], Tensor]], float]:
    """Return the other forms of ``predict``, and the seconds of the compilation."""
    whole = rule.folded()
    program = torch.export.export(whole, (inputs,)).module()
    torch.compiler.reset()
    compiled = torch.compile(whole, fullgraph=True)
    began = time.perf_counter()
    with torch.no_grad():
        compiled(inputs)
    return {"folded": whole, "exported": program, "compiled": compiled}, time.perf_counter() - began


def measure_case(case: Case, device: torch.device, pairs: int, *, quick: bool) -> dict[str, Any]:
    """Measure predictions against stems, other forms against predictions, and drawn chains against drawn predictions."""
    torch.manual_seed(0)
    repeat = 1 if quick else case.repeat
    rule: Any
    rule, batch = noprop_step.make(noprop_step.Case(case.network, "mnist", case.batch, 1), device, 2 if quick else case.batch)
    rule.eval()
    inputs, generator = batch.inputs, torch.Generator(device)

    def paired(ours: Callable[[], Any], other: Callable[[], Any], target: float | None = None, count: int = repeat) -> dict[str, Any]:
        one, two = (measure.timed(work, device, repeat=count) for work in (ours, other))
        measure.interleaved(one, two, 1)
        return measure.compared(measure.interleaved(one, two, pairs), target)

    own = predicting(lambda x: rule.predict(x, generator), inputs)
    found = {"predict": paired(own, stems(rule, inputs), TARGET if case.target else None)}
    forms, seconds = ways(rule, inputs)
    found |= {name: paired(predicting(form, inputs), own) for name, form in forms.items()}

    def apart() -> None:
        for _ in range(DRAWS):
            rule.last(rule.views(inputs), rule.noise(generator, "class-sampled"))

    found["sample"] = paired(lambda: rule.sample(inputs, DRAWS, generator), torch.no_grad()(apart), None, max(1, repeat // 10))
    return {"batch": len(inputs), "T": rule.config.T, "compile_seconds": seconds, "pairs": found}


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = measure.Benchmark("noprop_inference", __doc__, pairs=11)
    options = benchmark.start(arguments)
    results = {
        str(case): measure_case(case, benchmark.device, options.pairs, quick=options.quick)
        for case in CASES[: 1 if options.quick else None]
    }
    print("predict (ours) against one pass through the stems (bare); its other forms (ours) against predict (bare)")
    measure.show_ratios({f"{label}, {way}": found for label, result in results.items() for way, found in result["pairs"].items()})
    benchmark.finish({"cases": results})


if __name__ == "__main__":
    main()
