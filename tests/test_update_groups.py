"""Updates of single groups: what ``before_update`` and ``after_update`` get. Oracle: the same update applied whole."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from training_rules import ONE, config_of, rule_on, weights

from bpfree import Batch, OptimizerConfig, Rule, Step, Task, Traits, always
from bpfree.baselines import DFA, Backprop
from bpfree.training.trainer import Trainer


class InParts(DFA):
    """Applies its groups one by one, and halves each gradient before."""

    traits_of = always(Traits(dependence="all", downstream_weights=0, update="own-steps"))

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.before: list[tuple[str, ...]] = []
        self.after: list[tuple[str, ...]] = []

    def learn(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        metrics = self.credit(batch, step)
        for name in self.groups():
            step.apply(name)
        return metrics

    def before_update(self, groups: Sequence[str]) -> None:
        self.before.append(tuple(groups))
        for name in groups:
            for p in self.groups()[name]:
                assert p.grad is not None
                p.grad /= 2

    def after_update(self, groups: Sequence[str]) -> None:
        self.after.append(tuple(groups))


class Whole(InParts):
    traits_of = always(Traits(dependence="all", downstream_weights=0))

    def learn(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        return Rule.learn(self, batch, step)


def test_an_update_is_told_its_groups_and_each_is_prepared_once(digits: Task, device: torch.device) -> None:
    """Signals do not depend on the order of updates here, so that parts and whole end alike."""
    config = config_of(device, budget=ONE, optimizer=OptimizerConfig("sgd", lr=0.1), deterministic=True)
    parts, whole = rule_on(digits, InParts), rule_on(digits, Whole)
    for rule in (parts, whole):
        Trainer(rule, digits, config).fit()
    assert isinstance(parts, InParts)
    assert isinstance(whole, InParts)
    assert parts.before[:3] == parts.after[:3] == [("b1",), ("b2",), ("readout",)]
    assert set(whole.before) == set(whole.after) == {("b1", "b2", "readout")}
    for name, value in weights(whole).items():
        torch.testing.assert_close(value, weights(parts)[name], rtol=1e-5, atol=1e-6)


def test_rules_that_take_no_groups_keep_working_and_are_told(digits: Task, device: torch.device) -> None:
    class Older(Backprop):
        calls = 0

        def before_update(self) -> None:  # type: ignore[override]
            Older.calls += 1

        def after_update(self) -> None:  # type: ignore[override]
            Older.calls += 1

    with pytest.warns(DeprecationWarning, match=r"Older.before_update.*before_update\(self, groups: Sequence\[str\]\)"):
        run = Trainer(rule_on(digits, Older), digits, config_of(device, budget=ONE)).fit()
    assert Older.calls == 2 * run.result["train/steps"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        Trainer(rule_on(digits, Whole), digits, config_of(device, budget=ONE))
