"""Learning-rate schedules: named shapes of the progress, or classes of ``torch.optim.lr_scheduler``."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bpfree.errors import UsageError, unknown_name
from bpfree.options import ScheduleConfig

__all__ = ["check_schedule", "shape_of", "torch_scheduler"]


def shape_of(schedule: ScheduleConfig) -> Callable[[float], float] | None:
    """The factor as a function of progress; ``None`` where the rate is constant or left to torch."""
    shapes: dict[str, Callable[[float], float]] = {
        "constant": lambda progress: 1.0,
        "linear": lambda progress: 1 - (1 - schedule.final) * progress,
        "cosine": lambda progress: schedule.final + (1 - schedule.final) * (1 + math.cos(math.pi * progress)) / 2,
        "milestones": lambda progress: schedule.gamma ** sum(progress >= point for point in schedule.milestones),
    }
    shape = shapes.get(schedule.name)
    if shape is None or (schedule.name == "constant" and not schedule.warmup):
        return None

    def factor(progress: float) -> float:
        if progress < schedule.warmup:
            return progress / schedule.warmup
        if schedule.name == "milestones":  # shares of the whole budget
            return shape(progress)
        return shape((progress - schedule.warmup) / (1 - schedule.warmup) if schedule.warmup < 1 else 1.0)

    return factor


def torch_scheduler(schedule: ScheduleConfig, optimizer: torch.optim.Optimizer) -> Any:
    if schedule.name in ("constant", "linear", "cosine", "milestones"):
        return None
    base = torch.optim.lr_scheduler.LRScheduler
    known = {n: v for n, v in vars(torch.optim.lr_scheduler).items() if inspect.isclass(v) and issubclass(v, base) and v is not base}
    for name in ("ReduceLROnPlateau", "LambdaLR", "MultiplicativeLR", "ChainedScheduler", "SequentialLR"):
        known.pop(name, None)  # step on a metric, or take functions or schedulers, which words cannot say
    if schedule.name not in known:
        raise unknown_name("schedule", schedule.name, ["constant", "linear", "cosine", "milestones", *known], where="schedule.name")
    if schedule.warmup:
        raise UsageError(f"{schedule.name} has no warm-up here", where="schedule.warmup", fix="use a named shape, or OneCycleLR")
    try:
        return known[schedule.name](optimizer, **schedule.options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{schedule.name} refuses its options: {error}", where="schedule.options") from error


def check_schedule(schedule: ScheduleConfig) -> None:
    """Try the schedule on a single parameter.

    Raises:
        UsageError: no such schedule, or options that it does not take.
    """
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch_scheduler(schedule, optimizer)
    if scheduler is not None:
        optimizer.step()
        try:
            scheduler.step()
        except (TypeError, ValueError) as error:
            raise UsageError(f"{schedule.name} refuses its options: {error}", where="schedule.options") from error
