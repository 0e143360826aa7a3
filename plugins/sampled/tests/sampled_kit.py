"""Small tasks and rules of the plugin's tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from bpfree_sampled.network import HNNConfig, hnn
from bpfree_sampled.rule import Sampled, SampledConfig
from bpfree_sampled.task import HAMILTONIAN, HamiltonianConfig

from bpfree import Batch, BudgetConfig, Network, Stepper, Task, TaskSpec, TrainConfig, Trainer
from bpfree.network import MLPConfig, mlp


def system(equations: str = "pendulum", **options: Any) -> Task:
    """A system with few states, whose trajectories are not followed unless asked."""
    options = {"examples": 200, "validation_examples": 0, "test_examples": 200, "rollout": 0, **options}
    return Task.from_source(HAMILTONIAN, HamiltonianConfig(equations=equations, **options))  # type: ignore[arg-type]


def energy_rule(task: Task, width: int = 60, network: Mapping[str, Any] | None = None, **options: Any) -> Sampled:
    torch.manual_seed(0)
    built = hnn(task.spec, HNNConfig(width=width, **(network or {})))
    return Sampled(built, task.spec, SampledConfig(**options))


def plain_network(spec: TaskSpec, activation: str = "tanh", widths: tuple[int, ...] = (40,), dtype: torch.dtype = torch.float64) -> Network:
    torch.manual_seed(0)
    made = mlp(spec, MLPConfig(widths=list(widths), activation=activation))  # type: ignore[arg-type]
    return made.to(dtype)


def trained(rule: Sampled, task: Task, batch_size: int = 64) -> dict[str, float]:
    """Train for one pass, and return the result."""
    config = TrainConfig(budget=BudgetConfig(epochs=1), batch_size=batch_size, device="cpu")
    return Trainer(rule, task, config).fit().result


def solved(rule: Sampled, inputs: torch.Tensor, targets: torch.Tensor, *, sampled: bool = True) -> Sampled:
    """Sample (unless the hidden units are to stay) and solve, in a loop of one's own."""
    if not sampled:
        rule.freeze_features()
    from bpfree import Split

    stepper = Stepper(rule)
    if sampled:
        stepper.prepare(Split(inputs, targets))
    for phase in rule.phases(None):  # type: ignore[arg-type]
        with stepper.phase(phase):
            stepper.take(Batch(inputs, targets))
            rule.end_phase(phase, stepper.step)
    return rule.eval()
