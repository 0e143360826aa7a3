"""Recipes of runs that are made in Python: what their rule, network and task are, and whether they can be built again from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from bpfree.options import NoOptions, checked
from bpfree.plugins import Plugins, installed_plugins
from bpfree.recipe import DataConfig, Recipe, RunConfig
from bpfree.remembered import builder_of
from bpfree.rule import Rule
from bpfree.tasks.augment import Augmentation
from bpfree.tasks.common import TaskCommon
from bpfree.tasks.loading import Loading
from bpfree.tasks.task import Task
from bpfree.training.config import TrainConfig

__all__ = ["python_recipe", "registered_task", "run_config"]


def run_config(config: TrainConfig | None, tracking: Any = None) -> RunConfig:
    """Return the settings of a run: those given, and the defaults of a run from the command line for the rest.

    Args:
        config: a :class:`RunConfig`, or options of training alone.
        tracking: its options, or whether the run is tracked; ``None``: as ``config`` says.

    Raises:
        UsageError: values of another type, or out of their range.
    """
    own = RunConfig() if config is None else config
    settings = own if isinstance(own, RunConfig) else RunConfig(**{item.name: getattr(own, item.name) for item in dataclasses.fields(own)})
    if isinstance(tracking, bool):
        tracking = dataclasses.replace(settings.tracking, enabled=tracking)
    return checked(settings if tracking is None else dataclasses.replace(settings, tracking=tracking))


def python_recipe(
    rule: Rule, task: Task, settings: RunConfig, augment: Iterable[Augmentation] = (), loading: Loading | None = None
) -> tuple[Recipe, bool]:
    """Describe what was made in Python as a recipe, by registered names where they are known.

    Args:
        rule, task: of the run.
        settings: of the run.
        augment, loading: of its batches.

    Returns:
        The recipe, and whether rule and network can be built from it: a registered rule on a network that remembers its builder.
    """
    registry, kind = installed_plugins(), type(rule)
    name = next((name for name, known, _ in registry.items("rules") if known is kind), "")
    if not name:
        name, registry = kind.__name__, registry.including(kind)
    built = builder_of(rule.network)
    network, options = built or (type(rule.network).__name__, NoOptions())
    data, own, common = _data(task, registry, list(augment))
    if loading is not None:
        resident = {None: "auto", True: "yes", False: "no"}[loading.resident]
        reading = DataConfig(settings.data.root, resident, loading.workers)  # type: ignore[arg-type]
        settings, common = dataclasses.replace(settings, data=reading), dataclasses.replace(common, sampling=loading.sampling)
    names = {"rule": name, "network": network, "task": data}
    recipe = Recipe(names, {"rule": rule.config, "network": options, "task": own}, common, settings, registry)
    return recipe, built is not None and registry.owner("rules", name).name in installed_plugins().records


def registered_task(task: Task, registry: Plugins) -> tuple[str, Any, TaskCommon] | None:
    """Return the registered name of the data set that a task was loaded from, with its options; ``None`` if it has none."""
    if task.origin is None:
        return None
    source, options, common = task.origin
    return next(((name, options, common) for name, known, _ in registry.items("tasks") if known is source), None)


def _data(task: Task, registry: Plugins, augment: list[Augmentation]) -> tuple[str, Any, TaskCommon]:
    """Return the name of the task and its options; a task that cannot be loaded by its name has one that says so."""
    known = {id(each): name for name, each, _ in registry.items("augmentations")}
    if (found := registered_task(task, registry)) is not None and all(id(each) in known for each in augment):
        name, options, common = found
        return name, options, dataclasses.replace(common, augment=[known[id(each)] for each in augment])
    taken = task.spec.name in registry.names("tasks")
    return f"{task.spec.name} (Python)" if taken else task.spec.name, NoOptions(), TaskCommon()
