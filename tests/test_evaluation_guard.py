"""An evaluation only reads parameters. Oracles: rules that train in it, one that puts back what it writes, and unwatched runs."""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from training_rules import ONE, assert_equal_bits, config_of, failing, rule_on, weights, write_through_data

from bpfree import Batch, Budget, Phase, Rule, Step, Task, Trainer
from bpfree.baselines import Backprop
from bpfree.training import guards
from bpfree.training.config import EvaluationConfig
from bpfree.training.guards import LearningWatch


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


@pytest.mark.parametrize(
    ("factory", "method", "every"),
    [(TrainsItself, "predict", 1), (TrainsItself, "features", 1), (OnFeatures, "features", 1), (InAlternatives, "alternatives", 9)],
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
