"""Training a specimen on the bundled digits, as a user would: the same trainer, the rule's own optimiser and phases."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from bpfree.certify.subject import Specimen, Subject
from bpfree.rule import Rule
from bpfree.run import Run
from bpfree.tasks.digits import DIGITS
from bpfree.tasks.task import Examples, Task, TaskSpec
from bpfree.training.alignment import AlignmentConfig
from bpfree.training.config import BudgetConfig, CheckpointConfig, EvaluationConfig, TrainConfig
from bpfree.training.trainer import Trainer

__all__ = ["EPOCHS", "PRACTICE", "build", "cut", "digits", "train", "trainer"]

EPOCHS = 20
PRACTICE = Specimen("dense", depth=2, width=16)
"""Narrow, because with many random features a readout does well though the hidden blocks learn nothing."""
BATCH = 32


@lru_cache(maxsize=1)
def digits() -> Task:
    """Return the bundled digits, with a tenth of the training split for validation."""
    return Task.from_source(DIGITS)


def cut(task: Task, examples: int) -> Task:
    """Return the task with the first examples of its training split, and an eighth as many of each other split."""

    def first(split: Examples | None, count: int) -> Examples | None:
        return None if split is None else split.subset(torch.arange(min(count, len(split))))

    few = max(40, examples // 8)
    train, test = first(task.train, examples), first(task.test, few)
    assert train is not None
    assert test is not None
    return Task(task.spec, train, first(task.validation, few), test)


def build(subject: Subject, spec: TaskSpec, *, seed: int = 0, specimen: Specimen = PRACTICE) -> Rule:
    """Build a small instance for the task."""
    return subject.resolve({**subject.specimen_settings(specimen), "seed": seed}, spec).build_rule(spec)


def trainer(
    subject: Subject,
    task: Task | None = None,
    *,
    rule: Rule | None = None,
    seed: int = 0,
    epochs: int = EPOCHS,
    twin: bool = False,
    alignment_every: int = 0,
    protocols: Iterable[str] = (),
    evaluate_every: int = 1,
    folder: Path | None = None,
    observers: Iterable[Any] = (),
) -> Trainer:
    """Make a trainer of a small instance, on one thread of the CPU."""
    task = task or digits()
    settings = TrainConfig(
        seed=seed,
        budget=BudgetConfig(epochs=epochs),
        device="cpu",
        threads=1,
        batch_size=BATCH,
        twin=twin,
        checkpoint=CheckpointConfig(every=0),
        alignment=AlignmentConfig(every=alignment_every),
        evaluation=EvaluationConfig(every=evaluate_every, protocols=list(protocols)),
    )
    return Trainer(rule or build(subject, task.spec, seed=seed), task, settings, folder=folder, observers=observers)


def train(subject: Subject, task: Task | None = None, **options: Any) -> Run:
    """Train and test; options as for :func:`trainer`."""
    return trainer(subject, task, **options).fit()
