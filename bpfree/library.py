"""Train by name or by object in one call: :func:`train`, for Python programs and notebooks."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bpfree import runner
from bpfree.config import resolve
from bpfree.document.content import Part, Section, Table
from bpfree.document.view import html_view
from bpfree.errors import UsageError
from bpfree.leaves import Leaf, canonical, last_said, leaves_of, once
from bpfree.network.builders import NetworkBuilder
from bpfree.network.network import Network
from bpfree.network.split import split
from bpfree.options import NoOptions
from bpfree.plugins import PluginRecord, Plugins, installed_plugins
from bpfree.python_recipe import registered_task
from bpfree.recorded import known_run
from bpfree.rule import Rule
from bpfree.run import Run
from bpfree.saved import Saved, load
from bpfree.study.comparing import leaves_in
from bpfree.study.things import Things
from bpfree.tasks.task import DataSource, Task, TaskSpec
from bpfree.tracking.plots import curves
from bpfree.training.checkpoint import find_checkpoint

__all__ = ["Trained", "train"]

ORIGIN = "train"
SHORT = {"epochs": "budget.epochs", "lr": "optimizer.lr"}
"""Words that stand for a key within a section."""


def train(
    rule: str | type[Rule] | None = None,
    *,
    task: str | Task | DataSource | Callable[..., Any] | None = None,
    network: str | nn.Module | NetworkBuilder | Callable[..., Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    callbacks: Iterable[Any] = (),
    progress: bool = True,
    resume: str | Path | None = None,
    **words: Any,
) -> Trained:
    """Train one rule on one task, test it once, and record and track the run, as ``bpfree train`` does.

    Args:
        rule: a name, perhaps with settings (``"dfa,rule.scale=0.3"``), or a class.
        task: a name, a task, or a function that returns one or ``(train, test)``; ``None``: digits.
        network: a name; a module, whose copy is trained from the module's weights; a subclass of ``nn.Module``, or a function that returns
            a network or module; ``None``: what the rule asks for.
        settings: by dotted key, or nested: ``{"rule.scale": 0.3, "optimizer": {"lr": 0.01}}``.
        callbacks: functions that are called after each epoch, and objects with methods named as hooks (docs/python.md).
        progress: show a summary and the progress.
        resume: a run to resume: its folder, its name, or a checkpoint; rule, task and network need not be given, unless they are objects.
        words: further settings: ``epochs=5`` (``budget.epochs``), ``lr=0.01`` (``optimizer.lr``), ``seed=1``, ``batch_size=32``,
            ``budget={"seconds": 60}``, ``tracking=False``, and any other key.

    Returns:
        The trained rule with its record, which a notebook shows with curves.

    Raises:
        UsageError: with every problem, before anything is loaded.
        Interrupted: after a checkpoint was saved.
        BpfreeError: whatever ends it before its result.
    """
    things = Things(installed_plugins())
    chosen = [*_rule(rule, things), *_task(task, things)]
    chosen += [] if network is None else [Leaf("network.name", _network(network, things), ORIGIN)]
    leaves = once(leaf for given in (settings or {}, words) for leaf in leaves_of(_plain(given), "", ORIGIN))
    loaded = task if isinstance(task, Task) and registered_task(task, installed_plugins()) is not None else None  # need not be loaded again
    options: dict[str, Any] = {"quiet": not progress, "callbacks": callbacks, "task": loaded}
    if resume is None:
        if rule is None:
            raise UsageError("no rule to train", where="train()", fix="name one, such as bpfree.train('dfa'); bpfree rules lists them")
        return Trained(runner.run(resolve([*chosen, *leaves], things.registry), **options), things.registry)
    output = last_said(leaves, "output", "runs")
    before = known_run(find_checkpoint(resume, output=output).parent.parent)
    same = {} if before is None else before.config
    changes = [leaf for leaf in [*chosen, *leaves] if same.get(canonical(leaf.key, leaf.value), NoOptions) != leaf.value]
    return Trained(runner.resume(str(resume), output=output, changes=changes, registry=things.registry, **options), things.registry)


def _rule(rule: Any, things: Things) -> list[Leaf]:
    if isinstance(rule, Rule):
        fix = "give its class or its name, or train the object: bpfree.Trainer(rule, task).fit()"
        raise UsageError(f"the rule is an object of {type(rule).__name__}, with a network of its own", where="train(rule=...)", fix=fix)
    if isinstance(rule, str):
        return [dataclasses.replace(leaf, key=canonical(leaf.key, leaf.value), word=False) for leaf in leaves_in(rule)]
    return [] if rule is None else [Leaf("rule.name", things.name("rules", rule), ORIGIN)]


def _task(task: Any, things: Things) -> list[Leaf]:
    if isinstance(task, Task) and (found := registered_task(task, things.registry)) is not None:
        name, options, common = found
        return [*leaves_of({"task": {"name": name, **dataclasses.asdict(options), **dataclasses.asdict(common)}}, "", ORIGIN)]
    return [] if task is None else [Leaf("task.name", things.name("tasks", task), ORIGIN)]


def _network(network: Any, things: Things) -> str:
    """Name a network; of a module each run trains a copy."""
    if not isinstance(network, nn.Module):
        return things.name("networks", network)
    module = network

    def build(spec: TaskSpec, config: Any) -> Network:
        copied = copy.deepcopy(module)
        return copied if isinstance(copied, Network) else split(copied, spec.input_shape)

    kind = type(module)
    name = f"{kind.__name__} (Python)"
    owner = PluginRecord(kind.__module__, kind.__module__, "?", code="object")
    things.registry = things.registry.knowing("networks", name, NetworkBuilder(build, NoOptions, "a module made in Python"), owner)
    return name


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Convert what people write in Python to nested plain values: dataclasses, paths, numbers of numpy, words for keys."""
    return {SHORT.get(key, key): _value(key, value) for key, value in settings.items()}


