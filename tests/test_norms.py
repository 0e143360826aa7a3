"""Batches of one and batch norms. Oracles: networks that have one value per channel, beside ones that have more."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_rules import assert_equal_bits, config_of, rule_on, weights

from bpfree import Batch, Budget, Phase, Rule, Split, Step, Task, UsageError
from bpfree.baselines import DFA, Backprop
from bpfree.network import VGGConfig, vgg
from bpfree.training.config import BudgetConfig
from bpfree.training.trainer import Trainer


def few(task: Task, count: int) -> Task:
    if count == 1:  # of classes a single one is refused anyway

        def rows(split: Split) -> Split:
            return Split(split.inputs, torch.nn.functional.one_hot(torch.as_tensor(split.targets), 10).float())

        spec = dataclasses.replace(task.spec, targets="real")
        return Task(spec, rows(task.train.subset(torch.arange(1))), None, rows(task.test.subset(torch.arange(50))))
    return Task(task.spec, task.train.subset(torch.arange(count)), None, task.test.subset(torch.arange(50)))


class HeadNorm(Backprop):
    """The norm is no part of the network."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.head = nn.BatchNorm1d(self.spec.outputs)

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        loss = self.spec.loss(self.head(self.network(batch.inputs)), batch)
        loss.backward()
        return {"loss": loss.detach()}


class SingleAtLast(Backprop):
    chosen: tuple[str, ...] | None = None

    def phases(self, budget: Budget) -> Iterable[Phase]:
        return [Phase("many", epochs=1), Phase("single", epochs=1, batch_size=1, groups=self.chosen)]


class ReadoutSingly(SingleAtLast):
    """The norms are in eval mode where batches have one example."""

    chosen = ("readout",)


def _dense(task: Task, factory: type[Rule], **options: Any) -> Rule:
    return rule_on(task, factory, **options)


def _maps(task: Task, factory: type[Rule], side: int) -> Rule:
    """Batch norms over maps of a given size; the last one over 1x1 maps."""
    pools = [1, 2, 3] if side == 1 else [1, 2]
    return factory(vgg(task.spec, VGGConfig(channels=[4, 4, 4, 4], pool_after=pools, norm="batch")), task.spec)


@pytest.mark.parametrize(
    ("make", "size", "count", "where"),
    [
        (lambda task: _dense(task, Backprop, norm="batch"), 1, 20, "batch_size=1"),
        (lambda task: _dense(task, DFA, norm="batch"), 1, 20, "batch_size=1"),
        (lambda task: _dense(task, Backprop, norm="batch").double(), 1, 20, "batch_size=1"),
        (lambda task: _dense(task, HeadNorm), 1, 20, "batch_size=1"),
        (lambda task: _dense(task, SingleAtLast, norm="batch"), 8, 20, "batch_size=1 of phase 'single' of SingleAtLast"),
        (lambda task: _dense(task, Backprop, norm="batch"), 8, 1, "has one example"),
        (lambda task: _maps(task, Backprop, 1), 1, 20, "batch_size=1"),
    ],
)
def test_norms_of_one_value_per_channel_are_refused_before_training(
    digits: Task, make: Callable[[Task], Rule], size: int, count: int, where: str
) -> None:
    task = few(digits, count)
    rule = make(task)
    before = weights(rule)
    with pytest.raises(UsageError, match=r"(?s)BatchNorm.*one value per channel.*" + where):
        Trainer(rule, task, config_of(torch.device("cpu"), batch_size=size))
    assert_equal_bits(before, weights(rule))


@pytest.mark.parametrize(
    ("make", "size", "count"),
    [
        (lambda task: _dense(task, Backprop), 1, 20),
        (lambda task: _dense(task, Backprop), 8, 1),
        (lambda task: _maps(task, Backprop, 2), 1, 20),
        (lambda task: _dense(task, ReadoutSingly, norm="batch"), 8, 20),
        (lambda task: _dense(task, Backprop, norm="batch"), 2, 21),  # the last one is left out
    ],
)
def test_batches_of_one_that_can_be_normalised_are_trained(digits: Task, make: Callable[[Task], Rule], size: int, count: int) -> None:
    task = few(digits, count)
    config, rule = config_of(torch.device("cpu"), batch_size=size, budget=BudgetConfig(epochs=2)), make(task)
    state = torch.get_rng_state()
    run = Trainer(rule, task, config).fit()
    assert run.status == "finished"
    assert torch.equal(torch.get_rng_state(), state)
