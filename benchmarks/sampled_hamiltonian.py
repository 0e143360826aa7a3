"""Errors of learned energies: medians over seeds of u-swim, a-swim, swim and elm, of controls, of scaled elm and of cubic monomials.

    python benchmarks/sampled_hamiltonian.py --only pendulum henon-heiles

Each seed draws its own states (``task.data_seed``) and weights. One scale of elm is chosen for all seeds of a system, by the energy error
on validation states of the first seed. Monomials of degree 1 to 3, solved for in the same way, have no units at all. Everything is closed
form, so values are those of any machine; seconds are of this one, and only their ratios within one run say anything.
"""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import measure
import torch
from bpfree_sampled.network import HNNConfig, hnn
from bpfree_sampled.rule import Sampled, SampledConfig
from bpfree_sampled.systems import turned
from bpfree_sampled.task import HAMILTONIAN, HamiltonianConfig, HamiltonianSpec
from torch import Tensor

from bpfree import BudgetConfig, Split, Task, TrainConfig, Trainer

CASES: dict[str, dict[str, Any]] = {
    "pendulum": {"equations": "pendulum", "examples": 2000, "width": 500},
    "pendulum p 1": {"equations": "pendulum", "box": [-6.283185307179586, 6.283185307179586, -1.0, 1.0], "examples": 2000, "width": 500},
    "henon-heiles": {"equations": "henon-heiles", "examples": 2000, "width": 1000},
    "lotka-volterra": {"equations": "lotka-volterra", "examples": 2000, "width": 500},
    "double-pendulum": {"equations": "double-pendulum", "examples": 2000, "width": 1000},
}
ROWS: dict[str, dict[str, Any]] = {
    "u-swim": {},
    "a-swim": {"sampling": "a-swim"},
    "swim (true energies)": {"sampling": "swim"},
    "elm": {"sampling": "elm"},
    "elm, scale chosen": {"sampling": "elm", "scale": None},
    "u-swim, directions rotated": {"control": "rotated"},
    "u-swim, biases permuted": {"control": "permuted"},
    "u-swim in float32": {"precision": "float32"},
}
SCALES = (0.01, 0.03, 0.1, 0.2, 0.5)


def task_of(case: Mapping[str, Any], seed: int) -> Task:
    options = {key: value for key, value in case.items() if key != "width"}
    return Task.from_source(HAMILTONIAN, HamiltonianConfig(**options, data_seed=seed, rollout=0))


def errors_of(task: Task, width: int, seed: int, options: Mapping[str, Any]) -> dict[str, float]:
    """Train once, and return the energy errors on validation and test states, and the seconds of processor time."""
    torch.manual_seed(seed)
    dtype = options.get("precision", "float64")
    rule = Sampled(hnn(task.spec, HNNConfig(width=width, dtype=dtype)), task.spec, SampledConfig(**options))
    run = Trainer(rule, task, TrainConfig(seed=seed, budget=BudgetConfig(epochs=1), device="cpu", threads=1)).fit()
    result = run.result
    return {
        "validation": run.history[-1]["val/energy_error"],
        "test": result["test/energy_error"],
        "field": result["test/field_error"],
        "seconds": result["train/processor_seconds"],
    }


def monomials(x: Tensor) -> Tensor:
    """Return all products (N, F) of one, two or three coordinates (N, D)."""
    size = x.shape[1]
    one = x
    two = torch.stack([x[:, i] * x[:, j] for i in range(size) for j in range(i, size)], 1)
    three = torch.stack([x[:, i] * x[:, j] * x[:, k] for i in range(size) for j in range(i, size) for k in range(j, size)], 1)
    return torch.cat([one, two, three], 1)


def cubic_error(task: Task) -> float:
    """Return the energy error of the monomials whose field fits best."""
    spec, train, test = task.spec, task.train, task.test
    assert isinstance(spec, HamiltonianSpec)
    assert isinstance(train, Split)
    assert isinstance(test, Split)
    assert train.targets is not None
    assert test.targets is not None
    jacobian = torch.func.vmap(torch.func.jacfwd(lambda x: monomials(x[None])[0]))(train.inputs).transpose(1, 2)  # (N, D, F)
    rows = turned(jacobian.transpose(1, 2)).transpose(1, 2).flatten(0, 1)
    weight = torch.linalg.lstsq(rows, train.targets[:, 1:].reshape(-1, 1), driver="gelsd").solution
    made = (monomials(test.inputs) @ weight)[:, 0] + spec.origin_energy
    return float((made - test.targets[:, 0]).norm() / test.targets[:, 0].norm())


def summary(values: list[dict[str, float]]) -> dict[str, float]:
    return {
        "energy_error": statistics.median(each["test"] for each in values),
        "least": min(each["test"] for each in values),
        "most": max(each["test"] for each in values),
        "field_error": statistics.median(each["field"] for each in values),
        "processor_seconds": statistics.median(each["seconds"] for each in values),
        "seeds": len(values),
        "energy_errors": [each["test"] for each in values],
    }


def measured(case: Mapping[str, Any], seeds: int, rows: list[str]) -> dict[str, Any]:
    width, tasks = case["width"], [task_of(case, seed) for seed in range(seeds)]
    found: dict[str, Any] = {"settings": dict(case), "rows": {}}
    for row in rows:
        options = dict(ROWS[row])
        if options.get("scale", 0) is None:
            tried = {scale: errors_of(tasks[0], width, 0, {**options, "scale": scale})["validation"] for scale in SCALES}
            options["scale"] = min(tried, key=tried.__getitem__)
            found["scales"] = {str(scale): error for scale, error in tried.items()}
        found["rows"][row] = summary([errors_of(task, width, seed, options) for seed, task in enumerate(tasks)]) | {"options": options}
        print(f"{case['equations']:16} {row:28} {found['rows'][row]['energy_error']:.2e}", flush=True)
    found["rows"]["cubic monomials"] = {"energy_error": statistics.median(map(cubic_error, tasks)), "seeds": seeds}
    print(f"{case['equations']:16} {'cubic monomials':28} {found['rows']['cubic monomials']['energy_error']:.2e}", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = measure.Benchmark("sampled_hamiltonian", __doc__)
    benchmark.parser.add_argument("--only", nargs="+", default=list(CASES), choices=list(CASES), help="cases; others stay in the file")
    benchmark.parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), help="rows")
    benchmark.parser.add_argument("--seeds", type=int, default=10)
    options = benchmark.start(arguments)
    logging.disable(logging.WARNING)
    cases, seeds = {name: CASES[name] for name in options.only}, options.seeds
    if options.quick:
        cases, seeds = {"pendulum": {"equations": "pendulum", "examples": 60, "test_examples": 20, "width": 20}}, 1
    path = None if options.save is None else options.save / f"sampled_hamiltonian-{benchmark.device.type}.json"
    found = json.loads(path.read_text(encoding="utf-8"))["results"] if path is not None and path.exists() else {}
    for name, case in cases.items():
        found[name] = measured(case, seeds, options.rows)
        benchmark.finish(found)


if __name__ == "__main__":
    main()
