"""SoftHebb's update of the published CIFAR layers against a forward and a weight-gradient convolution.

The three layers (96, 384 and 1536 channels on 32x32, 16x16 and 8x8 maps), batches of 10, as published. *Update*: the layer's
pre-activations, the competition, the increment, its normalisation with each unit's rate, the metrics, and the optimiser's step. *Bare*: the
same two convolutions and nothing else. Target: at most 1.5, summed over the layers; the first alone is dominated by elementwise work. The
whole step of ``rule.learn`` (with batch norms, paddings, activations and poolings) stands beside it, without a target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import measure
import torch
from bpfree_hebbian.networks import CNNConfig, cnn
from bpfree_hebbian.softhebb import SoftHebb
from torch import Tensor, nn

from bpfree import Batch, Budget, Stepper, TaskSpec

SPEC = TaskSpec("cifar", (3, 32, 32), 10)
BATCH, TARGET = 10, 1.5


def sources(rule: SoftHebb, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the input and the output of each layer's convolution."""
    seen = {}
    for name, layer in rule.layers.items():
        x, source, u = layer.execute(x)
        seen[name] = (source, u)
    return seen


def bare(linear: nn.Module, source: Tensor, signal: Tensor) -> Callable[[], None]:
    """Return a function that computes a forward and a weight-gradient convolution."""
    weight: Any = linear.weight

    @torch.no_grad()
    def work() -> None:
        linear(source)
        torch.ops.aten.convolution_backward(signal, source, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False])

    return work


def update(rule: SoftHebb, name: str, source: Tensor, apply: Callable[[str], None]) -> Callable[[], None]:
    """Return a function that computes a layer's whole update from the input of its convolution."""
    layer = rule.layers[name]

    @torch.no_grad()
    def work() -> None:
        rule.learn_layer(layer, source, layer.linear(source))
        apply(name)

    return work


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = measure.Benchmark("hebbian_step", __doc__, pairs=15)
    options = benchmark.start(arguments)
    torch.manual_seed(0)
    rule = SoftHebb(cnn(SPEC, CNNConfig(scale=0.05 if options.quick else 1.0)), SPEC).to(benchmark.device)
    stepper = Stepper(rule)
    step = stepper.step
    batch = Batch(torch.rand(BATCH, 3, 32, 32, device=benchmark.device), None)
    with stepper.phase(next(iter(rule.phases(Budget(epochs=51))))):
        ours, others = [], []
        for name, (source, u) in sources(rule, batch.inputs).items():
            ours.append(update(rule, name, source, step.apply))
            others.append(bare(rule.layers[name].linear, source, u))
        results = {}
        for label, first, second in [
            *((f"layer {number}", [one], [other]) for number, (one, other) in enumerate(zip(ours, others, strict=True), start=1)),
            ("all layers", ours, others),
            ("rule.learn", [lambda: rule.learn(batch, step)], others),
        ]:
            timed = [measure.timed(together(works), benchmark.device) for works in (first, second)]
            for warm in timed:
                warm()
            results[label] = measure.compared(measure.interleaved(*timed, options.pairs), TARGET)
    measure.show_ratios(results)
    print("the target is that of all layers")
    benchmark.finish(results)


def together(works: Sequence[Callable[[], Any]]) -> Callable[[], None]:
    """Return a function that calls the given ones in turn."""

    def work() -> None:
        for part in works:
            part()

    return work


if __name__ == "__main__":
    main()
