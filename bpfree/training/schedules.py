"""Learning-rate schedules: named shapes of the progress, or classes of ``torch.optim.lr_scheduler``."""

from __future__ import annotations

import inspect
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bpfree.errors import UsageError, unknown_name
from bpfree.options import OptimizerConfig, ScheduleConfig
from bpfree.rule import Rule
from bpfree.step import Budget
from bpfree.training.optimizers import make_optimizer, misfit

__all__ = ["CLASSES", "SHAPES", "check_length", "check_schedule", "planned_steps", "shape_of", "torch_scheduler"]

SHAPES = ("constant", "linear", "cosine", "milestones")
_BASE = torch.optim.lr_scheduler.LRScheduler
# those left out step on a metric, or take functions or schedulers, which words cannot say
_OTHERS = ("LRScheduler", "_LRScheduler", "ReduceLROnPlateau", "LambdaLR", "MultiplicativeLR", "ChainedScheduler", "SequentialLR")
CLASSES: dict[str, Any] = {
    name: value
    for name, value in vars(torch.optim.lr_scheduler).items()
    if inspect.isclass(value) and issubclass(value, _BASE) and name not in _OTHERS
}
"""The classes of ``torch.optim.lr_scheduler`` that a configuration can name."""

LENGTHS = {
    "OneCycleLR": ("total_steps",),
    "CosineAnnealingLR": ("T_max",),
    "CosineAnnealingWarmRestarts": ("T_0",),
    "LinearLR": ("total_iters",),
    "ConstantLR": ("total_iters",),
    "PolynomialLR": ("total_iters",),
    "CyclicLR": ("step_size_up", "step_size_down"),
}
"""Attributes that give the steps to a scheduler's end, or of its cycle: the one, or the sum of both."""
MOST_STEPS = 100_000


def shape_of(schedule: ScheduleConfig) -> Callable[[float], float] | None:
    """Return the factor as a function of progress; ``None`` where the rate is constant or left to torch."""
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
    """Make the scheduler of ``torch.optim.lr_scheduler`` over an optimiser; ``None`` for a named shape.

    Raises:
        UsageError: no such schedule, or options that it does not take.
    """
    if schedule.name in SHAPES:
        return None
    if schedule.name not in CLASSES:
        raise unknown_name("schedule", schedule.name, [*SHAPES, *CLASSES], where="schedule.name")
    if schedule.warmup:
        raise UsageError(f"{schedule.name} has no warm-up here", where="schedule.warmup", fix="use a named shape, or OneCycleLR")
    factory = CLASSES[schedule.name]
    accepted = {name: each for name, each in inspect.signature(factory).parameters.items() if name not in ("optimizer", "last_epoch")}
    for key, value in schedule.options.items():
        where = f"schedule.options.{key}"
        if key not in accepted:
            raise unknown_name(f"option of {schedule.name}", key, accepted, where=where)
        if reason := misfit(value, accepted[key]):
            raise UsageError(f"{schedule.name} refuses its options: {key} {reason}, not {value!r}", where=where)
    try:
        return factory(optimizer, **schedule.options)
    except Exception as error:  # torch checks little, and may raise any exception
        raise UsageError(f"{schedule.name} refuses its options: {error}", where="schedule.options") from error


def check_schedule(schedule: ScheduleConfig) -> None:
    """Try the schedule on a single parameter.

    Raises:
        UsageError: no such schedule, or options that it does not take.
    """
    if schedule.name == "milestones" and not schedule.milestones:
        raise UsageError(
            "schedule=milestones needs schedule.milestones", where="schedule.milestones", fix="for example schedule.milestones=[0.5,0.75]"
        )
    _stepped(schedule, 1)


