"""Patience and smoke runs. Oracles: the epoch found by hand in the curve of a run without patience; the bits of a run that was not
disturbed; the sizes of splits; class counts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from training_rules import StopAfter, assert_equal_bits, config_of, noisy, rule_on, weights

from bpfree import Stage, Task, UsageError, runner
from bpfree.baselines import DFA
from bpfree.config import parse_words, resolve
from bpfree.metric import ACCURACY, LOSS
from bpfree.options import OptimizerConfig
from bpfree.recipe import quick_examples
from bpfree.tasks.quick import few
from bpfree.training.budget import Patience
from bpfree.training.config import BudgetConfig, EvaluationConfig
from bpfree.training.state import Position
from bpfree.training.trainer import Interrupted, Trainer

FAST = OptimizerConfig("sgd", lr=0.5)
"""A rate at which the validation accuracy of DFA goes up and down."""


def ended_at(values: list[float], patience: int) -> int:
    """By hand: the first epoch that is ``patience`` epochs after the first of the best so far."""
    for epoch in range(1, len(values) + 1):
        best = values.index(max(values[:epoch])) + 1
        if epoch - best >= patience:
            return epoch
    return len(values)


def fit(task: Task, patience: int | None, folder: Path | None = None, **options: Any) -> tuple[Any, Trainer]:
    rule = rule_on(task, DFA)
    budget = BudgetConfig(epochs=30, patience=patience)
    trainer = Trainer(rule, task, config_of(torch.device("cpu"), budget=budget, optimizer=FAST, **options), folder=folder)
    return rule, trainer


def test_a_run_ends_where_the_curve_says(digits: Task) -> None:
    _, whole = fit(digits, None)
    curve = [metrics["val/accuracy"] for metrics in whole.fit().history]
    assert whole.run.reason == ""
    assert not any("patience" in key for key in whole.run.result)
    ends = {}
    for patience in (2, 4):
        _, trainer = fit(digits, patience)
        run = trainer.fit()
        ends[patience] = len(run.history)
        assert run.status == "finished"
        assert [metrics["val/accuracy"] for metrics in run.history] == curve[: len(run.history)]
        assert len(run.history) == ended_at(curve, patience) < 30
        best = curve.index(max(curve[: len(run.history)])) + 1
        assert run.result["train/best_epoch"] == best
        assert run.result["train/out_of_patience"] == 1
        assert run.reason == f"budget.patience={patience} ended it after epoch {len(run.history)}: val/accuracy was best at epoch {best}"
    assert ends[2] < ends[4]


def test_interrupted_in_between_it_ends_with_the_same_bits(digits: Task, tmp_path: Path) -> None:
    straight, trainer = fit(digits, 3)
    expected = trainer.fit()
    steps = int(expected.result["train/steps"])
    per_epoch = steps // len(expected.history)
    for number, at in enumerate([1, steps - 2 * per_epoch, steps - per_epoch // 2, steps - per_epoch, steps]):
        folder = tmp_path / str(number)
        rule, trainer = fit(digits, 3, folder)
        watch = StopAfter(at)
        watch.trainer = trainer
        trainer._observers._manager.register(watch)
        with pytest.raises(Interrupted):
            trainer.fit()
        rule, trainer = fit(digits, 3, folder)
        run = trainer.fit(folder / "checkpoints" / "last.pt")
        assert_equal_bits(weights(rule), weights(straight))
        assert run.reason == expected.reason
        assert run.result["train/best_epoch"] == expected.result["train/best_epoch"]
        assert len(run.history) == len(expected.history)


def test_a_smaller_loss_is_better_and_no_number_is_not() -> None:
    """Oracle: losses 3, 2, NaN, not evaluated, 2, 1: best at epochs 1, 2, 2, 2, 2 (an equal one is not better), 6."""
    patience, at, best = Patience(4, LOSS), Position(), []
    for epoch, value in enumerate([3.0, 2.0, float("nan"), None, 2.0, 1.0], 1):
        at.epoch = epoch
        patience.note({} if value is None else {"val/loss": value}, at)
        best.append(at.best_epoch)
        assert not patience.is_out(at)
    assert best == [1, 2, 2, 2, 2, 6]
    at.epoch = 10
    assert patience.is_out(at)
    at.batch = 1  # of the epoch that comes next, say
    assert not patience.is_out(at)
    assert not Patience(None, ACCURACY).is_out(at)


def test_the_epoch_that_decides_is_evaluated(digits: Task) -> None:
    """With an evaluation at every tenth epoch alone, the epoch at which patience would be over is evaluated before it is."""
    _, trainer = fit(digits, 3, evaluation=EvaluationConfig(every=10))
    history = trainer.fit().history
    evaluated = [int(metrics["epoch"]) for metrics in history if "val/accuracy" in metrics]
    assert evaluated[0] == 3
    assert evaluated[-1] == len(history)
    assert len(history) < 30


def test_what_patience_cannot_measure_is_refused(digits: Task) -> None:
    config = config_of(torch.device("cpu"), budget=BudgetConfig(epochs=5, patience=1))
    with pytest.raises(UsageError, match="without a validation split"):
        Trainer(rule_on(digits), dataclasses.replace(digits, validation=None), config)
    with pytest.raises(UsageError, match="several phases"):
        Trainer(noisy(digits), digits, config)
    with pytest.raises(UsageError, match="needs a validation split"):
        resolve(parse_words(["budget.patience=2", "task.validation=0"]))
    with pytest.raises(UsageError, match=r"must be 1 or more|at least 1|out of range"):
        resolve(parse_words(["budget.patience=0"]))


def test_a_larger_patience_continues_a_run_that_it_ended(workplace: Path) -> None:
    words = ["rule=dfa", "network.width=32", "budget.epochs=30", "optimizer.name=sgd", "optimizer.lr=0.3"]
    words += ["tracking.enabled=false", "pictures.curves=false"]
    short = runner.run(resolve(parse_words([*words, "budget.patience=1"])), quiet=True)
    straight = runner.run(resolve(parse_words([*words, "budget.patience=3"])), quiet=True)
    assert len(short.history) < len(straight.history)
    assert short.folder is not None
    longer = runner.resume(str(short.folder), changes=parse_words(["budget.patience=3"]), quiet=True)
    assert [m["val/accuracy"] for m in longer.history] == [m["val/accuracy"] for m in straight.history]
    assert longer.result["test/accuracy"] == straight.result["test/accuracy"]


# --- smoke runs ---------------------------------------------------------------------------------------------------------


def test_a_smoke_run_sees_a_few_examples_of_everything(workplace: Path) -> None:
    recipe = resolve(parse_words(["quick=true", "batch_size=32", "budget.epochs=200", "tracking.enabled=false", "pictures.curves=false"]))
    assert recipe.settings.budget.epochs == 10
    assert quick_examples(recipe.settings) == 96
    whole, task = resolve(parse_words(["batch_size=32"])).build_task(), recipe.build_task()
    assert [len(split) for split in (task.train, task.validation, task.test) if split is not None] == [96, 96, 96]
    assert task.spec == whole.spec  # normalised alike
    assert task.fingerprint() != whole.fingerprint()
    again = recipe.build_task()
    assert again.fingerprint() == task.fingerprint()
    run = runner.run(recipe, quiet=True)
    assert run.tags["quick"] == "True"
    assert run.result["train/samples"] == 960
    assert run.config["quick"] is True


@pytest.mark.parametrize(
    ("given", "limit", "short"),
    [("budget.epochs=3", "epochs", 3), ("budget.samples=10000000", "samples", 1920), ("budget.seconds=1000", "seconds", 5.0)],
)
def test_a_budget_is_shortened_never_lengthened(given: str, limit: str, short: float) -> None:
    recipe = resolve(parse_words([given, "quick=true"]))
    assert getattr(recipe.settings.budget, limit) == short
    again = resolve(recipe.to_dict())
    assert again == recipe


def test_stages_and_parts_follow_their_examples(digits: Task) -> None:
    """Oracle: the classes of the examples, which a stage's positions must still select."""
    targets = digits.train.targets
    assert targets is not None
    assert digits.test.targets is not None
    stages = tuple(
        Stage(str(n), n, labels, *(torch.isin(t, torch.tensor(labels)).nonzero().flatten() for t in (targets, digits.test.targets)))
        for n, labels in enumerate([(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)])
    )
    task = dataclasses.replace(digits, stages=stages, parts={"zeros": (targets == 0).nonzero().flatten()})
    cut = few(task, 40)
    assert cut.train.targets is not None
    assert len(cut.train) == len(cut.test) == 40
    for stage in cut.stages:
        assert stage.train is not None
        assert len(stage.train) == 20
        assert set(cut.train.targets[stage.train].tolist()) <= set(stage.classes)
    assert cut.parts["zeros"].tolist() == (cut.train.targets == 0).nonzero().flatten().tolist()