def _value(key: str, value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if key == "tracking" and isinstance(value, bool):
        return {"enabled": value}
    if isinstance(value, Path) or type(value).__name__ == "device":
        return str(value)
    return value.item() if getattr(value, "ndim", None) == 0 else value


class Trained:
    """A run of :func:`train`, with the rule that it trained.

    Attributes:
        run: its record: status, tags, configuration, folder.
    """

    def __init__(self, run: Run, registry: Plugins) -> None:
        self.run, self._registry = run, registry

    @property
    def result(self) -> dict[str, float]:
        """Metrics of the end: ``test/accuracy``, ``train/seconds`` and so on."""
        return self.run.result

    @property
    def history(self) -> list[dict[str, float]]:
        """Metrics of each epoch, which ``pandas.DataFrame`` takes."""
        return self.run.history

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        assert self.run.folder is not None
        return self.run.folder

    @cached_property
    def saved(self) -> Saved:
        """The trained rule, which predicts; read from the run's checkpoint."""
        return load(self.folder, registry=self._registry)

    @property
    def network(self) -> Network:
        """The trained network."""
        return self.saved.network

    def predict(self, inputs: Any) -> Tensor:
        """Predict scores (N, C) or real values for inputs as the data set has them (:meth:`bpfree.Saved.predict`)."""
        return self.saved.predict(inputs)

    def _facts(self) -> Iterator[tuple[str, str]]:
        """Yield what a reader wants to know first, with its name."""
        run = self.run
        yield "status", f"{run.status}{f': {run.reason}' if run.reason else ''}"
        for split_, name in (("test", "test"), ("val", "validation")):
            for metric, value in run.scores(split_):
                seen = [each for metrics in run.history if not math.isnan(each := metrics.get(f"{split_}/{metric.name}", math.nan))]
                best = f" (best {metric.text(metric.best(seen))})" if seen else ""
                yield f"{name} {metric.name.replace('_', ' ')}", f"{metric.text(value)}{best}"
        seconds = f" in {run.result['train/seconds']:.1f} s" if "train/seconds" in run.result else ""
        yield "training", f"{run.epoch} epoch{'s' if run.epoch != 1 else ''}{seconds}"
        yield "folder", str(run.folder)

    def __repr__(self) -> str:
        return f"Trained({self.run.name}: {'; '.join(f'{name} {text}' for name, text in self._facts())})"

    def _repr_html_(self) -> str:
        parts: list[Part] = [Table([], [list(fact) for fact in self._facts()], words=(0, 1), name="result")]
        figure = curves(self.run)
        return html_view(self.run.name, [Section("", [*parts, *([figure] if figure is not None else [])])])
