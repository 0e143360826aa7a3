"""Time of a forward gradient's credit in forward passes of the same network. Targets: 3.3 (activities), 2.5 (local, blockwise).

(a) MLP 784-1024-1024-10, batch 64, one direction. A step is ``rule.credit``: noise, derivative, loss, ``.grad``; dropping the old
``.grad`` and the optimiser's step are not in it. It is counted in forward passes of the same network object on the same batch,
without a graph. Two ways:

- *mixed*, the headline: rounds of all variants and the forward pass in a new random order, the ratio within each round. Each step
  then meets caches that another one left, with the same weights, as between the steps of a training; so does the forward pass.
- *hot*: each variant several times in succession, then the forward pass as often. It flatters whatever fits into the caches, and
  the forward pass most.

Two matrix products per layer, forwards and for the weights' gradient, are already about 2 forward passes, which is the floor of
local losses; with the derivative through the layers behind the first noise it is about 2.6.

(b) K directions at once (``together``, by ``vmap``) against one by one, for this MLP and a small convolutional network.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import measure
import torch
from bpfree_forward_gradient.options import ForwardGradientConfig, LocalForwardGradientConfig
from bpfree_forward_gradient.rules import ForwardGradient, LocalBackprop, LocalForwardGradient
from measure import Cost
from torch.func import functional_call, jvp

from bpfree import Batch, Network, Rule, TaskSpec
from bpfree.baselines import Backprop
from bpfree.cli.output import print_table
from bpfree.network.builders import MLPConfig, VGGConfig, mlp, vgg
from bpfree.training.stepper import new_step

VECTORS, IMAGES = TaskSpec("vectors", (784,), 10), TaskSpec("images", (3, 32, 32), 10)
WIDTHS, CHANNELS, BATCH = [1024, 1024], [32, 64], 64
ROUNDS, HOT = 100, 10
FORWARD = "forward"
Work = Callable[[], Any]


@dataclass(frozen=True)
class Figure:
    """What is hoped for, and what the matrix products alone take, in forward passes."""

    target: float | None = None
    floor: float | None = None


FIGURES = {
    "activities, rademacher": Figure(3.3, 2.6),
    "activities, gaussian": Figure(3.3, 2.6),
    "local blockwise, rademacher": Figure(2.5, 2.0),
    "local blockwise, gaussian": Figure(2.5, 2.0),
}


def make_batch(spec: TaskSpec, count: int, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(count, *spec.input_shape, generator=generator), torch.randint(spec.outputs, (count,), generator=generator)
    return Batch(inputs.to(device), targets.to(device))


# --- the steps ----------------------------------------------------------------------------------------------------------


def credit(rule: Rule, batch: Batch) -> Work:
    """Return the rule's own part of a step, with new noise in each call."""
    step = new_step(rule)

    def work() -> None:
        rule.credit(batch, step)
        step.index += 1

    return work


def plain_jvp(network: Network, spec: TaskSpec, batch: Batch) -> Work:
    """Return the forward gradient of Baydin et al. (2022): noise v on all weights, ``(dL/dv) v`` as their gradient."""
    members = dict(network.named_parameters())
    values = {name: parameter.detach() for name, parameter in members.items()}

    def work() -> None:
        directions = {name: torch.randn_like(value) for name, value in values.items()}
        derivative = jvp(lambda moved: spec.loss(functional_call(network, moved, (batch.inputs,)), batch), (values,), (directions,))[1]
        for name, parameter in members.items():
            parameter.grad = derivative * directions[name]

    return work


def steps(network: Network, spec: TaskSpec, batch: Batch) -> dict[str, Work]:
    """Return the steps of all variants, on the same weights."""

    def forward() -> None:
        with torch.no_grad():
            network(batch.inputs)

    def whole(**options: Any) -> Work:
        return credit(ForwardGradient(network, spec, ForwardGradientConfig(tangents=1, **options)).to(batch.inputs.device), batch)

    def local(**options: Any) -> Work:
        config = LocalForwardGradientConfig(tangents=1, group_size=8, **options)
        return credit(LocalForwardGradient(network, spec, config).to(batch.inputs.device), batch)

    return {
        FORWARD: forward,
        "backprop": credit(Backprop(network, spec), batch),
        "plain jvp, weights": plain_jvp(network, spec, batch),
        "weights, gaussian": whole(perturb="weights", noise="gaussian"),
        "weights, rademacher": whole(perturb="weights", noise="rademacher"),
        "activities, gaussian": whole(noise="gaussian"),
        "activities, rademacher": whole(noise="rademacher"),
        "local blockwise, gaussian": local(losses="blockwise", noise="gaussian"),
        "local blockwise, rademacher": local(losses="blockwise", noise="rademacher"),
        "local groupwise, gaussian": local(losses="all", noise="gaussian"),
        "local groupwise, rademacher": local(losses="all", noise="rademacher"),
        "local-backprop": credit(LocalBackprop(network, spec).to(batch.inputs.device), batch),
    }


def after_dropping(work: Work, network: Network, device: torch.device) -> Callable[[], Cost]:
    """Wrap a step to return its cost; the old ``.grad`` is dropped before the step."""
    parameters = list(network.parameters())
    once = measure.timed(work, device)

    def run() -> Cost:
        for parameter in parameters:
            parameter.grad = None
        return once()

    return run


# --- (a) in forward passes ----------------------------------------------------------------------------------------------


def mixed(arms: dict[str, Callable[[], Cost]], rounds: int, chance: random.Random) -> list[dict[str, Cost]]:
    """Measure the costs by variant, round by round, each round in a new order."""
    results = []
    for _ in range(rounds):
        order = list(arms)
        chance.shuffle(order)
        results.append({name: arms[name]() for name in order})
    return results


