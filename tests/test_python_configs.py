"""Configurations and arguments that are made in Python. Oracle: what the command line makes of the same words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bpfree import BudgetConfig, OptimizerConfig, RunConfig, TaskSpec, TrainConfig, Trainer, UsageError, mlp
from bpfree.baselines import DFA
from bpfree.config import parse_words, resolve
from bpfree.options import checked
from bpfree.tasks.task import Split, Task


def test_sections_may_be_names_or_mappings() -> None:
    made = TrainConfig(optimizer="adam", budget={"epochs": 3}, schedule={"name": "linear", "final": 0.5})  # type: ignore[arg-type]
    words = parse_words(["optimizer=adam", "budget.epochs=3", "schedule=linear", "schedule.final=0.5"])
    settings = resolve(words).settings
    assert (made.optimizer, made.budget, made.schedule) == (settings.optimizer, settings.budget, settings.schedule)


@pytest.mark.parametrize(
    ("kind", "name", "fix"),
    [
        (TrainConfig, "epochs", r"did you mean budget=BudgetConfig\(epochs=\.\.\.\)\?"),
        (TrainConfig, "lr", r"did you mean optimizer=OptimizerConfig\(lr=\.\.\.\)\?"),
        (TrainConfig, "batchsize", r"did you mean batch_size=\.\.\.\?"),
        (TrainConfig, "learning_rate", r"did you mean optimizer=OptimizerConfig\(lr=\.\.\.\)\?"),
        (BudgetConfig, "epoch", r"did you mean epochs=\.\.\.\?"),
        (OptimizerConfig, "zzz", "known: name, lr"),
    ],
)
def test_an_unknown_name_is_refused_with_the_section_that_has_it(kind: Any, name: str, fix: str) -> None:
    with pytest.raises(UsageError, match=rf"{kind.__name__} has no field '{name}'[\s\S]*{fix}"):
        kind(**{name: 3})


def test_a_section_of_another_type_is_refused() -> None:
    with pytest.raises(UsageError, match=r"optimizer is a section, not 3[\s\S]*OptimizerConfig"):
        TrainConfig(optimizer=3)  # type: ignore[arg-type]


def test_values_are_read_as_on_the_command_line() -> None:
    given: dict[str, Any] = {"batch_size": "32", "seed": np.int64(7), "device": torch.device("cpu"), "clip": {"norm": torch.tensor(2.0)}}
    made = checked(TrainConfig(**given))
    assert (made.batch_size, made.seed, made.device, made.clip.norm) == (32, 7, "cpu", 2.0)
    assert (type(made.seed), type(made.clip.norm)) == (int, float)


def test_all_wrong_values_are_named_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        checked(TrainConfig(batch_size="many", precision="fp8", clip={"norm": []}))  # type: ignore[arg-type]
    assert "3 problems in the configuration" in str(caught.value)
    assert "batch_size='many': must be a whole number" in str(caught.value)
    with pytest.raises(UsageError, match=r"budget.epochs=0 is out of range"):
        checked(TrainConfig(budget=BudgetConfig(epochs=0)))


# --- the trainer's arguments --------------------------------------------------------------------------------------------


def test_arguments_of_another_kind_are_refused_with_what_makes_one(digits: Task) -> None:
    rule, other = DFA(mlp(digits.spec), digits.spec), TaskSpec("other", (5,), 10)
    split = Split(torch.rand(30, 5), torch.arange(30) % 10)
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((DFA, digits), r"rule is the class DFA, not a Rule[\s\S]*DFA\(network, task.spec\)"),
        ((rule, "digits"), r"task is a str, not a Task[\s\S]*load_task"),
        ((rule, digits, {"seed": 3}), r"config is a dict, not a TrainConfig"),
        ((rule, digits, TrainConfig(batch_size=0)), "batch_size=0 is out of range"),
        ((rule, digits, TrainConfig(batch_size=4, accumulate=8)), "accumulate=8 needs at least as many examples"),
        ((rule, digits, TrainConfig(schedule="cos")), "unknown schedule 'cos'"),  # type: ignore[arg-type]
        ((rule, Task(other, split, None, split)), r"built for input_shape=\(1, 8, 8\), but the task has \(5,\)"),
    ]
    for given, text in cases:
        with pytest.raises(UsageError, match=text):
            Trainer(*given, progress=False)


# --- how they show themselves -------------------------------------------------------------------------------------------


def test_what_users_print_is_short(digits: Task) -> None:
    assert repr(digits) == "Task(digits: 1295 train, 143 validation, 359 test; 1x8x8 -> 10 classes)"
    assert repr(digits.train) == "Split(1295 examples: inputs 1x8x8 float32, targets int64)"
    parts = Split({"left": torch.zeros(3, 2), "right": torch.zeros(3)}, None)
    assert repr(parts) == "Split(3 examples: inputs['left'] 2 float32, inputs['right'] float32, no targets)"
    real = Task(
        TaskSpec("slope", (2,), 1, "real"), Split(torch.rand(9, 2), torch.rand(9, 1)), None, Split(torch.rand(9, 2), torch.rand(9, 1))
    )
    assert repr(real) == "Task(slope: 9 train, 9 test; 2 -> 1 real target)"
    config = RunConfig(budget=BudgetConfig(epochs=2), device="cpu", tracking={"enabled": False})  # type: ignore[arg-type]
    trainer = Trainer(DFA(mlp(digits.spec), digits.spec), digits, config, progress=False)
    assert repr(trainer) == "Trainer(DFA on digits: 2 epochs, batches of 64, cpu; created)"
    run = trainer.fit()
    assert repr(run) == f"Run(dfa-digits-s0: finished, epoch 2 of 2, test accuracy {100 * run.result['test/accuracy']:.2f} %)"
    run.folder = Path("runs/mine")
    assert repr(run).endswith(", runs/mine)")
