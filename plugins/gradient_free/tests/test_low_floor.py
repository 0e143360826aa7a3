"""The tasks with low floors. Oracles: the equation of the spirals, parity by hand, logistic regression at chance."""

from __future__ import annotations

import math

import pytest
import torch
from bpfree_gradient_free.low_floor import PARITY, TWO_SPIRALS, ParityConfig, SpiralsConfig
from sklearn.linear_model import LogisticRegression

from bpfree import Task
from bpfree.certify import TaskCheck, task_checks


@pytest.mark.parametrize("check", [*task_checks(TWO_SPIRALS), *task_checks(PARITY)], ids=str)
def test_conformance(check: TaskCheck) -> None:
    check()


def test_points_lie_on_their_spiral() -> None:
    task = Task.from_source(TWO_SPIRALS, SpiralsConfig(noise=0.0))
    x, y = task.test.inputs, task.test.targets
    radius = x.norm(dim=1)
    turned = torch.atan2(x[:, 1], x[:, 0]) - 2 * math.pi * 2 * radius - math.pi * y
    assert float((torch.remainder(turned + math.pi, 2 * math.pi) - math.pi).abs().max()) < 1e-4


def test_classes_are_parities() -> None:
    task = Task.from_source(PARITY, ParityConfig(bits=5, noise=0.0))
    ones = (task.train.inputs > 0).sum(1)
    assert torch.equal(ones % 2, task.train.targets)
    assert task.train.inputs.unique().tolist() == [-1, 1]


@pytest.mark.parametrize("source", [TWO_SPIRALS, PARITY], ids=["two-spirals", "parity"])
def test_a_line_does_not_divide_the_classes(source: object) -> None:
    task = Task.from_source(source, source.Config())  # type: ignore[attr-defined, arg-type]
    fitted = LogisticRegression().fit(task.train.inputs, task.train.targets)
    assert abs(fitted.score(task.test.inputs, task.test.targets) - 0.5) < 0.1
