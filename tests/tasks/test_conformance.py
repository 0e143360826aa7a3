"""The checks for authors of tasks: shipped tasks pass, and each fault is found by the check that is for it.

Oracle: faults that are planted one at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bpfree
from bpfree import Batch, DataSource, InputPart, Metric, Split, Task, TaskSpec
from bpfree.certify import TaskCheck, task_checks
from bpfree.plugins import installed_plugins
from bpfree.tasks.splits import ItemSplit


@dataclass(frozen=True)
class WrongError(TaskSpec):
    def error(self, outputs: Tensor, batch: Batch) -> Tensor:
        return 2 * super().error(outputs, batch)


@dataclass(frozen=True)
class WrongLosses(TaskSpec):
    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        return super().losses(outputs, batch) + 1


class Halved:
    """A metric that depends on how the examples come in batches."""

    def __init__(self) -> None:
        self.batches = 0

    def add(self, outputs: Tensor, batch: Batch) -> None:
        self.batches += 1

    def value(self) -> float:
        return float(self.batches)


@dataclass(frozen=True)
class WrongMetric(TaskSpec):
    def metrics(self) -> Any:
        return [Metric("batches", begin=lambda spec, predict: Halved())]


@dataclass(frozen=True)
class WrongExample(TaskSpec):
    def example(self, count: int, generator: Any = None, dtype: torch.dtype = torch.float32) -> Any:
        return torch.zeros(count, 5)


@dataclass(frozen=True)
class Forgetful(TaskSpec):
    def recorded(self) -> dict[str, Any]:
        return {**super().recorded(), "outputs": 7}


@dataclass(frozen=True)
class Own(TaskSpec):
    """Nothing wrong: a loss of its own."""

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs, batch.targets, label_smoothing=0.3)  # type: ignore[arg-type]


def data(count: int, seed: int) -> Split:
    return Split(torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)), torch.arange(count) % 3)


def task_of(kind: type[TaskSpec]) -> Task:
    return Task(kind("made-up", (6,), 3, scale=1.0), data(30, 0), data(12, 1), data(12, 2))


def failing(checks: list[TaskCheck]) -> set[str]:
    found = set()
    for check in checks:
        try:
            check()
        except (AssertionError, bpfree.BpfreeError):
            found.add(check.name)
    return found


@pytest.mark.parametrize("name", ["digits", "npz"])
def test_shipped_tasks_pass(name: str, tmp_path: Any) -> None:
    import numpy as np

    source = installed_plugins().get("tasks", name)
    np.savez(tmp_path / "a.npz", x=np.random.default_rng(0).normal(size=(40, 6)).astype("float32"), y=np.arange(40) % 3)
    assert failing(task_checks(source, source.Config(path=str(tmp_path / "a.npz")) if name == "npz" else None)) == set()


def test_other_kinds_of_data_pass() -> None:
    tokens = Split(torch.arange(40).reshape(10, 4) % 5, torch.arange(1, 41).reshape(10, 4) % 5)
    assert failing(task_checks(Task(TaskSpec("tokens", (4,), 5, "tokens", vocabulary=5), tokens, None, tokens))) == set()
    items = ItemSplit([torch.randn(2 + place % 3, 2) for place in range(9)], torch.arange(9) % 3)
    spec = TaskSpec("items", (), 3, structure={"values": InputPart((-1, 2)), "lengths": InputPart((), "integer")})
    assert failing(task_checks(Task(spec, items, None, items))) <= {"dry-run-example"}  # whose length is one, the data's are not
    assert failing(task_checks(task_of(Own))) == set()
    real = Split(torch.randn(20, 6), torch.randn(20, 2, 3))
    assert failing(task_checks(Task(TaskSpec("real", (6,), 6, "real", output_shape=(2, 3), scale=1.0), real, None, real))) == set()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (WrongError, "loss-and-error"),
        (WrongLosses, "losses-of-examples"),
        (WrongMetric, "metrics-accumulate"),
        (WrongExample, "dry-run-example"),
        (Forgetful, "recorded"),
    ],
)
def test_a_fault_is_found(kind: type[TaskSpec], expected: str) -> None:
    assert failing(task_checks(task_of(kind))) == {expected}


def test_a_spec_that_does_not_describe_its_data_is_found() -> None:
    whole = task_of(TaskSpec)
    right = DataSource(lambda config, root: whole.spec, lambda config, root: (whole.train, whole.test))
    assert failing(task_checks(right)) == set()
    asked: list[int] = []

    def changing(config: Any, root: Any) -> TaskSpec:
        asked.append(1)
        return whole.spec if len(asked) == 1 else replace(whole.spec, outputs=4)

    assert failing([task_checks(DataSource(changing, right.load))[0]]) == {"spec-without-data"}
