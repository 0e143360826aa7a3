"""Callbacks in a few lines. Oracles: the history of the run, a run with that budget, and what hooks are called with."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from training_rules import ONE, assert_equal_bits, config_of, noisy, rule_on, weights, write_through_data

from bpfree import BpfreeError, BudgetConfig, Task, UsageError, hookimpl
from bpfree.training.trainer import Trainer


def test_a_function_is_called_after_each_epoch_with_what_it_names(digits: Task, device: torch.device) -> None:
    seen: list[Any] = []
    rule = rule_on(digits)

    def note(metrics: Any, rule: Any, unasked: int = 3) -> None:
        seen.append((metrics["epoch"], rule, unasked))

    def everything(**given: Any) -> None:
        seen.append(sorted(given))

    run = Trainer(rule, digits, config_of(device, budget=BudgetConfig(epochs=2)), callbacks=[note, everything]).fit()
    assert seen == [(1.0, rule, 3), ["metrics", "rule", "run", "stop"], (2.0, rule, 3), ["metrics", "rule", "run", "stop"]]
    assert [metrics["epoch"] for metrics in run.history] == [1.0, 2.0]


def test_an_object_has_the_methods_of_the_hooks_that_it_wants(digits: Task, device: torch.device) -> None:
    class Counter:
        def __init__(self) -> None:
            self.steps, self.calls = 0, list[str]()

        def step_end(self, step: Any) -> None:
            self.steps += 1

        def run_start(self) -> None:
            self.calls.append("start")

        def run_end(self, run: Any) -> None:
            self.calls.append(run.status)

    class Marked:
        @hookimpl
        def epoch_end(self, run: Any) -> None:
            counter.calls.append(f"epoch {run.epoch}")

    counter = Counter()
    run = Trainer(rule_on(digits), digits, config_of(device, budget=ONE), callbacks=[counter, Marked()]).fit()
    assert counter.calls == ["start", "epoch 1", "finished"]
    assert counter.steps == run.result["train/steps"]


def test_a_callback_ends_the_training_which_is_tested_as_one_with_that_budget(digits: Task, device: torch.device) -> None:
    """Oracle: a run of two epochs at a constant rate, bit for bit."""
    ended, whole = rule_on(digits), rule_on(digits)
    run = Trainer(
        ended,
        digits,
        config_of(device, budget=BudgetConfig(epochs=9)),
        callbacks=[lambda metrics, stop: stop("good enough") if metrics["epoch"] == 2 else None],
    ).fit()
    other = Trainer(whole, digits, config_of(device, budget=BudgetConfig(epochs=2))).fit()
    assert (run.status, run.reason, run.epoch) == ("finished", "good enough", 2)
    assert run.result["test/accuracy"] == other.result["test/accuracy"]
    assert_equal_bits(weights(ended), weights(whole))


def test_a_stop_without_a_reason_names_the_callback_and_counts_once(digits: Task, device: torch.device) -> None:
    """The same trainer trains on afterwards: the request is forgotten."""

    def patient(stop: Any) -> None:
        stop()

    trainer = Trainer(rule_on(digits), digits, config_of(device, budget=BudgetConfig(epochs=3)), callbacks=[patient])
    assert trainer.fit().reason == "patient ended it"
    assert trainer.setup.rule is trainer.rule


def test_a_rule_of_several_phases_is_not_ended_early(digits: Task, device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="bpfree"):
        run = Trainer(noisy(digits), digits, config_of(device, budget=BudgetConfig(epochs=3)), callbacks=[lambda stop: stop("now")]).fit()
    assert run.epoch == run.total_epochs
    assert "not ended early (now): NoisyPhases trains in several phases" in caplog.text


def test_a_callback_only_observes(digits: Task, device: torch.device) -> None:
    with pytest.raises(BpfreeError, match="the observer write_through_data changed the parameter"):
        Trainer(rule_on(digits), digits, config_of(device, budget=ONE), callbacks=[write_through_data]).fit()


class Empty:
    """No hook."""


@pytest.mark.parametrize(
    ("callbacks", "text"),
    [
        ([lambda metric: None], "asks for metric, but epoch_end has run, metrics, rule, stop"),
        ([Empty()], "a Empty is neither a function nor has a method"),
        ([Empty], "the callback Empty is a class"),
        (print, "callbacks must be a list, not a builtin_function_or_method"),
        (["print"], "a str is neither"),
    ],
)
def test_what_is_no_callback_is_refused_before_the_run(digits: Task, device: torch.device, callbacks: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Trainer(rule_on(digits), digits, config_of(device, budget=ONE), callbacks=callbacks)
