"""Schedulers that do not fit the run, and settings of rules that do not use the optimiser: refused before training.

Oracle: torch's schedulers, stepped once per epoch: what rates they give, and where they end with an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from test_families import Zeroth
from training_rules import rule_on

from bpfree import Task, TrainConfig, UsageError, mlp
from bpfree.config import parse_words, resolve
from bpfree.network.builders import MLPConfig
from bpfree.options import OptimizerConfig, ScheduleConfig
from bpfree.plugins import installed_plugins
from bpfree.rule import Traits, always
from bpfree.step import Budget, Phase
from bpfree.training.config import BudgetConfig
from bpfree.training.schedules import check_length, planned_steps
from bpfree.training.trainer import Trainer
from bpfree.training.updater import ClipConfig


@pytest.mark.parametrize(
    ("name", "options", "fits"),
    [
        ("OneCycleLR", {"max_lr": 0.1, "total_steps": 8}, True),
        ("OneCycleLR", {"max_lr": 0.1, "epochs": 8, "steps_per_epoch": 1}, True),
        ("OneCycleLR", {"max_lr": 0.1, "epochs": 8, "steps_per_epoch": 21}, False),  # given in batches
        ("OneCycleLR", {"max_lr": 0.1, "total_steps": 4}, False),  # torch raises in the fifth epoch
        ("CosineAnnealingLR", {"T_max": 8}, True),
        ("CosineAnnealingLR", {"T_max": 168}, False),
        ("CosineAnnealingLR", {"T_max": 4}, True),  # periodic, as torch has it
        ("CosineAnnealingWarmRestarts", {"T_0": 4}, True),
        ("CosineAnnealingWarmRestarts", {"T_0": 40}, False),
        ("LinearLR", {}, True),
        ("LinearLR", {"total_iters": 100}, False),
        ("ConstantLR", {"total_iters": 100}, False),
        ("PolynomialLR", {"total_iters": 8}, True),
        ("PolynomialLR", {"total_iters": 9}, False),
        ("StepLR", {"step_size": 3}, True),
        ("StepLR", {"step_size": 8}, False),
        ("MultiStepLR", {"milestones": [2, 4]}, True),
        ("MultiStepLR", {"milestones": [2, 400]}, False),
        ("ExponentialLR", {"gamma": 0.9}, True),
        ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 2}, True),
        ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.1}, False),
    ],
)
def test_a_scheduler_must_come_to_its_end_within_the_run_and_not_before(name: str, options: dict[str, Any], fits: bool) -> None:
    words = [f"schedule={name}", "budget.epochs=8", *(f"schedule.options.{key}={value}" for key, value in options.items())]
    if fits:
        assert resolve(parse_words(words)).settings.schedule.options == options
        return
    with pytest.raises(UsageError, match="once per epoch, 8 times in this run"):
        resolve(parse_words(words))


def test_one_cycle_falls_in_the_run_that_it_fits() -> None:
    """Oracle: torch, stepped by hand."""
    schedule = ScheduleConfig("OneCycleLR", options={"max_lr": 0.1, "total_steps": 8})
    check_length(schedule, 8)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, **schedule.options)
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert max(rates) > 0.09
    assert rates[-1] < 1e-4
    with pytest.raises(UsageError, match="not known beforehand"):
        check_length(schedule, None)


def test_the_trainer_counts_the_steps_of_a_budget_in_samples(digits: Task) -> None:
    rule = installed_plugins().get("rules", "backprop")(mlp(digits.spec, MLPConfig(depth=1, width=8)), digits.spec)
    budget = BudgetConfig(samples=3 * len(digits.train))
    for total, fits in ((3, True), (4, False)):
        config = TrainConfig(budget=budget, schedule=ScheduleConfig("OneCycleLR", options={"max_lr": 0.1, "total_steps": total}))
        if fits:
            Trainer(rule, digits, config)
        else:
            with pytest.raises(UsageError, match="3 times in this run"):
                Trainer(rule, digits, config)


def test_passes_of_a_rule_count_where_it_takes_several_per_epoch() -> None:
    """NoProp with a block per pass: three blocks are three steps of the scheduler per epoch."""
    words = ["rule=noprop-dt", "rule.T=3", "rule.updates=sequential", "budget.epochs=2", "schedule=OneCycleLR"]
    for total, fits in ((6, True), (2, False)):
        recipe = resolve(parse_words([*words, f"schedule.options={{max_lr: 0.1, total_steps: {total}}}"]))
        task = recipe.build_task()
        rule = recipe.build_rule(task.spec)
        if fits:
            Trainer(rule, task, recipe.settings)
        else:
            with pytest.raises(UsageError, match="6 times in this run"):
                Trainer(rule, task, recipe.settings)


class Restless(Zeroth):
    """In place, and with a rate of its own."""

    optimizer_keys_of = always(())


class Decaying(Zeroth):
    """In place, and reads weight decay too."""

    optimizer_keys_of = always(("lr", "weight_decay"))
    traits_of = always(Traits(update="in-place", reverse_span=0))


@pytest.mark.parametrize(
    ("rule", "words", "key"),
    [
        (Zeroth, ["optimizer.lr=0.1"], ""),
        (Zeroth, ["optimizer=adam"], ""),  # what the rule's default says
        (Zeroth, ["optimizer=sgd", "optimizer.lr=0.1"], ""),  # a rate alone is what plain gradient descent has
        (Zeroth, ["optimizer=rmsprop"], "optimizer.name=rmsprop"),
        (Restless, ["optimizer=sgd"], "optimizer.name=sgd"),
        (Zeroth, ["optimizer.momentum=0.9"], "optimizer.momentum=0.9"),
        (Zeroth, ["optimizer.weight_decay=0.1"], "optimizer.weight_decay=0.1"),
        (Zeroth, ["optimizer.options={betas: [0.5, 0.9]}"], "optimizer.options={betas: [0.5, 0.9]}"),
        (Zeroth, ["schedule=cosine"], ""),
        (Zeroth, ["clip.norm=1"], "no gradients to clip"),
        (Zeroth, ["accumulate=2"], "cannot be accumulated"),
        (Restless, ["optimizer.lr=0.1"], "it has no optimiser"),
        (Restless, ["schedule=cosine"], "it has no optimiser"),
        (Decaying, ["optimizer.weight_decay=0.1", "optimizer.lr=0.2"], ""),
    ],
)
def test_a_rule_that_updates_in_place_reads_its_rate_alone_unless_it_says_otherwise(
    rule: type[Zeroth], words: list[str], key: str, digits: Task
) -> None:
    registry = installed_plugins().including(rule)
    leaves = parse_words([f"rule={rule.__name__}", "network.depth=1", "network.width=8", *words])
    if not key:
        recipe = resolve(leaves, registry)
        made = recipe.build_rule(digits.spec)
        pinned = recipe.pinned(made)
        assert resolve(pinned.to_dict(), registry).flat() == pinned.flat()  # what is recorded can be run again
        Trainer(made, digits, pinned.settings)
        return
    with pytest.raises(UsageError, match=re.escape(key)):
        resolve(leaves, registry)


def test_the_trainer_refuses_the_same_in_python(digits: Task) -> None:
    rule = Zeroth(mlp(digits.spec, MLPConfig(depth=1, width=8)), digits.spec)
    for config in (
        TrainConfig(optimizer=OptimizerConfig(momentum=0.9)),
        TrainConfig(optimizer=OptimizerConfig("rmsprop")),
        TrainConfig(clip=ClipConfig(norm=1.0)),
        TrainConfig(accumulate=2),
    ):
        with pytest.raises(UsageError, match=r"optimizer\.|in place|accumulated"):
            Trainer(rule, digits, config)


def test_steps_are_not_known_where_a_phase_ends_by_its_operations(digits: Task) -> None:
    class Paid(Zeroth):
        def phases(self, budget: Budget) -> Iterable[Phase]:
            return [Phase("paid", operations=1e6), Phase("rest", epochs=2)]

    assert planned_steps(rule_on(digits, Paid), Budget(epochs=5)) is None
