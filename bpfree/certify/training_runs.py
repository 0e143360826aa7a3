"""Training a specimen on the bundled digits, as a user would: the same trainer, the rule's own optimiser and phases."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from bpfree.certify.subject import Specimen, Subject
from bpfree.errors import BpfreeError
from bpfree.rule import Rule
from bpfree.run import Run
from bpfree.tasks.digits import DIGITS
from bpfree.tasks.spec import TargetKind
from bpfree.tasks.task import Examples, Split, Task, TaskSpec
from bpfree.training.alignment import AlignmentConfig
from bpfree.training.config import BudgetConfig, CheckpointConfig, EvaluationConfig, TrainConfig
from bpfree.training.trainer import Trainer

__all__ = ["EPOCHS", "PRACTICE", "build", "cut", "digits", "retargeted", "task_of", "train", "trainer"]

EPOCHS = 20
PRACTICE = Specimen("dense", depth=2, width=16)
"""Narrow, because with many random features a readout does well though the hidden blocks learn nothing."""
BATCH = 32


@lru_cache(maxsize=1)
def digits() -> Task:
    """Return the bundled digits, with a tenth of the training split for validation."""
    return Task.from_source(DIGITS)


def task_of(subject: Subject) -> Task:
    """Return the digits with targets of a kind that the rule takes, or the task that it names in its specimen."""
    if subject.own_task is not None:
        return subject.own_task
    return digits() if subject.targets == "classes" else retargeted(subject.targets)


@lru_cache(maxsize=4)
def retargeted(kind: TargetKind) -> Task:
    """Return the digits with their classes as rows of 0 and 1 (``multilabel``), as smoothed distributions (``soft``), or as numbers.

    Raises:
        BpfreeError: of another kind.
    """
    if kind not in ("multilabel", "soft", "real"):
        what = f"the certificate has no data with targets of kind {kind!r}"
        raise BpfreeError(what, where="Rule.specimen", fix='name a task that the rule learns: {"task.name": "my-task", ...}')
    task = digits()

    def convert(split: Examples | None) -> Split | None:
        if split is None:
            return None
        inputs, targets = split.batch(torch.arange(len(split)))
        assert targets is not None
        rows = torch.nn.functional.one_hot(targets, task.spec.outputs).float()
        return Split(inputs, 0.9 * rows + 0.1 / task.spec.outputs if kind == "soft" else rows)

    train, test = convert(task.train), convert(task.test)
    assert train is not None
    assert test is not None
    return Task(replace(task.spec, targets=kind, class_names=()), train, convert(task.validation), test)


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
    task = task or task_of(subject)
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
