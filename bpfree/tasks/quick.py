"""The task of a smoke run: a few examples of each split, the same ones each time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bpfree.seeds import derive
from bpfree.step import Stage
from bpfree.tasks.splits import Examples, StreamedSplit
from bpfree.tasks.task import Task

__all__ = ["few"]


def few(task: Task, count: int) -> Task:
    """Reduce a task to some examples of each split, drawn at random; in a stream, of each of its stages.

    Spec, normalisation included, and names of parts stay.

    Args:
        task: whole.
        count: examples of each split; a smaller split stays whole.
    """
    train, places = _cut(task.train, count, [stage.train for stage in task.stages], "train")
    test, tested = _cut(task.test, count, [stage.test for stage in task.stages], "test")
    validation, held = (
        (None, torch.empty(0))
        if task.validation is None
        else _cut(task.validation, count, [each.validation for each in task.stages], "val")
    )
    return replace(
        task,
        train=train,
        validation=validation,
        test=test,
        parts={name: _within(part, places) for name, part in task.parts.items()},
        stages=tuple(_stage(stage, places, held, tested) for stage in task.stages),
        _fingerprint=[],
    )


def _cut(split: Examples, count: int, stages: Sequence[Tensor | None], name: str) -> tuple[Examples, Tensor]:
    """Return the kept examples, and their places (M,), in their order."""
    if isinstance(split, StreamedSplit):
        places = torch.arange(min(count, len(split)))
        return split.subset(places), places
    groups = [stage for stage in stages if stage is not None] or [torch.arange(len(split))]
    generator = torch.Generator().manual_seed(derive("quick", name))
    chosen = [group[torch.randperm(len(group), generator=generator)[: -(-count // len(groups))]] for group in groups]
    places = torch.cat(chosen).unique()
    return split.subset(places), places


def _within(positions: Tensor, places: Tensor) -> Tensor:
    """Return the kept ones of some positions, as places among the kept examples."""
    return torch.isin(places, positions).nonzero().flatten()


def _stage(stage: Stage, train: Tensor, validation: Tensor, test: Tensor) -> Stage:
    def kept(positions: Tensor | None, places: Tensor) -> Tensor | None:
        return None if positions is None else _within(positions, places)

    return replace(stage, train=kept(stage.train, train), validation=kept(stage.validation, validation), test=kept(stage.test, test))
