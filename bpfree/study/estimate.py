"""Estimate the cost of a cell: from finished cells, or from a few steps on random numbers of the task's shape.

No data are read and nothing is written. Training alone is counted, without evaluation and loading.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch

from bpfree import devices
from bpfree.errors import BpfreeError
from bpfree.recipe import Recipe
from bpfree.rule import Rule
from bpfree.step import Batch, Budget, Phase
from bpfree.study.rows import Cell
from bpfree.study.store import CellRecord
from bpfree.tasks.task import TaskSpec
from bpfree.tasks.trees import leaves, move
from bpfree.training import environment
from bpfree.training.stepper import Stepper

__all__ = ["Estimate", "estimate"]

WARM_UP, TIMED = 1, 2
MOST_PHASES = 10_000


@dataclass(frozen=True)
class Estimate:
    """Seconds of training of one cell.

    Attributes:
        seconds: ``None`` where nothing can be said.
        source: ``budget`` (it is given in seconds), ``cells`` (mean of finished ones), or ``steps`` (timed here).
        reason: why nothing can be said.
    """

    seconds: float | None
    source: Literal["budget", "cells", "steps", ""] = ""
    reason: str = ""


def estimate(cell: Cell, done: Sequence[CellRecord]) -> Estimate:
    """Estimate the cost of a cell.

    Args:
        cell: to be run.
        done: finished cells of the same row and column.
    """
    budget = cell.recipe.settings.budget
    if budget.seconds is not None:
        return Estimate(budget.seconds, "budget")
    known = [record.result["train/seconds"] for record in done if "train/seconds" in record.result]
    if known:
        return Estimate(statistics.fmean(known), "cells")
    if cell.recipe.is_program:
        return Estimate(None, reason="the time of a program is known once one of its cells is finished")
    if cell.examples is None:
        return Estimate(None, reason="the data are not on this machine")
    if budget.forwards is not None or budget.operations is not None:
        unit = "forward-pass equivalents" if budget.forwards is not None else "operations"
        return Estimate(None, reason=f"a budget in {unit} can only be measured during training")
    try:
        return Estimate(_from_steps(cell.recipe, cell.examples), "steps")
    except (BpfreeError, RuntimeError, ValueError) as error:
        return Estimate(None, reason=str(error).splitlines()[0])


def _from_steps(recipe: Recipe, examples: int) -> float:
    """Time steps of the first phase, and multiply by the number of steps."""
    spec, settings = recipe.spec(), recipe.settings
    kept = examples - round(recipe.task.validation * examples)
    with environment.numerics(threads=settings.threads, deterministic=settings.deterministic), torch.random.fork_rng(devices=[]):
        rule = recipe.build_rule(spec)
        device = environment.device_of(rule, settings.device)
        rule.to(device)
        budget = settings.budget.resolve(kept)
        phases = list(islice(rule.phases(budget), MOST_PHASES))
        wanted = phases[0].batch_size or settings.batch_size
        size = kept if wanted == "all" else min(wanted, kept)
        batch = _batch(spec, size, device)
        if phases[0].on_features:
            batch = Batch(rule.features(batch.inputs).detach(), batch.targets)
        per_step = _time_step(rule, phases[0], batch, recipe)
    return per_step * _steps(budget, phases, kept, size)


def _steps(budget: Budget, phases: Sequence[Phase], examples: int, size: int) -> float:
    if budget.samples is not None:
        return budget.samples / size
    passes = sum(phase.epochs or 0 for phase in phases) or budget.epochs or 0
    return passes * math.ceil(examples / size)


def _batch(spec: TaskSpec, size: int, device: torch.device) -> Batch:
    targets = spec.example_targets(size)
    return Batch(move(spec.example(size), device), None if targets is None else targets.to(device))


def _time_step(rule: Rule, phase: Phase, batch: Batch, recipe: Recipe) -> float:
    """Return the time of the fastest of a few steps."""
    stepper, device, times = Stepper(rule, recipe.settings.optimizer), leaves(batch.inputs)[0].device, []
    with stepper.phase(phase), environment.autocast(device, recipe.settings.precision):
        for _ in range(WARM_UP + TIMED):
            since = time.perf_counter()
            stepper.take(batch)
            devices.synchronize(device)
            times.append(time.perf_counter() - since)
    return min(times[WARM_UP:])
