"""Batches of one example: refused before training where a norm would see one value per channel."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bpfree import devices
from bpfree.errors import UsageError
from bpfree.rule import Rule
from bpfree.step import Batch, Budget, Phase
from bpfree.tasks.loading import Loader
from bpfree.tasks.task import Task
from bpfree.training.phases import learning
from bpfree.training.stepper import Stepper

__all__ = ["check_batches_of_one"]

PHASES = 100
"""Phases that are checked, as there may be endlessly many."""

BATCH_NORM = nn.modules.batchnorm._BatchNorm


def check_batches_of_one(rule: Rule, task: Task, budget: Budget, batch_size: int) -> None:
    """Refuse batches of one example that the rule cannot take, as a copy of it shows in one step.

    A larger batch size leaves none: a last batch of one is left out, and micro-batches have two examples or more.

    Raises:
        UsageError: a norm would see one value per channel.
    """
    phases = list(itertools.islice(rule.phases(budget), PHASES))
    sizes = [_smallest(phase, batch_size, len(task.train)) for phase in phases]
    if 1 not in sizes:
        return
    device = next((p.device for p in rule.parameters()), torch.device("cpu"))
    with devices.preserved_global_state(device):
        try:
            trial = copy.deepcopy(rule)
        except (RuntimeError, TypeError):  # it holds what cannot be copied
            return
        batch = next(iter(Loader(task.train.subset(torch.arange(1)), task.spec, batch_size=1, device=device, dtype=rule.network.dtype)))
        for phase, size in zip(phases, sizes, strict=True):
            trial.start_phase(phase)
            trial.to(device)
            if size == 1:
                _try(trial, phase, batch, task)


def _smallest(phase: Phase, batch_size: int, examples: int) -> int:
    size = phase.batch_size or batch_size
    return examples if size == "all" else min(size, examples)


def _try(rule: Rule, phase: Phase, batch: Batch, task: Task) -> None:
    with learning(rule, phase), _entered(rule) as entered:
        try:
            if phase.on_features:
                with torch.no_grad():
                    batch = Batch(rule.features(batch.inputs), batch.targets)
            stepper = Stepper(rule)
            stepper.enter(phase)
            stepper.take(batch)
        except Exception as error:  # the training itself reports other errors
            if isinstance(error, ValueError) and "Expected more than 1" in str(error):
                _refuse(entered[-1] if entered else "", rule, phase, task)


@contextmanager
def _entered(rule: Rule) -> Iterator[list[str]]:
    """Collect the names of the norms that are executed inside, in order."""
    entered: list[str] = []
    handles = []
    for name, module in rule.named_modules():
        if isinstance(module, (BATCH_NORM, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)):
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: entered.append(name)))  # type: ignore[misc]
    try:
        yield entered
    finally:
        for handle in handles:
            handle.remove()


def _refuse(name: str, rule: Rule, phase: Phase, task: Task) -> None:
    norm = f"{name} ({type(rule.get_submodule(name)).__name__})" if name else "a norm"
    single = len(task.train) == 1
    if single:
        where, fix = f"the training split of task {task.spec.name} has one example", "a task with more examples, or network.norm=none"
    elif phase.batch_size is not None:
        where = f"batch_size={phase.batch_size} of phase {phase.name!r} of {type(rule).__name__}"
        fix = "2 or more in Phase.batch_size, or a network without the norm (network.norm=none)"
    else:
        where, fix = "batch_size=1", "batch_size=2 or more, or a network without the norm (network.norm=none)"
    raise UsageError(f"in a batch of one example {norm} would see one value per channel, which it cannot normalise", where=where, fix=fix)
