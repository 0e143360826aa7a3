"""Settings that nothing reads, because of another setting or the rule; a run would silently ignore them.

A value that is the default is never idle, so that a recorded configuration, which has every key, can be run again. What depends on
another option of the same dataclass is declared with the option (``needs`` and ``unless``); the rest is written out here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from bpfree.errors import UsageError
from bpfree.options import OptimizerConfig, ScheduleConfig
from bpfree.rule import Rule, Traits
from bpfree.training.config import TrainConfig
from bpfree.training.optimizers import needs_closure, untaken
from bpfree.training.schedules import CLASSES, SHAPES
from bpfree.yaml_values import text_of

__all__ = ["idle", "idle_of_rule", "idle_options"]

READERS = {"final": ("linear", "cosine"), "milestones": ("milestones",), "gamma": ("milestones",), "options": ()}
"""Shapes of schedule that read a key."""
OWN_RATES = {"OneCycleLR": "max_lr", "CyclicLR": "base_lr and max_lr"}
"""Schedulers that begin from rates of their own."""


def idle(settings: TrainConfig, rule: type[Rule], config: Any) -> Iterator[tuple[str, str]]:
    """Yield the key of each idle setting, with a sentence that names what it depends on.

    Args:
        settings: of training.
        rule: its class. What depends on the network is for :func:`idle_of_rule`.
        config: the rule's options.
    """
    default = rule.optimizer_of(config)
    yield from _schedule(settings.schedule)
    yield from _rates(settings, default)
    yield from _of_rule(settings, rule.__name__, rule.traits_of(config), default, rule.optimizer_keys_of(config))
    yield from idle_options(settings, type(settings)(), "")


def idle_options(config: Any, base: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield the key of each option that other options of its dataclass make idle, with a sentence that names these.

    Args:
        config: an instance of a dataclass of options; dataclasses inside it are checked too.
        base: another, of values that are never idle: the defaults, or what a rule implies for its network.
        prefix: of the keys, such as ``rule.``.
    """
    for item in dataclasses.fields(config):
        value, default, key = getattr(config, item.name), getattr(base, item.name), f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            yield from idle_options(value, default, f"{key}.")
        elif value != default and (reason := _reason(config, item, prefix)):
            yield key, f"{key}={text_of(value)} does nothing with {reason}"


def _reason(config: Any, item: dataclasses.Field[Any], prefix: str) -> str:
    """Name the options that make one idle, and those that it is for; return the empty string for an option that is read."""
    needs, unless = item.metadata.get("needs", {}), item.metadata.get("unless", {})
    against = [key for key, values in unless.items() if getattr(config, key, None) in values]
    if against or not needs or any(getattr(config, key) in values for key, values in needs.items()):
        return " and ".join(_set(prefix, key, getattr(config, key)) for key in against)
    found = " and ".join(_set(prefix, key, getattr(config, key)) for key in needs)
    readers = " or ".join(_set(prefix, key, value) for key, values in needs.items() for value in values)
    return f"{found}: it is for {readers}"


def _set(prefix: str, key: str, value: Any) -> str:
    return f"{prefix}{key}={text_of(value)}"


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


def _rates(settings: TrainConfig, default: OptimizerConfig) -> Iterator[tuple[str, str]]:
    """Yield the rates and the momentum that a scheduler replaces by its own."""
    name, schedule = settings.schedule.name, settings.schedule
    if name not in OWN_RATES:
        return
    lr, momentum = settings.optimizer.lr, settings.optimizer.momentum
    if lr not in (None, default.lr):
        rates = ", ".join(f"schedule.options.{key}" for key in OWN_RATES[name].split(" and "))
        yield "optimizer.lr", f"optimizer.lr={lr:g} does nothing with schedule.name={name}, whose rates are {rates}"
    if momentum not in (None, default.momentum) and schedule.options.get("cycle_momentum", True):
        yield (
            "optimizer.momentum",
            f"optimizer.momentum={momentum:g} does nothing with schedule.name={name} without schedule.options.cycle_momentum=false",
        )


def idle_of_rule(settings: TrainConfig, rule: Rule) -> Iterator[tuple[str, str]]:
    """Yield the settings that this rule does not read, and its own idle options, also those given in Python."""
    yield from idle_options(rule.config, type(rule.config)(), "rule.")
    yield from _of_rule(settings, type(rule).__name__, rule.traits, rule.optimizer, rule.optimizer_keys)


def _of_rule(
    settings: TrainConfig, name: str, traits: Traits, default: OptimizerConfig, keys: tuple[str, ...] | None
) -> Iterator[tuple[str, str]]:
    update = traits.update
    if settings.optimizer.name != "auto" and _needs_closure(settings) and (update != "grad" or settings.accumulate > 1):
        why = f"this rule applies its updates itself ({update})" if update != "grad" else f"accumulate={settings.accumulate}"
        yield "optimizer.name", f"optimizer={settings.optimizer.name} computes the gradients several times a step, but {why}"
    if settings.accumulate > 1 and update != "grad":
        yield "accumulate", f"this rule applies its updates itself ({update}), so gradients cannot be accumulated: accumulate=1"
    if settings.clip.norm is not None and update == "in-place":
        yield "clip.norm", "this rule updates in place, so there are no gradients to clip: clip.norm=null"
    if keys is None and update == "in-place":
        keys = ("lr",)
    if keys is not None:
        yield from _unread(settings, name, keys, default)
        return
    try:
        yield from ((key, error.problems[0]) for key, error in untaken(settings.optimizer.over(default)))
    except UsageError:  # no such optimiser, which is reported elsewhere
        return


def _needs_closure(settings: TrainConfig) -> bool:
    try:
        return needs_closure(settings.optimizer)
    except UsageError:  # no such optimiser, which is reported elsewhere
        return False


def _unread(settings: TrainConfig, rule: str, keys: tuple[str, ...], default: OptimizerConfig) -> Iterator[tuple[str, str]]:
    read = f"it reads {', '.join(f'optimizer.{key}' for key in keys)} alone" if keys else "it has no optimiser"
    for item in dataclasses.fields(OptimizerConfig):
        value = getattr(settings.optimizer, item.name)
        unset: Any = item.default_factory() if callable(item.default_factory) else item.default
        # plain gradient descent has a rate and no other setting
        plain = item.name == "name" and str(value).lower() == "sgd" and keys == ("lr",)
        if item.name not in keys and not plain and value not in (unset, getattr(default, item.name)):
            yield f"optimizer.{item.name}", f"optimizer.{item.name}={text_of(value)} does nothing with the rule {rule}: {read}"
    if "lr" not in keys and settings.schedule != ScheduleConfig():
        yield "schedule", f"schedule.name={settings.schedule.name} does nothing with the rule {rule}: {read}"
