"""Streams of classes: the classes of a task, learned some at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bpfree.errors import UsageError
from bpfree.step import Stage
from bpfree.tasks.stages import Memory
from bpfree.tasks.task import Task

__all__ = ["class_stream"]


def class_stream(task: Task, *, start: int, increment: int, order: Sequence[int] | None = None, memory: Memory | None = None) -> Task:
    """Make a stream of a task's classes: ``start`` of them first, then ``increment`` at a time.

    Args:
        task: with integer classes.
        start, increment: classes of the first stage, and of each later one; the last has what is left.
        order: of the classes; ``None``: as they are numbered.
        memory: of examples of earlier stages.

    Raises:
        UsageError: a task without classes, or numbers that are no order of them.
    """
    spec = task.spec
    if spec.targets != "classes" or task.train.targets is None or task.test.targets is None:
        raise UsageError(f"task {spec.name!r} has no classes to learn one after the other", fix="give a task with targets='classes'")
    classes = list(range(spec.outputs)) if order is None else [int(label) for label in order]
    if sorted(classes) != list(range(spec.outputs)):
        raise UsageError(f"order={classes} is no order of the classes 0 to {spec.outputs - 1}", fix="name each class once")
    if not 1 <= start <= len(classes) or increment < 1:
        raise UsageError(
            f"start={start} and increment={increment} of {len(classes)} classes", fix="give 1 or more, and a start that exists"
        )
    cuts = [classes[:start], *(classes[place : place + increment] for place in range(start, len(classes), increment))]
    stages = tuple(
        Stage(
            f"stage {index + 1}",
            index,
            tuple(labels),
            _places(task.train.targets, labels),
            _places(task.test.targets, labels),
            None if task.validation is None or task.validation.targets is None else _places(task.validation.targets, labels),
        )
        for index, labels in enumerate(cuts)
    )
    return replace(task, stages=stages, memory=memory)


def _places(targets: Tensor, labels: Sequence[int]) -> Tensor:
    return torch.isin(targets, torch.tensor(list(labels))).nonzero().flatten()
