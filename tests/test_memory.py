"""Memory of steps. Oracles: a rule that fills known amounts, and the size of an optimiser's state."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor
from training_rules import config_of, rule_on

from bpfree import Batch, Budget, Phase, Step, Task
from bpfree.baselines import Backprop
from bpfree.tasks.task import Examples
from bpfree.training.config import BudgetConfig
from bpfree.training.trainer import Trainer

EXAMPLES = 1295
MIB = 2**20


class Filling(Backprop):
    """A step on everything takes 8 MiB, from the third on 3."""

    passes = 1

    def phases(self, budget: Budget) -> Iterable[Phase]:
        return [Phase("all", epochs=self.passes, batch_size="all")]

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        filled = torch.ones((8 if step.index < 2 else 3) * MIB // 4)
        return {"filled": filled[0].clone()} | super().credit(batch, step)


@pytest.mark.parametrize(("steps", "expected"), [(1, 8), (2, 8), (3, 3), (4, 3)])
def test_memory_of_a_short_phase(digits: Task, device: torch.device, monkeypatch: pytest.MonkeyPatch, steps: int, expected: int) -> None:
    if device.type != "cpu":
        pytest.skip("the rule fills the CPU's memory")
    monkeypatch.setattr(Filling, "passes", steps)
    run = Trainer(rule_on(digits, Filling), digits, config_of(device)).fit()
    assert run.result["train/steps"] == steps
    assert expected <= run.result["train/peak_memory_mb"] < expected + 2
    assert run.history[0]["peak_memory_mb"] > 8


def test_what_a_first_step_leaves_behind_counts_once(digits: Task, device: torch.device) -> None:
    """Adam's two moments are made at the end of the first step: the peak before lies twice the parameters below that of a later step."""
    first, later = (
        Trainer(rule_on(digits, width=1024), digits, config_of(device, batch_size=EXAMPLES, budget=BudgetConfig(epochs=steps))).fit().result
        for steps in (1, 3)
    )
    assert (first["train/steps"], later["train/steps"]) == (1, 3)
    moments = 2 * 4 * first["parameters"] / MIB
    assert first["train/peak_memory_mb"] == pytest.approx(later["train/peak_memory_mb"] - moments, rel=0.02)


class FillingBesideSteps(Backprop):
    """What is made before training takes 16 MiB, and what is solved at its end 24."""

    def prepare(self, data: Examples, generator: torch.Generator) -> None:
        torch.ones(16 * MIB // 4)

    def end_phase(self, phase: Phase, step: Step) -> None:
        torch.ones(24 * MIB // 4)


def test_what_is_solved_counts(digits: Task, device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("the rule fills the CPU's memory")
    run = Trainer(rule_on(digits, FillingBesideSteps), digits, config_of(device)).fit()
    assert 24 <= run.result["train/peak_memory_mb"] < 26
    assert 16 <= run.history[0]["peak_memory_mb"] < 26
