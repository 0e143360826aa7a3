"""What is examined: a rule with its settings, and the small instances of it that measurements need."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bpfree.config import resolve
from bpfree.errors import BpfreeError, UsageError
from bpfree.leaves import Leaf, canonical, parse_words
from bpfree.plugins import PluginRecord, Plugins, installed_plugins
from bpfree.recipe import Recipe
from bpfree.rule import Rule
from bpfree.seeds import seeded
from bpfree.step import Batch
from bpfree.tasks.spec import TargetKind, TaskSpec, has_own_loss
from bpfree.tasks.task import Split, Task
from bpfree.tasks.trees import select, tree_map

__all__ = ["KINDS", "Specimen", "Subject", "examples"]

KINDS = ("dense", "convolutional")
"""Kinds of networks that a rule's specimens may have."""
OUTPUTS = 5


@dataclasses.dataclass(frozen=True)
class Specimen:
    """Which small instance of a rule.

    Attributes:
        kind: of network, one of ``KINDS``.
        depth: hidden blocks.
        width: units, or channels, of each.
        image: width of its square inputs of one channel.
        targets: their kind.
        own: the spec of the task that the rule names in its specimen, in place of made-up images.
    """

    kind: str = "dense"
    depth: int = 4
    width: int = 32
    image: int = 8
    targets: TargetKind = "classes"
    own: TaskSpec | None = None

    @property
    def spec(self) -> TaskSpec:
        """A task of made-up images and five outputs, or the rule's own."""
        return self.own or TaskSpec("probe", (1, self.image, self.image), OUTPUTS, targets=self.targets)


