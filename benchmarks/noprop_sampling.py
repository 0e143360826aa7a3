"""What NoProp-DT's sampled chains draw, and what stopping early costs, on trained networks: ``noprop-cnn``, T = 10, two epochs of MNIST.

Three questions, on validation (6,000 examples) and test, five draws of each chain.

- If the first block's beliefs ``p_1(y|x)`` were exact, a chain that draws classes (``class-sampled``) would be right as often as the mean
  probability of the true class. Is it?
- Eq. 3 with the mean of a belief (``sampled``, the paper) is underdispersed. Is it as much as exact blocks with these beliefs would be?
  That is computed: ``p(y|x, z) = softmax(log p_1(y|x) + z sqrt(abar) / (1 - abar))`` for each state, by the same chain.
- Early exit without a loss on validation: time of ``predict`` against the whole chain, in batches of 1,000 and of one; the blocks and
  operations are in the result of each run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import measure
import torch
from bpfree_noprop.dt import NoPropDT, NoPropDTConfig
from torch import Tensor

import bpfree
from bpfree.cli.output import print_table
from bpfree.tasks.task import Examples, Task

EPOCHS, BATCH, DRAWS, AT_ONCE = 2, 128, 5, 1000
SINGLE = 64
"""Images that are predicted one by one for their time."""


def trained(task: Task, seed: int, *, T: int, epochs: int) -> tuple[NoPropDT, dict[str, float]]:
    """Train a network; returns the rule in eval mode, and the run's result."""
    torch.manual_seed(seed)
    config = NoPropDTConfig(T=T, early_exit=0.0)
    rule = NoPropDT(bpfree.build_network("noprop-cnn", task.spec, blocks=T), task.spec, config)
    settings = bpfree.TrainConfig(
        budget=bpfree.BudgetConfig(epochs=epochs), batch_size=BATCH, seed=seed, device="cpu", threads=1, select="last"
    )
    run = bpfree.Trainer(rule, task, settings).fit()
    keys = ("train/", "calibration", "test/")
    return rule.eval(), {key: value for key, value in run.result.items() if key.startswith(keys)}


@torch.no_grad()
def chains(rule: NoPropDT, data: Examples, seed: int) -> dict[str, float]:
    """Score a split: shares of right classes, and mean probabilities of the true class."""
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, float] = {}

    def add(name: str, values: Tensor) -> None:
        sums[name] = sums.get(name, 0.0) + float(values.double().sum())

    for places in torch.arange(len(data)).split(AT_ONCE):
        raw, labels = data.batch(places)
        assert labels is not None
        x = rule.spec.normalise(raw)
        views = rule.views(x)
        first = rule.ask(views[0], rule.start(x, generator))
        add("t1: mean probability of the true class", first.softmax(1).gather(1, labels[:, None]))
        add("t1: right", first.argmax(1) == labels)
        exact = first.double().log_softmax(1)

        def judged(t: int, z: Tensor, exact: Tensor = exact) -> Tensor:
            abar = rule.schedule.abar[t - 1].double()
            return exact + z * abar.sqrt() / (1 - abar)

        def learned(t: int, z: Tensor, views: Sequence[Any] = views) -> Tensor:
            return rule.ask(views[t - 1], z)

        add("mean path", rule.last(views, None).argmax(1) == labels)
        for kind in ("sampled", "class-sampled"):
            for _ in range(DRAWS):
                add(kind, walked(rule, learned, x, kind, generator).argmax(1) == labels)
                add(f"{kind}, exact blocks with the beliefs of t1", walked(rule, judged, exact, kind, generator).argmax(1) == labels)
    drawn = ("sampled", "class-sampled")
    return {name: total / len(data) / (DRAWS if name.startswith(drawn) else 1) for name, total in sums.items()}


def walked(rule: NoPropDT, judge: Callable[[int, Tensor], Tensor], like: Tensor, kind: Any, generator: torch.Generator) -> Tensor:
    """Return the last state (N, d) of a chain whose outputs are a function of the block and the state."""
    noise = rule.noise(generator, kind)
    z = rule.first(like, noise)
    for t in range(1, rule.config.T + 1):
        z = rule.advance(z, judge(t, z), t, noise)
    return z


@torch.no_grad()
def stopping(rule: NoPropDT, data: Examples, pairs: int) -> dict[str, Any]:
    """Time predictions that stop early against the whole chain, in large batches and one by one."""
    raw, _ = data.batch(torch.arange(min(AT_ONCE, len(data))))
    x, generator, found = rule.spec.normalise(raw), torch.Generator(), {}
    for name, batches in (("batch", [x]), ("single images", list(x[:SINGLE].split(1)))):

        def early(batches: Sequence[Tensor] = batches) -> None:
            for batch in batches:
                rule.predict(batch, generator)

        def whole(batches: Sequence[Tensor] = batches) -> None:
            for batch in batches:
                rule.last(rule.views(batch), None)

        one, two = (measure.timed(work, torch.device("cpu")) for work in (early, whole))
        measure.interleaved(one, two, 1)
        found[name] = measure.compared(measure.interleaved(one, two, pairs), None) | {"examples": sum(map(len, batches))}
    return found


def table(seeds: Sequence[dict[str, Any]], split: str) -> list[list[str]]:
    """Return rows of means over seeds, in per cent."""
    names = seeds[0][split]
    return [[name, *(f"{100 * seed[split][name]:.2f}" for seed in seeds), f"{mean(seeds, split, name):.2f}"] for name in names]


def mean(seeds: Sequence[dict[str, Any]], split: str, name: str) -> float:
    return 100 * statistics.fmean(seed[split][name] for seed in seeds)


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = measure.Benchmark("noprop_sampling", __doc__, pairs=7)
    benchmark.parser.add_argument("--seeds", type=int, default=3, help="networks (default 3)")
    options = benchmark.start(arguments)
    spec = bpfree.TaskSpec("synthetic", (1, 28, 28), 10)
    task = measure.synthetic_task(spec, train=256) if options.quick else bpfree.load_task("mnist")
    assert task.validation is not None
    seeds = []
    for seed in range(1 if options.quick else options.seeds):
        rule, result = trained(task, seed, T=2 if options.quick else 10, epochs=1 if options.quick else EPOCHS)
        scores = {"validation": chains(rule, task.validation, seed), "test": chains(rule, task.test, seed)}
        seeds.append({"seed": seed, **scores, "early_exit": stopping(rule, task.test, options.pairs), "result": result})
    for split in ("validation", "test"):
        print(f"{split}, % (each seed, mean)")
        print_table(["", *(f"seed {each['seed']}" for each in seeds), "mean"], table(seeds, split), right=range(1, len(seeds) + 2))
    print("predict with early exit (ours) against the whole chain (bare), on test")
    measure.show_ratios({f"seed {each['seed']}, {name}": found for each in seeds for name, found in each["early_exit"].items()})
    benchmark.finish({"epochs": EPOCHS, "batch": BATCH, "draws": DRAWS, "seeds": seeds})


if __name__ == "__main__":
    main()
