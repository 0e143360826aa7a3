"""Steps and predictions with and without flushing denormals, on a network whose weights have decayed. Target: not slower.

Weight decay takes the weights of units that never fire below 1.2e-38, the smallest normal number of float32. After twelve epochs of
NoProp-CT on MNIST (paper's block, Adam with weight decay 0.001) up to 34 % of a layer's weights are there. Here a hundredth of each weight
of a fresh block is set so, at random, and ``credit`` (batch 128) and a prediction (1000 images, 20 steps) are timed in pairs: as the
trainer does it, and with denormals as they are. On a CPU only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import measure
import torch

from bpfree import Batch
from bpfree.config import parse_words, resolve
from bpfree.rule import Rule
from bpfree.training.stepper import new_step

SHARE, TINY = 0.01, 1e-40


def decayed(share: float) -> Rule:
    """Build NoProp-CT with the paper's block, with a share of its weights denormal."""
    recipe = resolve(parse_words(["rule=noprop-ct", "rule.validation_steps=20", "task=mnist", "network=noprop-timed-paper"]))
    rule = recipe.build_rule(recipe.registry.get("tasks", "mnist").spec(recipe.options["task"], None))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in (p for p in rule.network.parameters() if p.dim() > 1):
            chosen = torch.rand(weight.shape, generator=generator) < share
            weight[chosen] = TINY * (1 + torch.rand(int(chosen.sum()), generator=generator))
    return rule


def flushing(work: Callable[[], object], *, on: bool) -> Callable[[], None]:
    """Wrap ``work`` to run with denormals flushed, or unchanged."""

    def run() -> None:
        torch.set_flush_denormal(on)
        work()
        torch.set_flush_denormal(False)

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = measure.Benchmark("denormals", __doc__, pairs=7)
    options = benchmark.start(arguments)
    examples, batch_size = (10, 4) if options.quick else (1000, 128)
    torch.manual_seed(0)
    rule = decayed(SHARE)
    images = torch.randn(examples, *rule.spec.input_shape)
    batch = Batch(images[:batch_size], torch.randint(rule.spec.outputs, (len(images[:batch_size]),)))
    step, generator = new_step(rule), torch.Generator()

    def credit() -> None:
        rule.train()
        rule.credit(batch, step)
        rule.zero_grad()

    def predict() -> None:
        rule.eval()
        with torch.no_grad(), rule.quick_predictions():
            rule.predict(images, generator)

    results = {}
    for name, work in (("credit", credit), ("predict", predict)):
        ours, bare = (measure.timed(flushing(work, on=on), benchmark.device) for on in (True, False))
        measure.interleaved(ours, bare, 1)
        results[name] = measure.compared(measure.interleaved(ours, bare, options.pairs), 1.0)
    measure.show_ratios(results)
    benchmark.finish({"share": SHARE, "flushes": torch.set_flush_denormal(False), "cases": results})


if __name__ == "__main__":
    main()