class Subject:
    """A rule under examination.

    Args:
        rule: its registered name, or a class.
        settings: ``KEY=VALUE`` words over the rule's configuration; the certificate names them.
        registry: of names; the installed plugins by default.

    Attributes:
        name: of the rule.
        rule: its class.
        owner: the plugin that registered it.
        settings: as given.

    Raises:
        UsageError: an unknown rule or key.
    """

    def __init__(self, rule: str | type[Rule], settings: Iterable[str] = (), registry: Plugins | None = None) -> None:
        self.registry = registry or installed_plugins()
        if not isinstance(rule, str):
            self.registry = self.registry.including(rule)
            rule = rule.__name__
        self.name = rule
        self.rule: type[Rule] = self.registry.get("rules", rule)
        self.owner: PluginRecord = self.registry.owner("rules", rule)
        self.settings = tuple(settings)
        self._leaves = parse_words(self.settings)
        foreign = [leaf.key for leaf in self._leaves if leaf.key.split(".")[0] not in ("rule", "network")]
        if foreign:
            raise UsageError(
                "a certificate is of a rule, so only its own settings can be given", where=", ".join(foreign), fix="rule.KEY=VALUE"
            )
        if any(canonical(leaf.key, leaf.value) == "rule.name" for leaf in self._leaves):
            raise UsageError("the settings name a rule, beside the one that is examined", where="rule", fix=f"leave it out: {rule}")
        self._recipes: dict[tuple[str, TaskSpec | None], Recipe] = {}
        self.recipe = self.resolve({})

    def resolve(self, settings: Mapping[str, Any], spec: TaskSpec | None = None) -> Recipe:
        """Resolve the rule's recipe with its settings and further ones, once; each call gets its own options."""
        key = (repr(sorted(settings.items())), spec)
        if key not in self._recipes:
            more = [Leaf(name, value, "certificate") for name, value in settings.items()]
            self._recipes[key] = resolve([Leaf("rule.name", self.name, "certificate"), *self._leaves, *more], self.registry, spec=spec)
        found = self._recipes[key]
        return dataclasses.replace(found, options=copy.deepcopy(found.options))  # an instance may write into its configuration

    # --- its tasks ------------------------------------------------------------------------------------------------------

    @property
    def views(self) -> int:
        """How many views of each example its batches have."""
        return int(self.rule.traits_of(self.recipe.options["rule"]).views)

    @property
    def targets(self) -> TargetKind:
        """The kind of targets that it is examined with: classes, or the first that it takes."""
        known = self.rule.traits_of(self.recipe.options["rule"]).targets
        return "classes" if "classes" in known or not known else known[0]  # type: ignore[return-value]

    @cached_property
    def task_settings(self) -> dict[str, Any]:
        """Settings of the task that the rule names in its specimen, for data that are no images; empty: none."""
        found: dict[str, Any] = {}
        for kind in KINDS:
            settings = self.rule.specimen(kind, 2, 8) or {}
            found = found or {key: value for key, value in settings.items() if key.split(".")[0] == "task"}
        return found

    @property
    def own_network(self) -> dict[str, Any]:
        """Settings of task and network for whole runs of a rule that names a task in its specimen; the user's network goes first."""
        if not self.task_settings:
            return {}
        given = any(leaf.key.split(".")[0] == "network" for leaf in self._leaves)
        small = self.rule.specimen(self.kind(), 2, 16) or {}
        network = {} if given else {key: value for key, value in small.items() if key.split(".")[0] == "network"}
        return {**self.task_settings, **network}

    @property
    def names_code(self) -> bool:
        """Whether a setting names code in a file, perhaps by a relative path."""
        values = [*(leaf.value for leaf in self._leaves), *self.own_network.values()]
        return any(isinstance(value, str) and ".py:" in value for value in values)

    @cached_property
    def own_task(self) -> Task | None:
        """The task that the rule names in its specimen."""
        return self.resolve(self.task_settings).build_task() if self.task_settings else None

    def specimen(self, kind: str = "dense", depth: int = 4, width: int = 32, image: int = 8) -> Specimen:
        """Describe a small instance, with the data and targets that the rule takes."""
        return Specimen(kind, depth, width, image, self.targets, None if self.own_task is None else self.own_task.spec)

    def fitted(self, specimen: Specimen) -> Specimen:
        """Return the specimen with the data and targets that the rule takes."""
        return self.specimen(specimen.kind, specimen.depth, specimen.width, specimen.image)

    @property
    def config(self) -> dict[str, Any]:
        """The rule's configuration in full, as plain values."""
        return dataclasses.asdict(self.recipe.options["rule"])

    def specimen_settings(self, specimen: Specimen) -> dict[str, Any]:
        """Return the settings that make the specimen.

        Raises:
            UsageError: the rule has none of this kind.
        """
        settings = self.rule.specimen(specimen.kind, specimen.depth, specimen.width)
        if settings is None:
            raise UsageError(f"{self.name} has no specimen of kind {specimen.kind!r}")
        return dict(settings)

    def build(self, specimen: Specimen, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Rule:
        """Build a freshly initialised small instance, on the CPU, in train mode.

        Raises:
            UsageError: the rule does not take such a network.
        """
        recipe = self.resolve({**self.specimen_settings(specimen), "seed": seed}, specimen.spec)
        return recipe.build_rule(specimen.spec).to(dtype).train()

    def kinds(self) -> list[str]:
        """Return the kinds of networks that the rule takes."""
        return [kind for kind in KINDS if self._refusal(kind) is None]

    def _refusal(self, kind: str) -> UsageError | None:
        """Say why the rule refuses a kind of network; ``None`` if it takes it."""
        try:
            self.build(self.specimen(kind, depth=2, width=8))
        except UsageError as error:
            return error
        return None

    def kind(self) -> str:
        """Return the first kind of network that the rule takes.

        Raises:
            BpfreeError: there is none.
        """
        refusals: list[UsageError] = []
        for kind in KINDS:
            refusal = self._refusal(kind)
            if refusal is None:
                return kind
            refusals.append(refusal)
        raise BpfreeError(
            f"no small instance of {self.name!r} can be built, so nothing can be measured: {refusals[0].what}",
            where=f"{self.rule.__module__}.{self.rule.__qualname__}.specimen",
            fix="return settings of a network that the rule takes from Rule.specimen",
        ) from refusals[0]


def examples(spec: TaskSpec, count: int, *, seed: int = 0) -> Split:
    """Make examples: for classes of images noise around a mean for each, else the spec's own, in single precision."""
    with seeded(seed):
        if spec.targets == "classes" and spec.takes_real_tensors and not has_own_loss(spec):
            targets = torch.arange(count) % spec.outputs
            centres = torch.randn(spec.outputs, *spec.input_shape)
            inputs = centres[targets] + 0.5 * torch.randn(count, *spec.input_shape)
            return Split(inputs, targets)
        generator = torch.Generator().manual_seed(seed)
        return Split(spec.example(count, generator), spec.example_targets(count, generator))


def batches(spec: TaskSpec, size: int, count: int, *, dtype: torch.dtype, seed: int = 1, views: int = 1) -> list[Batch]:
    """Make n different batches of made-up examples, with several views of each where a rule asks for them."""
    split = examples(spec, size * count, seed=seed)
    inputs = tree_map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, split.inputs)
    targets = split.targets
    if targets is not None and targets.is_floating_point():
        targets = targets.to(dtype)
    parts = [torch.arange(start, start + size) for start in range(0, size * count, size)]
    made = [Batch(select(inputs, part), None if targets is None else targets[part]) for part in parts]
    return [with_views(batch, views, seed + place) for place, batch in enumerate(made)]


def with_views(batch: Batch, count: int, seed: int = 0) -> Batch:
    """Give a batch several views of each example: itself, and others with a little noise on real numbers."""
    if count == 1:
        return batch
    generator = torch.Generator().manual_seed(seed)

    def noised(leaf: Tensor) -> Tensor:
        return leaf + 0.1 * torch.randn(leaf.shape, generator=generator).to(leaf) if leaf.is_floating_point() else leaf

    others = [tree_map(noised, batch.inputs) for _ in range(count - 1)]
    return dataclasses.replace(batch, views=(batch.inputs, *others))