def _stepped(schedule: ScheduleConfig, steps: int) -> tuple[Any, list[float]]:
    """Return the scheduler over a single parameter after n steps, and the rates of its epochs.

    Raises:
        UsageError: it cannot be made, or does not go so far.
    """
    if schedule.name in SHAPES:
        return None, []
    optimizer = make_optimizer(OptimizerConfig("sgd", lr=0.1), {"probe": [nn.Parameter(torch.zeros(1))]}, {})
    scheduler, rates = torch_scheduler(schedule, optimizer), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, that no step of the optimiser was taken
        for _ in range(steps):
            rates.append(float(optimizer.param_groups[0]["lr"]))
            try:
                scheduler.step()
            except Exception as error:
                if "times" in str(error):  # of OneCycleLR, whose end this is
                    break
                raise UsageError(f"{schedule.name} refuses its options: {error}", where="schedule.options") from error
    return scheduler, rates


def check_length(schedule: ScheduleConfig, steps: int | None) -> None:
    """Check whether a scheduler of torch comes to its end within the run, and whether the run continues beyond its end.

    A scheduler is stepped once per epoch. One whose length is in batches would hardly begin, and OneCycleLR raises an error beyond its end.
    CosineAnnealingLR beyond its end is periodic, as torch has it.

    Args:
        schedule: of the run.
        steps: how many it will get; ``None``: that is not known beforehand.

    Raises:
        UsageError: it does not fit.
    """
    if schedule.name not in CLASSES:
        return
    if steps is None:
        if schedule.name == "OneCycleLR":
            raise UsageError(
                "OneCycleLR is stepped once per epoch, and how many epochs this budget has is not known beforehand",
                where="schedule.name",
                fix="set budget.epochs, or use a named shape, such as schedule=cosine schedule.warmup=0.3",
            )
        return
    steps = min(steps, MOST_STEPS)
    scheduler, rates = _stepped(schedule, steps)
    names = LENGTHS.get(schedule.name, ())
    length = round(sum(getattr(scheduler, name, scheduler_length(scheduler)) for name in names[:1])) if names else 0
    epochs = f"once per epoch, {steps} times in this run"
    where = f"schedule.options.{names[0]}" if names else "schedule.options"
    if schedule.name == "OneCycleLR" and length != steps:
        reason = "given in batches?" if length > steps else "it ends before the run does"
        raise UsageError(
            f"OneCycleLR is stepped {epochs}, and has {length} steps: {reason}",
            where=where,
            fix=f"schedule.options={{..., total_steps: {steps}}}",
        )
    if length > steps:
        raise UsageError(
            f"{schedule.name} is stepped {epochs}, and comes to its end after {length}",
            where=where,
            fix=f"count in epochs: at most {steps}, or train for longer",
        )
    beyond = [point for point in sorted(getattr(scheduler, "milestones", ())) if point >= steps]
    if beyond or len(set(rates)) == 1 != steps:
        reason = f"its milestone {beyond[0]} lies beyond" if beyond else "the rate never changes"
        raise UsageError(
            f"{schedule.name} is stepped {epochs}: {reason}", where="schedule.options", fix="count in epochs, or train for longer"
        )


def scheduler_length(scheduler: Any) -> float:
    """Return the steps of a scheduler's cycle, also of CyclicLR, which keeps no such attribute."""
    return float(getattr(scheduler, "total_size", 0))


def planned_steps(rule: Rule, budget: Budget) -> list[int] | None:
    """Return the number of steps of each scheduler that is not a phase's own; ``None`` where it is not known beforehand.

    There is one for each optimiser, of which a phase may have its own.
    """
    if budget.epochs is None:
        return None
    phases = list(itertools.islice(rule.phases(budget), MOST_STEPS))
    if len(phases) == MOST_STEPS or any(phase.epochs is phase.seconds is phase.forwards is phase.operations is None for phase in phases):
        return [budget.epochs]  # then the budget ends the run
    counts: dict[str, int] = {}
    for phase in phases:
        if phase.schedule is None and phase.epochs is None:
            return None
        if phase.schedule is None:
            counts[repr(phase.optimizer)] = counts.get(repr(phase.optimizer), 0) + (phase.epochs or 0)
    return list(counts.values())
