"""Settings that nothing reads, because of what another setting or the rule is: a run in which they are typed would not be what was asked.

A value that is the default is never idle, so that a recorded configuration, which has every key, can be run again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from bpfree.errors import UsageError
from bpfree.options import OptimizerConfig, ScheduleConfig
from bpfree.rule import Rule
from bpfree.training.config import TrainConfig
from bpfree.training.optimizers import untaken
from bpfree.training.schedules import CLASSES, SHAPES
from bpfree.yaml_values import text_of

__all__ = ["idle", "idle_of_rule", "sentence"]

READERS = {"final": ("linear", "cosine"), "milestones": ("milestones",), "gamma": ("milestones",), "options": ()}
"""Shapes of schedule that read a key."""
OWN_RATES = {"OneCycleLR": "max_lr", "CyclicLR": "base_lr and max_lr"}
"""Schedulers that begin from rates of their own."""


def idle(settings: TrainConfig, rule: type[Rule]) -> Iterator[tuple[str, str]]:
    """Each idle setting by its key, with a sentence that names what it depends on.

    Args:
        settings: of training.
        rule: its class. What its instances alone know is for :func:`idle_of_rule`.
    """
    yield from _schedule(settings.schedule)
    yield from _rates(settings, rule)
    yield from idle_of_rule(settings, rule)
    if settings.clip.scope != "group" and settings.clip.norm is None:
        yield "clip.scope", f"clip.scope={settings.clip.scope} does nothing without clip.norm: nothing is clipped"
    if settings.alignment.draws and not settings.alignment.every:
        yield "alignment.draws", f"alignment.draws={settings.alignment.draws} does nothing with alignment.every=0: nothing is compared"


def _schedule(schedule: ScheduleConfig) -> Iterator[tuple[str, str]]:
    if schedule.name not in SHAPES and schedule.name not in CLASSES:
        return  # what it reads is not known; the name is refused
    default = ScheduleConfig()
    for key, shapes in READERS.items():
        value = getattr(schedule, key)
        reads = schedule.name in shapes or (key == "options" and schedule.name in CLASSES)
        if value != getattr(default, key) and not reads:
            readers = " and ".join(f"schedule={shape}" for shape in shapes) or "a class of torch.optim.lr_scheduler"
            yield (
                f"schedule.{key}",
                f"schedule.{key}={text_of(value)} does nothing with schedule.name={schedule.name}: it is for {readers}",
            )
    if schedule.warmup and schedule.name in CLASSES:
        where = f"schedule.warmup={schedule.warmup:g}"
        yield "schedule.warmup", f"schedule.name={schedule.name} has no warm-up here ({where}; use a named shape, or OneCycleLR)"


def _rates(settings: TrainConfig, rule: type[Rule]) -> Iterator[tuple[str, str]]:
    """Rates and momentum that a scheduler replaces by its own."""
    name, schedule = settings.schedule.name, settings.schedule
    if name not in OWN_RATES:
        return
    default = OptimizerConfig() if isinstance(rule.optimizer, property) else rule.optimizer
    lr, momentum = settings.optimizer.lr, settings.optimizer.momentum
    if lr not in (None, default.lr):
        told = ", ".join(f"schedule.options.{key}" for key in OWN_RATES[name].split(" and "))
        yield "optimizer.lr", f"optimizer.lr={lr:g} does nothing with schedule.name={name}, whose rates are {told}"
    if momentum not in (None, default.momentum) and schedule.options.get("cycle_momentum", True):
        yield (
            "optimizer.momentum",
            f"optimizer.momentum={momentum:g} does nothing with schedule.name={name} without schedule.options.cycle_momentum=false",
        )


def idle_of_rule(settings: TrainConfig, rule: type[Rule] | Rule) -> Iterator[tuple[str, str]]:
    """The settings that this rule does not read; of a class, what is the same for all of its instances."""
    name = rule.__name__ if isinstance(rule, type) else type(rule).__name__
    traits, default, keys = rule.traits, rule.optimizer, rule.optimizer_keys
    known = not isinstance(traits, property)
    update = traits.update if known else "grad"
    if settings.accumulate > 1 and update != "grad":
        yield "accumulate", f"this rule applies its updates itself ({update}), so gradients cannot be accumulated: accumulate=1"
    if settings.clip.norm is not None and update == "in-place":
        yield "clip.norm", "this rule updates in place, so there are no gradients to clip: clip.norm=null"
    if keys is None and update == "in-place":
        keys = ("lr",)
    if isinstance(keys, property) or isinstance(default, property):
        return
    if keys is not None:
        yield from _unread(settings, name, keys, default)
        return
    try:
        yield from ((key, sentence(error)) for key, error in untaken(settings.optimizer.over(default)))
    except UsageError:  # no such optimiser, which is said elsewhere
        return


def _unread(settings: TrainConfig, rule: str, keys: tuple[str, ...], default: OptimizerConfig) -> Iterator[tuple[str, str]]:
    read = f"it reads {', '.join(f'optimizer.{key}' for key in keys)} alone" if keys else "it has no optimiser"
    for item in dataclasses.fields(OptimizerConfig):
        value = getattr(settings.optimizer, item.name)
        unset: Any = item.default_factory() if callable(item.default_factory) else item.default
        # a rate and nothing else is what plain gradient descent has
        plain = item.name == "name" and str(value).lower() == "sgd" and keys == ("lr",)
        if item.name not in keys and not plain and value not in (unset, getattr(default, item.name)):
            yield f"optimizer.{item.name}", f"optimizer.{item.name}={text_of(value)} does nothing with the rule {rule}: {read}"
    if "lr" not in keys and settings.schedule != ScheduleConfig():
        yield "schedule", f"schedule.name={settings.schedule.name} does nothing with the rule {rule}: {read}"


def sentence(error: UsageError) -> str:
    """An error as one sentence, with place and remedy in brackets."""
    more = "; ".join(part for part in (error.where, error.fix) if part)
    return f"{error.what} ({more})" if more else error.what
