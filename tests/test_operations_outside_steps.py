"""Operations of what a rule does outside of steps: prepare, start and end of phases, features. Oracle: closed forms."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_rules import StopAfter, assert_equal_bits, config_of, rule_on, weights

from bpfree import Batch, Budget, Phase, Split, Step, Task, UsageError
from bpfree.baselines import Backprop
from bpfree.training.config import BudgetConfig
from bpfree.training.operations import Operations
from bpfree.training.trainer import Interrupted, Trainer

EXAMPLES = 1295
LAYERS = [2 * 64 * 32, 2 * 32 * 32, 2 * 32 * 10]
BACKPROP = 3 * sum(LAYERS) - LAYERS[0]
PREPARED, STARTED, ENDED = 2 * 64 * EXAMPLES * 64, 2 * 7**3, 2 * 11**3


class Solving(Backprop):
    """Products of known size outside of steps, in two phases."""

    def phases(self, budget: Budget) -> Iterable[Phase]:
        return [Phase("one", epochs=1), Phase("two", epochs=1)]

    def prepare(self, data: Split, generator: torch.Generator) -> None:
        rows = data.inputs.float().flatten(1)
        assert (rows.T @ rows).shape == (64, 64)

    def start_phase(self, phase: Phase) -> None:
        torch.ones(7, 7) @ torch.ones(7, 7)

    def end_phase(self, phase: Phase, step: Step) -> None:
        torch.ones(11, 11) @ torch.ones(11, 11)


def test_operations_outside_of_steps(digits: Task, device: torch.device, tmp_path: Path) -> None:
    expected = PREPARED + 2 * (STARTED + ENDED + EXAMPLES * BACKPROP)
    run = Trainer(rule_on(digits, Solving), digits, config_of(device)).fit()
    assert run.result["train/operations"] == expected
    assert run.result["train/forwards"] == pytest.approx(expected / sum(LAYERS), rel=1e-12)
    for at in (5, 21, 30):
        folder = tmp_path / str(at)
        watch = StopAfter(at)
        watch.trainer = Trainer(rule_on(digits, Solving), digits, config_of(device), folder=folder, observers=[watch])
        with pytest.raises(Interrupted):
            watch.trainer.fit()
        again = Trainer(rule_on(digits, Solving), digits, config_of(device), folder=folder).fit(folder / "checkpoints" / "last.pt")
        assert again.result["train/operations"] == expected


def test_a_budget_of_forwards_pays_for_what_is_prepared(digits: Task, device: torch.device) -> None:
    run = Trainer(rule_on(digits, Solving), digits, config_of(device, budget=BudgetConfig(forwards=PREPARED // sum(LAYERS) + 1000))).fit()
    assert 0 < run.result["train/samples"] < 1000


class Shy(Backprop):
    """Moves, draws, and then refuses to be counted."""

    where = "prepare"

    def _act(self, where: str) -> None:
        if where != self.where:
            return
        with torch.no_grad():
            next(self.parameters()).add_(0.01 * torch.randn(()))
        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
            raise RuntimeError("not like this")

    def prepare(self, data: Split, generator: torch.Generator) -> None:
        self._act("prepare")

    def start_phase(self, phase: Phase) -> None:
        self._act("start")

    def end_phase(self, phase: Phase, step: Step) -> None:
        self._act("end")


@pytest.mark.parametrize("where", ["prepare", "start", "end"])
def test_a_call_that_cannot_be_counted_is_made_as_if_nobody_had_tried(
    digits: Task, device: torch.device, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(Shy, "where", where)
    rules = [rule_on(digits, Shy) for _ in range(2)]
    run = Trainer(rules[0], digits, config_of(device)).fit()
    assert run.status == "finished"
    assert "train/operations" not in run.result
    with pytest.raises(UsageError, match="not like this"):
        Trainer(rule_on(digits, Shy), digits, config_of(device, budget=BudgetConfig(forwards=10**6))).fit()
    monkeypatch.setattr(Operations, "wants", lambda *arguments: False)
    monkeypatch.setattr(Operations, "add_call", lambda self, call, step: call())
    Trainer(rules[1], digits, config_of(device)).fit()
    assert_equal_bits(weights(rules[0]), weights(rules[1]))


class MoreFeatures(Backprop):
    """Features that cost more in the second phase."""

    more = 0

    def phases(self, budget: Budget) -> Iterable[Phase]:
        return [Phase(name, epochs=1, groups=("readout",), on_features=True) for name in ("a", "b")]

    def start_phase(self, phase: Phase) -> None:
        self.more = int(phase.name == "b")

    def features(self, inputs: Any) -> Tensor:
        made = super().features(inputs)
        return made @ torch.eye(32) if self.more else made

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        loss = self.spec.loss(self.read(batch.inputs, step.generator), batch)
        loss.backward()
        return {"loss": loss.detach()}


def test_features_are_counted_anew_in_each_phase(digits: Task, device: torch.device) -> None:
    run = Trainer(rule_on(digits, MoreFeatures), digits, config_of(device, budget=BudgetConfig(epochs=2))).fit()
    features = 2 * sum(LAYERS[:-1]) + 2 * 32 * 32
    assert run.result["train/operations"] == EXAMPLES * (features + 2 * 2 * LAYERS[-1])