def hot(arms: dict[str, Callable[[], Cost]], rounds: int) -> list[dict[str, Cost]]:
    """Measure the costs by variant, each several times in succession after a warm-up, followed by the forward pass."""
    results = []
    for _ in range(rounds):
        found: dict[str, list[Cost]] = {}
        for name, arm in arms.items():
            arm()
            found[name] = [arm() for _ in range(HOT)]
        results += [{name: costs[index] for name, costs in found.items()} for index in range(HOT)]
    return results


def in_forward_passes(repetitions: Sequence[Sequence[dict[str, Cost]]], name: str) -> dict[str, Any]:
    """Return the median of a variant's ratios over all rounds, and the medians of each repetition."""
    ratios = [[found[name].wall / found[FORWARD].wall for found in rounds] for rounds in repetitions]
    every = [found for rounds in repetitions for found in rounds]
    return {
        "median_ratio": statistics.median(ratio for part in ratios for ratio in part),
        "median_ratio_of_repetitions": [statistics.median(part) for part in ratios],
        "median_processor_ratio": statistics.median(found[name].processor / found[FORWARD].processor for found in every),
        "median_seconds": statistics.median(found[name].wall for found in every),
    }


def costs(device: torch.device, repetitions: int, rounds: int, width: Sequence[int], count: int) -> dict[str, Any]:
    """Measure the costs by variant in both ways."""
    torch.manual_seed(0)
    network = mlp(VECTORS, MLPConfig(widths=list(width))).to(device)
    works = steps(network, VECTORS, make_batch(VECTORS, count, device))
    arms = {name: after_dropping(work, network, device) for name, work in works.items()}
    chance = random.Random(0)
    mixed(arms, 3, chance)
    ways = {
        "mixed": [mixed(arms, rounds, chance) for _ in range(repetitions)],
        "hot": [hot(arms, max(1, rounds // HOT)) for _ in range(repetitions)],
    }
    results = {}
    for name in works:
        figure = FIGURES.get(name, Figure())
        found: dict[str, Any] = {way: in_forward_passes(rounds_of_way, name) for way, rounds_of_way in ways.items()}
        reached = None if figure.target is None else found["mixed"]["median_ratio"] <= figure.target
        results[name] = found | {"target_ratio": figure.target, "floor_ratio": figure.floor, "reached": reached}
    return {"rounds": rounds, "repetitions": repetitions, "variants": results}


def show_costs(results: dict[str, Any]) -> None:
    headers = ("step", "ms", "forward passes", "of repetitions", "processor", "hot", "floor", "target")
    rows = []
    for name, result in results["variants"].items():
        found, parts = result["mixed"], result["mixed"]["median_ratio_of_repetitions"]
        floor, target = result["floor_ratio"], result["target_ratio"]
        rows.append(
            [
                name,
                f"{1000 * found['median_seconds']:.2f}",
                f"{found['median_ratio']:.2f}",
                f"{min(parts):.2f} to {max(parts):.2f}",
                f"{found['median_processor_ratio']:.2f}",
                f"{result['hot']['median_ratio']:.2f}",
                "" if floor is None else f"{floor:g}",
                "" if target is None else f"<= {target:g}",
            ]
        )
    print_table(headers, rows, right=range(1, 8))


# --- (b) several directions ---------------------------------------------------------------------------------------------


def directions(device: torch.device, pairs: int, counts: Sequence[int], *, quick: bool) -> dict[str, dict[str, Any]]:
    """Compare all directions at once with one by one."""
    torch.manual_seed(0)
    networks = {
        "mlp": (VECTORS, mlp(VECTORS, MLPConfig(widths=[16, 16] if quick else WIDTHS))),
        "vgg": (IMAGES, vgg(IMAGES, VGGConfig(channels=[2, 4] if quick else CHANNELS, pool_after=[1, 2], norm="none"))),
    }
    results = {}
    for label, (spec, network) in networks.items():
        network.to(device)
        batch = make_batch(spec, 4 if quick else BATCH, device)
        for rule, config in ((ForwardGradient, ForwardGradientConfig), (LocalForwardGradient, LocalForwardGradientConfig)):
            for count in counts:
                made = [rule(network, spec, config(tangents=count, together=together)).to(device) for together in (True, False)]
                arms = [after_dropping(credit(one, batch), network, device) for one in made]
                measure.interleaved(arms[0], arms[1], 1)
                compared = measure.compared(measure.interleaved(arms[0], arms[1], pairs), 1.0)
                results[f"{label}, {'local' if rule is LocalForwardGradient else 'global'}, K={count}"] = compared | {"batch": len(batch)}
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = measure.Benchmark("forward_gradient_step", __doc__, pairs=11)
    benchmark.parser.add_argument("--repetitions", type=int, default=5, help=f"repetitions of {ROUNDS} rounds each (default 5)")
    benchmark.parser.add_argument("--only", choices=["cost", "directions"], help="measure only this part")
    options = benchmark.start(arguments)
    results: dict[str, Any] = {}
    if options.only != "directions":
        sizes = (1, 2, [16, 16], 8) if options.quick else (options.repetitions, ROUNDS, WIDTHS, BATCH)
        results["cost"] = costs(benchmark.device, *sizes)
        show_costs(results["cost"])
    if options.only != "cost":
        results["directions"] = directions(benchmark.device, options.pairs, (2,) if options.quick else (4, 16), quick=options.quick)
        print("\ndirections together (ours) against one by one (bare)")
        measure.show_ratios(results["directions"])
    benchmark.finish(results)


if __name__ == "__main__":
    main()
