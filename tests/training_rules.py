"""Rules and settings that the tests of training share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bpfree import (
    Batch,
    BpfreeError,
    Budget,
    OptimizerConfig,
    Phase,
    Rule,
    Run,
    ScheduleConfig,
    Step,
    Task,
    hookimpl,
)
from bpfree.baselines import DFA, Backprop
from bpfree.network import MLPConfig, mlp
from bpfree.training.config import BudgetConfig, TrainConfig
from bpfree.training.trainer import Trainer

ONE = BudgetConfig(epochs=1)


def rule_on(task: Task, factory: type[Rule] = Backprop, **sizes: Any) -> Rule:
    torch.manual_seed(0)
    return factory(mlp(task.spec, MLPConfig(**{"depth": 2, "width": 32, **sizes})), task.spec)


def config_of(device: torch.device, **options: Any) -> TrainConfig:
    budget = options.pop("budget", BudgetConfig(epochs=3))
    return TrainConfig(**{"device": str(device), "budget": budget, "log_interval": 0.01, **options})


def weights(rule: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in rule.state_dict().items()}


def assert_equal_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def failing(trainer: Trainer, resume: Path | None = None) -> str:
    """Expect the run to fail; returns the message."""
    with pytest.raises(BpfreeError) as caught:
        trainer.fit(resume)
    assert trainer.run.status == "failed"
    assert trainer.run.reason == caught.value.what
    return str(caught.value)


def write_through_data(rule: Rule) -> None:
    """Change a parameter so that its version does not show it."""
    next(rule.parameters()).data.add_(0.01)


class StopAfter:
    """An observer that asks the trainer to stop after this many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.trainer: Trainer | None = None

    @hookimpl
    def step_end(self, run: Run, step: Step) -> None:
        if step.index == self.steps and self.trainer is not None:
            self.trainer.stop("the test asked")


class NoisyPhases(DFA):
    """Uses everything that a checkpoint must hold: both kinds of generator, dropout, batch norm, phases, growth, own groups."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.gain = nn.Parameter(torch.zeros(spec.outputs))

    def phases(self, budget: Budget) -> Iterable[Phase]:
        yield Phase("all", epochs=1)
        yield Phase("readout", epochs=1, groups=("readout", "rule"), batch_size=32, optimizer=OptimizerConfig("sgd", lr=0.05, momentum=0.9))
        yield Phase("grown", epochs=2, reset=("b1",), schedule=ScheduleConfig("cosine"))

    def start_phase(self, phase: Phase) -> None:
        if phase.name == "grown":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(7)
                self.extra = nn.Linear(self.spec.outputs, self.spec.outputs)

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        device = batch.inputs.device
        noise = torch.randn(batch.inputs.shape, generator=step.generator, device=device)
        keyed = torch.randn(batch.inputs.shape, generator=step.generator_for("b1"), device=device)
        metrics = super().credit(Batch(batch.inputs + 0.1 * noise + 0.1 * keyed, batch.targets), step)
        if hasattr(self, "extra"):
            loss = self.spec.loss(self.extra(self.network(batch.inputs).detach()) + self.gain, batch)
            loss.backward()
        return metrics


def noisy(task: Task) -> Rule:
    torch.manual_seed(0)
    return NoisyPhases(mlp(task.spec, MLPConfig(depth=2, width=32, norm="batch", dropout=0.2)), task.spec)


class Exploding(Backprop):
    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        metrics = super().credit(batch, step)
        if step.index == 30:
            with torch.no_grad():
                next(self.parameters()).fill_(float("nan"))
        return metrics


class Silent(Exploding):
    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        return super().credit(batch, step) and {}
