"""Recipes: complete configurations, from which task, rule and trainer are built."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from bpfree import yaml_values
from bpfree.code_files import CodeFile, CodeName, replaced
from bpfree.errors import UsageError
from bpfree.files import expanded
from bpfree.leaves import leaves_of
from bpfree.named_networks import naming
from bpfree.network.memory import built
from bpfree.objects import WholeTask
from bpfree.options import option
from bpfree.plugins import Plugins
from bpfree.redaction import is_redacted, redacted
from bpfree.rule import Rule
from bpfree.seeds import derive_in, seeded
from bpfree.tasks.augment import Augmentation, augmentation_names, named_augmentation
from bpfree.tasks.common import TaskCommon, described
from bpfree.tasks.quick import few
from bpfree.tasks.task import DataSource, Task, TaskSpec
from bpfree.tracking.config import PicturesConfig, TrackingConfig
from bpfree.training import environment
from bpfree.training.config import TrainConfig

__all__ = [
    "CHANGEABLE",
    "CHOSEN",
    "DataConfig",
    "Recipe",
    "RunConfig",
    "TaskCommon",
    "changed",
    "is_scientific",
    "quick_examples",
    "quickened",
]

LARGE = 4096
"""A size of a network above which its memory is checked before it is made."""

QUICK_BATCHES, QUICK_LEAST, QUICK_EPOCHS, QUICK_SECONDS = 3, 64, 10, 5.0
"""Of a smoke run: batches and least examples of each split, most passes and seconds of training. Each rule can train for 10 epochs."""

CHOSEN = ("rule", "network", "program", "task")
"""Sections whose options depend on their name; of a recipe either rule and network or a program."""

CHANGEABLE = {
    "budget",
    "evaluation",
    "checkpoint",
    "tracking",
    "pictures",
    "data",
    "device",
    "threads",
    "compile",
    "log_interval",
    "diagnostics",
    "alignment",
    "parallel",
}
"""Sections and keys that may change when a run is resumed."""

NOT_SCIENTIFIC = (CHANGEABLE - {"budget", "evaluation"}) | {"output"}
"""The length of training is part of the result, and so are the draws of an evaluation and the epochs that ``best-val`` chooses from."""

TELLING = {"rule.name", "network.name", "program.name", "task.name", "seed", "batch_size", "optimizer.name", "optimizer.lr"}
"""Settings by which runs are compared, whether or not they have their defaults."""


@dataclass
class DataConfig:
    """The source of the data, and how they reach the device."""

    root: str | None = option(None, "folder of data sets (none: the environment's BPFREE_DATA, else the user's cache)")
    resident: Literal["auto", "yes", "no"] = option("auto", "keep the set as tensors on the device (auto: if it fits)")
    workers: int = option(0, "processes that read a set which is not resident", ge=0, le=256, unless={"resident": ("yes",)})


@dataclass
class RunConfig(TrainConfig):
    """The settings outside the sections rule, network and task."""

    data: DataConfig = field(default_factory=DataConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    pictures: PicturesConfig = field(default_factory=PicturesConfig)
    diagnostics: list[str] = option(factory=list, help="diagnostics to switch on, by name")
    output: str = option("runs", "folder in which each run gets a folder of its own")
    quick: bool = option(False, "a smoke run: three batches of each split, at most 10 epochs; its results mean nothing")


@dataclass(frozen=True)
class Recipe:
    """A resolved configuration, from which the task, the rule and the trainer can be built.

    Attributes:
        names: of the rule, network and task, or of the program and task.
        options: their options, as instances of their configuration dataclasses.
        task: what every task has.
        settings: everything else.
        unused: shared settings (:class:`Leaf`) that this rule does not use, by key, each with the reason; they are left out of the rest.
        code: of what comes from a file, by section, or by its name in the network's options: its name with the file's path and the hash
            of its code.
    """

    names: Mapping[str, str]
    options: Mapping[str, Any]
    task: TaskCommon
    settings: RunConfig
    registry: Plugins = field(repr=False, compare=False)
    unused: Mapping[str, str] = field(default_factory=dict, compare=False)
    code: Mapping[str, str] = field(default_factory=dict, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as nested plain values, which ``resolve`` reads back; addresses are complete and must not be shown."""
        content = self._content()
        for section, name in self.code.items():
            if section in CHOSEN:
                content[section]["name"] = name
        if "network" in content:
            parts = {key: replaced(value, lambda code: self.code.get(code.text, code.text)) for key, value in content["network"].items()}
            content["network"] = parts | {"name": content["network"]["name"]}
        return content

    def _content(self) -> dict[str, Any]:
        """Return the recipe as nested plain values, with the short names of code from files."""
        kinds = [kind for kind in CHOSEN if kind in self.names]
        chosen = {kind: {"name": self.names[kind], **dataclasses.asdict(self.options[kind])} for kind in kinds}
        chosen["task"] |= dataclasses.asdict(self.task)
        return {**chosen, **dataclasses.asdict(self.settings)}

    @property
    def is_program(self) -> bool:
        """Whether a program trains, and no rule."""
        return "program" in self.names

    @property
    def trains(self) -> str:
        """Name of the rule, or of the program."""
        return self.names["program" if self.is_program else "rule"]

    def flat(self) -> dict[str, Any]:
        """Return ``{"rule.name": ..., "seed": ...}``; addresses are complete, and code from a file has the short name ``FILE.py:NAME``."""
        return _flat(self._content())

    def telling(self) -> tuple[str, ...]:
        """List the keys that say what a run is: names, seed, budget, batch size, learning rate, and all that differs from its default.

        Settings that change no result are left out (:data:`NOT_SCIENTIFIC`).
        """
        sections = {kind: default_values(type(options)) for kind, options in self.options.items()}
        sections["task"] |= dataclasses.asdict(TaskCommon())
        known = _flat({**dataclasses.asdict(RunConfig()), **sections})
        told = {leaf.key: leaf.value for leaf in leaves_of(self.recorded(), "", "") if leaf.value is not None and is_scientific(leaf.key)}
        return tuple(key for key, value in told.items() if key in TELLING or key.startswith("budget.") or known.get(key, MISSING) != value)

    @property
    def task_id(self) -> str:
        """The task's name, with the hash of its code where it comes from a file or was made in Python."""
        code = self.registry.owner("tasks", self.names["task"]).code
        return f"{self.names['task']} {code}" if code else self.names["task"]

    def recorded(self) -> dict[str, Any]:
        """Return the recipe for a record: nested, its addresses redacted."""
        return redacted(self.to_dict())  # type: ignore[no-any-return]

    def recorded_flat(self) -> dict[str, Any]:
        """Return the recipe for a record: flat, its addresses redacted."""
        return _flat(self.recorded())

    def to_yaml(self) -> str:
        """Return the recipe as YAML, its addresses redacted."""
        return yaml_values.dump(self.recorded())

    def code_files(self) -> list[CodeFile]:
        """List the files of code that define rule, network and task, each once."""
        paths = dict.fromkeys(code.path for name in self.code.values() if (code := CodeName.parse(name)) is not None)
        return [self.registry.given.files[path] for path in paths]

    def root(self) -> Path | None:
        """Return the folder of data sets, ``None`` for the data sets' own default."""
        import os

        place = self.settings.data.root or os.environ.get("BPFREE_DATA")
        return expanded(Path(place)) if place else None

    def pinned(self, rule: Rule) -> Recipe:
        """Return the recipe with the values that ``auto`` and ``none`` resolve to: the optimiser, and the number of threads."""
        optimizer = self.settings.optimizer.over(rule.optimizer)
        threads = self.settings.threads or torch.get_num_threads()
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, optimizer=optimizer, threads=threads))

    def spec(self) -> TaskSpec:
        """Return the task's spec without loading its data; constants and class weights from the data are placeholders.

        Raises:
            UsageError: an option of the task is an address that was recorded without its secrets.
        """
        self._refuse_redacted()
        source: DataSource = self.registry.get("tasks", self.names["task"])
        return described(source.spec(self.options["task"], self.root()), self.task, source.normalise)

    def build_task(self) -> Task:
        """Load the data and cut the splits.

        Raises:
            UsageError: an option of the task is an address that was recorded without its secrets.
        """
        self._refuse_redacted()
        source = self.registry.get("tasks", self.names["task"])
        if isinstance(source, WholeTask) and (task := source.task(self.options["task"], self.root())) is not None:
            self._refuse_cut()
            return self._shortened(task)
        return self._shortened(Task.from_source(source, self.options["task"], root=self.root(), **vars(self.task)))

    def _shortened(self, task: Task) -> Task:
        """Return the whole task, or that of a smoke run."""
        return few(task, quick_examples(self.settings)) if self.settings.quick else task

    def augmentations(self) -> list[Augmentation]:
        """Find the augmentations, with their options.

        Raises:
            UsageError: a name is not known, an option is not, or one is named twice.
        """
        find = partial(self.registry.get, "augmentations", where="task.augment")
        found = [named_augmentation(entry, find) for entry in self.task.augment]
        names = augmentation_names(self.task.augment)
        if twice := next((name for name in names if names.count(name) > 1), ""):
            raise UsageError(f"{twice} is named twice, and both would draw the same numbers", where="task.augment", fix="name it once")
        return found

    def _refuse_cut(self) -> None:
        default = TaskCommon()
        of_source = [item.name for item in dataclasses.fields(TaskCommon) if item.name not in ("augment", "sampling")]
        changed = [key for key in of_source if getattr(self.task, key) != getattr(default, key)]
        if changed:
            what = f"the task {self.names['task']!r} has a validation split of its own, and a spec, so that this does nothing"
            raise UsageError(what, where=", ".join(f"task.{key}" for key in changed), fix="leave it out")

    def _refuse_redacted(self) -> None:
        for key, value in _flat({"task": dataclasses.asdict(self.options["task"])}).items():
            if is_redacted(value):
                what = "an address was recorded without its user, password and query"
                raise UsageError(what, where=f"{key}={value}", fix=f"give it again: {key}=...")

    def build_rule(self, spec: TaskSpec) -> Rule:
        """Build the rule (or its own-prediction twin) on its network, on the CPU, initialised from seed and stream.

        The caller's random state stays.

        Raises:
            UsageError: the network's parameters do not fit the memory, or it does not fit the task.
        """
        with seeded(derive_in(self.settings.stream, self.settings.seed, "initialisation")), naming(self.registry):
            builder, kind = self.registry.get("networks", self.names["network"]), self.registry.get("rules", self.names["rule"])
            in_place = kind.traits_of(self.options["rule"]).update == "in-place"
            build = partial(builder.build, spec, self.options["network"])
            free = partial(environment.free_memory, self.settings.device)
            # to count what is made imports torch's compiler, which takes longer than to make most networks
            network = built(build, copies=1 if in_place else 2, free=free) if _may_be_large(self.options["network"]) else build()
            # a copy: what a rule does to its spec does not change how the task scores it
            rule: Rule = kind(network, copy.copy(spec), self.options["rule"])
        if self.settings.twin:
            rule.freeze_features()
        return rule


