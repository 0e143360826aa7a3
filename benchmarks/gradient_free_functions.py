"""SNES beside EvoTorch's, and CMA-ES as a rival, on functions of 1000 numbers: what is reached at equal evaluations, and the time of each.

    python benchmarks/gradient_free_functions.py --evotorch FOLDER

FOLDER is where ``pip install --no-deps --target FOLDER evotorch gymnasium cma`` (with their dependencies, where they are missing) has put
EvoTorch. Rule ``evolution`` with ``step_size=separable`` on a network that is a point, against ``evotorch.algorithms.SNES``: the same
population, start, first deviation, utilities and rates, in one process and in turns. Over seeds the values reached should be equal within
two standard errors, and an evaluation is to take at most 0.8 of the time. ``cma`` has a diagonal covariance (``CMA_diagonal``), since the
full one of 1000 numbers takes most of its time for decompositions. Without ``--evotorch`` ours runs alone.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import torch
from bpfree_gradient_free.evolution import Evolution, EvolutionConfig
from torch import Tensor, nn

from bpfree import Batch, Network, Stepper, TaskSpec
from bpfree.cli.output import print_table

SIZE, POPULATION, GENERATIONS, SEEDS, TARGET = 1000, 200, 300, 10, 0.8
SIGMA = {"sphere": 1.0, "rosenbrock": 0.1}


def sphere(points: Tensor) -> Tensor:
    return points.square().sum(-1)


def rosenbrock(points: Tensor) -> Tensor:
    first, second = points[..., :-1], points[..., 1:]
    return (100 * (second - first.square()).square() + (1 - first).square()).sum(-1)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"sphere": sphere, "rosenbrock": rosenbrock}


@dataclass(frozen=True)
class Function(TaskSpec):
    """A task whose loss is a function of the network's one output."""

    function: Any = None

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        found: Tensor = self.function(outputs[0])
        return found


class Point(nn.Module):
    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(start.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.expand(len(x), -1)


def start_of(name: str, size: int, seed: int) -> Tensor:
    """Draw where a search begins: around 1 for the sphere, around 0 for Rosenbrock's function."""
    generator = torch.Generator().manual_seed(seed)
    return float(name == "sphere") + 0.1 * torch.randn(size, generator=generator)


class Ours:
    """The rule, with a step for each generation."""

    def __init__(self, name: str, size: int, population: int, seed: int) -> None:
        self.network = Network({"point": Point(start_of(name, size, seed))}, input_shape=(1,), readout="point")
        spec = Function("function", (1,), size, targets="none", function=FUNCTIONS[name])
        config = EvolutionConfig(population=population, antithetic=False, step_size="separable", sigma=SIGMA[name])
        self.stepper, self.batch = Stepper(Evolution(self.network, spec, config), seed=seed), Batch(torch.zeros(1, 1))

    def take(self) -> None:
        self.stepper.take(self.batch)

    def mean(self) -> Tensor:
        return next(self.network.parameters()).detach()


class Theirs:
    """EvoTorch's SNES."""

    def __init__(self, name: str, size: int, population: int, seed: int) -> None:
        from evotorch import Problem
        from evotorch.algorithms import SNES
        from evotorch.decorators import vectorized

        problem = Problem("min", vectorized(FUNCTIONS[name]), solution_length=size, initial_bounds=(-1, 1), seed=seed)
        self.search = SNES(problem, stdev_init=SIGMA[name], popsize=population, center_init=start_of(name, size, seed))

    def take(self) -> None:
        self.search.step()

    def mean(self) -> Tensor:
        return self.search.status["center"]  # type: ignore[no-any-return]


class Cma:
    """pycma with a diagonal covariance."""

    def __init__(self, name: str, size: int, population: int, seed: int) -> None:
        import cma

        options = {"popsize": population, "seed": seed + 1, "CMA_diagonal": True, "verbose": -9}
        self.search = cma.CMAEvolutionStrategy(start_of(name, size, seed).double().numpy(), SIGMA[name], options)
        self.function = FUNCTIONS[name]

    def take(self) -> None:
        points = self.search.ask()
        self.search.tell(points, self.function(torch.tensor(points)).tolist())

    def mean(self) -> Tensor:
        return torch.as_tensor(self.search.mean)


def reached(kind: Callable[..., Any], name: str, size: int, population: int, generations: int, seeds: int) -> list[float]:
    """Return the value at the mean after all generations, for each seed."""
    found = []
    for seed in range(seeds):
        search = kind(name, size, population, seed)
        for _ in range(generations):
            search.take()
        found.append(float(FUNCTIONS[name](search.mean())))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = measure.Benchmark("gradient_free_functions", __doc__, pairs=15)
    benchmark.parser.add_argument("--evotorch", type=Path, metavar="FOLDER", help="where EvoTorch and cma were installed")
    benchmark.parser.add_argument("--seeds", type=int, default=SEEDS)
    benchmark.parser.add_argument("--generations", type=int, default=GENERATIONS)
    benchmark.parser.add_argument("--without-cma", action="store_true", help="leave out cma, which takes ten times as long")
    options = benchmark.start(arguments)
    size, population = (20, 10) if options.quick else (SIZE, POPULATION)
    generations, seeds = (10, 2) if options.quick else (options.generations, options.seeds)
    kinds: dict[str, Any] = {"ours": Ours}
    if options.evotorch is not None:
        sys.path.append(str(options.evotorch))
        kinds |= {"EvoTorch": Theirs} if options.without_cma else {"EvoTorch": Theirs, "cma": Cma}
    values: dict[str, dict[str, list[float]]] = {}
    speed: dict[str, Any] = {}
    for name in FUNCTIONS:
        values[name] = {kind: reached(made, name, size, population, generations, seeds) for kind, made in kinds.items()}
        for other in [kind for kind in kinds if kind != "ours"]:
            works = [measure.timed(kinds[kind](name, size, population, 0).take, benchmark.device, repeat=5) for kind in ("ours", other)]
            for work in works:
                work()
            pairs = measure.interleaved(works[0], works[1], options.pairs)
            speed[f"{other}, {name}"] = measure.compared(pairs, TARGET if other == "EvoTorch" else None)
    rows = [
        [name, kind, f"{statistics.mean(found):.4g}", f"{statistics.stdev(found) / math.sqrt(seeds):.2g}", str(seeds)]
        for name, by_kind in values.items()
        for kind, found in by_kind.items()
    ]
    print_table(["function", "search", "value", "standard error", "seeds"], rows, right=range(2, 5))
    if speed:
        measure.show_ratios(speed)
    benchmark.finish({"values": values, "speed": speed, "size": size, "population": population, "generations": generations})


if __name__ == "__main__":
    main()
