"""An evaluation only reads parameters. Oracles: rules that train in it, one that puts back what it writes, and unwatched runs."""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_rules import ONE, assert_equal_bits, config_of, failing, rule_on, weights, write_through_data

from bpfree import Batch, BpfreeError, Budget, Phase, Rule, Step, Task, TaskSpec, runner, scoring
from bpfree.baselines import DFA, Backprop
from bpfree.config import resolve
from bpfree.leaves import Leaf
from bpfree.training import guards
from bpfree.training.config import EvaluationConfig
from bpfree.training.guards import LearningWatch
from bpfree.training.trainer import Trainer


class Evaluated(Backprop):
    """Calls ``touch`` in the method of this name."""

    method = "predict"

    def touch(self) -> None:
        """Only reads."""

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        if self.method == "predict":
            self.touch()
        return super().predict(inputs, generator)

    def features(self, inputs: Any) -> Tensor:
        if self.method == "features":
            self.touch()
        return super().features(inputs)


class TrainsItself(Evaluated):
    def touch(self) -> None:
        write_through_data(self)


class Averages(Evaluated):
    """Predicts with other weights, and puts its own back."""

    def touch(self) -> None:
        for p in self.parameters():
            kept = p.clone()
            p.mul_(0.5)
            p.copy_(kept)


class OnFeatures(TrainsItself):
    method = "features"

    def phases(self, budget: Budget) -> Iterable[Phase]:
        return [Phase("readout", epochs=1, groups=("readout",), on_features=True)]

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        loss = self.spec.loss(self.read(batch.inputs, step.generator), batch)
        loss.backward()
        return {"loss": loss.detach()}


class InAlternatives(TrainsItself):
    method = "alternatives"
    predict = Rule.predict

    def alternatives(self, inputs: Any, generator: torch.Generator) -> dict[str, Tensor]:
        self.touch()
        return {}


class InEffort(InAlternatives):
    method = "effort"
    alternatives = Rule.alternatives

    def effort(self, inputs: Any, generator: torch.Generator) -> dict[str, Tensor]:
        self.touch()
        return {}


@pytest.mark.parametrize(
    ("factory", "method", "every"),
    [
        (TrainsItself, "predict", 1),
        (TrainsItself, "features", 1),
        (OnFeatures, "features", 1),
        (InAlternatives, "alternatives", 9),
        (InEffort, "effort", 9),
    ],
)
def test_a_rule_that_trains_while_it_is_evaluated_is_refused(
    digits: Task, device: torch.device, monkeypatch: pytest.MonkeyPatch, factory: type[Evaluated], method: str, every: int
) -> None:
    monkeypatch.setattr(factory, "method", method)
    evaluation = EvaluationConfig(every=every, protocols=["nearest-centroid"] if method == "features" else [])
    text = failing(Trainer(rule_on(digits, factory), digits, config_of(device, budget=ONE, evaluation=evaluation)))
    assert f"{method} changed the parameter network.blocks.b1" in text
    assert f"{factory.__name__}.{method}" in text


@pytest.mark.parametrize("method", ["predict", "features"])
def test_a_rule_that_puts_its_parameters_back_ends_with_the_same_bits(
    digits: Task, device: torch.device, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(Evaluated, "method", method)
    config = config_of(device, budget=ONE, deterministic=True, evaluation=EvaluationConfig(protocols=["nearest-centroid"]))
    results, scores = [], []
    for watched, factory in ((True, Evaluated), (True, Averages), (False, Evaluated)):
        if not watched:
            monkeypatch.setattr(guards, "Values", lambda tensors: types.SimpleNamespace(changed=lambda tensors: []))
            monkeypatch.setattr(LearningWatch, "end_run", lambda *arguments, **options: None)
        rule = rule_on(digits, factory)
        run = Trainer(rule, digits, config).fit()
        assert run.status == "finished"
        results.append(weights(rule))
        scores.append({name: value for name, value in run.result.items() if name.startswith("test/")})
    assert scores[0] == scores[1] == scores[2]
    assert_equal_bits(results[0], results[1])
    assert_equal_bits(results[0], results[2])


@pytest.mark.parametrize("method", ["predict", "features"])
def test_a_saved_rule_is_watched_too(method: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``bpfree evaluate`` scores it. Oracle: the same call with a rule that only reads."""
    run = runner.run(
        resolve({"rule": "dfa", "budget.epochs": 1, "network.width": 32, "tracking.enabled": False, "device": "cpu"}), quiet=True
    )
    changes = [Leaf("evaluation.protocols", ["nearest-centroid"], "test")]
    assert scoring.score(run.id, changes)[1]["nearest_centroid/accuracy"] > 0.2
    original = getattr(DFA, method)

    def writes(self: Rule, *arguments: Any) -> Any:
        write_through_data(self)
        return original(self, *arguments)

    monkeypatch.setattr(DFA, method, writes)
    with pytest.raises(BpfreeError, match=f"{method} changed the parameter"):
        scoring.score(run.id, changes)


class Generous(TaskSpec):
    """Finds every prediction correct."""

    def correct(self, scores: Tensor, targets: Tensor) -> Tensor:
        return torch.ones(len(scores), dtype=torch.bool)


class ChangesItsSpec(Backprop):
    """Learns little, and makes the description of the task generous."""

    def start_phase(self, phase: Phase) -> None:
        object.__setattr__(self.spec, "__class__", Generous)

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        return {name: 0 * value for name, value in super().credit(batch, step).items()}


def test_a_rule_that_changes_its_spec_is_scored_by_the_tasks(digits: Task, device: torch.device) -> None:
    """Oracle: its predictions, compared with the labels here."""
    task = dataclasses.replace(digits, spec=copy.copy(digits.spec))  # other tests have the fixture's
    rule = rule_on(task, ChangesItsSpec)
    run = Trainer(rule, task, config_of(device, budget=ONE)).fit()
    assert isinstance(rule.spec, Generous)
    assert task.test is not None
    with torch.no_grad():
        inputs = task.spec.normalise(task.test.inputs).to(device)
        right = rule.predict(inputs, torch.Generator(device)).argmax(1).cpu() == task.test.targets
    assert run.result["test/accuracy"] == pytest.approx(right.double().mean().item())


def test_a_saved_rule_that_changes_its_spec_is_scored_by_the_tasks(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the same run's accuracy without the change."""
    settings = resolve({"rule": "dfa", "budget.epochs": 1, "network.width": 32, "tracking.enabled": False, "device": "cpu"})
    honest = runner.run(settings, quiet=True)
    known = scoring.score(honest.id, [])[1]["accuracy"]
    for method in ("start_phase", "predict"):
        original = getattr(DFA, method)

        def changes(self: Rule, *arguments: Any, original: Any = original) -> Any:
            object.__setattr__(self.spec, "__class__", Generous)
            return original(self, *arguments)

        monkeypatch.setattr(DFA, method, changes)
    assert runner.run(settings, quiet=True).result["test/accuracy"] == honest.result["test/accuracy"] < 1
    assert scoring.score(honest.id, [])[1]["accuracy"] == known < 1