def _may_be_large(options: Any) -> bool:
    """Tell whether a size among a network's options, or the product of all, may need hundreds of MiB of parameters."""
    values = [getattr(options, item.name) for item in dataclasses.fields(options)]
    sizes = [sum(x for x in v if not isinstance(x, str)) if isinstance(v, list) else v for v in values if not isinstance(v, (bool, str))]
    known = [float(size) for size in sizes if isinstance(size, (int, float))]
    return max(known, default=0.0) > LARGE or math.prod(max(1.0, size) for size in known) > 64 * LARGE


def quick_examples(settings: RunConfig) -> int:
    """Count the examples of each split in a smoke run: three batches, and enough to hold some classes."""
    return max(QUICK_LEAST, QUICK_BATCHES * settings.batch_size)


def quickened(settings: RunConfig) -> RunConfig:
    """Shorten the budget of a smoke run, except one in operations, as the operations of a pass are unknown."""
    if not settings.quick:
        return settings
    budget, drawn = settings.budget, QUICK_EPOCHS * quick_examples(settings)
    short = dataclasses.replace(
        budget,
        epochs=budget.epochs and min(budget.epochs, QUICK_EPOCHS),
        samples=budget.samples and min(budget.samples, drawn),
        seconds=budget.seconds and min(budget.seconds, QUICK_SECONDS),
        forwards=budget.forwards and min(budget.forwards, 3 * drawn),
    )
    return dataclasses.replace(settings, budget=short)


def is_scientific(key: str) -> bool:
    """Tell whether a setting can change a result."""
    return key.split(".")[0] not in NOT_SCIENTIFIC


def default_values(config: type) -> dict[str, Any]:
    """Return the defaults of a configuration dataclass, ``MISSING`` for fields that have none."""
    fields = dataclasses.fields(config)
    return {item.name: item.default if item.default_factory is MISSING else item.default_factory() for item in fields}


def changed(before: Recipe, after: Recipe) -> list[str]:
    """List the recorded keys in which two recipes differ; the place and the version of a file of code do not count."""
    values, others = redacted(before.flat()), redacted(after.flat())
    return [key for key in dict.fromkeys([*values, *others]) if key not in values or key not in others or values[key] != others[key]]


def _flat(content: Mapping[str, Any]) -> dict[str, Any]:
    return {leaf.key: leaf.value for leaf in leaves_of(content, "", "")}
