"""Numbers below the normal ones. Oracle: 2e-38 is one of float32's normal numbers, a quarter of it is not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_rules import config_of

from bpfree import BudgetConfig, Task, hookimpl, mlp, scoring
from bpfree.baselines import Backprop
from bpfree.config import parse_words, resolve
from bpfree.runner import run
from bpfree.training.environment import flushing_denormals, numerics
from bpfree.training.trainer import Trainer


def flushed() -> bool:
    return not (torch.full((8,), 2e-38) * 0.25).any()


@pytest.fixture(autouse=True)
def as_usual() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush")
    torch.set_flush_denormal(False)
    yield
    torch.set_flush_denormal(False)


def test_they_are_zero_inside_and_as_before_afterwards() -> None:
    assert not flushed()
    with flushing_denormals():
        assert flushed()
        with numerics(threads=None, deterministic=False):
            assert flushed()
        assert flushed()
    assert not flushed()
    with pytest.raises(ZeroDivisionError), flushing_denormals():
        raise ZeroDivisionError
    assert not flushed()


def test_they_are_zero_in_threads_that_are_started_inside() -> None:
    """In a process whose threads have not been started yet; enough numbers for two of them."""
    code = """
import torch
from bpfree.training.environment import flushing_denormals
with flushing_denormals():
    torch.set_num_threads(2)
    print(bool((torch.full((4_000_000,), 2e-38) * 0.25).any()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_they_are_zero_while_a_rule_trains(digits: Task) -> None:
    seen = []

    class Watch:
        @hookimpl
        def step_end(self, run: Any, step: Any) -> None:
            seen.append(flushed())

    rule = Backprop(mlp(digits.spec), digits.spec)
    ended = Trainer(rule, digits, config_of(torch.device("cpu"), budget=BudgetConfig(epochs=1)), observers=[Watch()]).fit()
    assert seen
    assert all(seen)
    assert ended.tags["flush_denormal"] == "True"
    assert not flushed()


def test_they_are_zero_while_a_saved_rule_is_scored(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    evaluate = scoring.evaluate
    words = ["rule=linear", "task=digits", "budget.epochs=1", "tracking.enabled=false", "threads=1"]
    place = run(resolve(parse_words(words)), quiet=True).folder
    monkeypatch.setattr(scoring, "evaluate", lambda *args, **options: seen.append(flushed()) or evaluate(*args, **options))
    scores = scoring.score(str(place)).values
    assert scores["accuracy"] > 0.5
    assert seen == [True]
    assert not flushed()
