"""Trained rules from disk: predictions and networks without trainer, tracking or data."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bpfree.code_files import CodeName
from bpfree.config import allowing, recipe_of
from bpfree.devices import explained
from bpfree.errors import BpfreeError, UsageError
from bpfree.leaves import Leaf
from bpfree.network.network import Network, evaluating
from bpfree.plugins import PluginRecord, Plugins, installed_plugins
from bpfree.recipe import Recipe
from bpfree.rule import Rule
from bpfree.step import Budget
from bpfree.tasks.check import check_inputs
from bpfree.tasks.given import as_batch
from bpfree.tasks.intervals import central
from bpfree.tasks.spec import CLASS, TaskSpec, has_own_loss, structure_from
from bpfree.tasks.stages import stages_from, walk
from bpfree.tasks.task import DataSource
from bpfree.tasks.trees import length, move, tree_map
from bpfree.training.checkpoint import check_rule, find_checkpoint, load_weights, read_checkpoint, replay
from bpfree.training.environment import device_of

__all__ = ["Saved", "load"]


BATCH_SIZE = 256
"""Examples that are predicted at a time by default."""
NAMED = ("classes", "soft", "multilabel")
"""Kinds of targets whose outputs are classes or labels."""
COUNTED = {"classes": "classes", "soft": "classes", "multilabel": "labels", "real": "real outputs", "tokens": "tokens", "none": "outputs"}

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, repr=False)
class Saved:
    """A trained rule, which predicts.

    Inputs are given as the data set has them, in any dtype, and normalised here: tensors, arrays of numpy or nested lists, one example
    or a batch of any size, or a tree of these where the task has such inputs. Grey images may lack the axis of channels; images may
    have their channels last. Batches are computed in parts, whose size makes no difference but to rounding, and to the draws of a
    stochastic rule.

    Attributes:
        rule: in eval mode.
        spec: of the task that it was trained on.
        recipe: the configuration of its run; ``None`` if it was made in Python.
        path: the checkpoint.
    """

    rule: Rule
    spec: TaskSpec
    recipe: Recipe | None
    path: Path

    def __repr__(self) -> str:
        name = self.recipe.names["rule"] if self.recipe is not None else type(self.rule).__name__
        inputs = "x".join(map(str, self.spec.input_shape)) or "several tensors"
        return (
            f"Saved({name} on {self.spec.name}: {inputs} -> {self.spec.outputs:,} {COUNTED[self.spec.targets]}; {self.device}; {self.path})"
        )

    @property
    def network(self) -> Network:
        """The trained network, a plain ``nn.Module`` that takes normalised inputs (``spec.normalise``).

        It predicts by itself only where its rule predicts by the network's outputs; that of ``noprop-dt``, say, needs its rule for it.
        """
        return self.rule.network

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(itertools.chain(self.rule.parameters(), self.rule.buffers())).device

    def to(self, device: str | torch.device) -> Saved:
        """Move it to another device, and return it.

        Raises:
            UsageError: the device is not on this machine, or has no float64, which the rule needs.
        """
        self.rule.to(device_of(self.rule, str(device)))
        return self

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes or labels, in the order of the scores: "0", "1" and so on where they have none; empty for other targets."""
        return tuple(map(self.spec.label, range(self.spec.outputs))) if self.spec.targets in NAMED else ()

    def predict(self, inputs: Any, *, batch_size: int = BATCH_SIZE, seed: int = 0) -> Tensor:
        """Predict outputs, such as scores (N, C), on the rule's device.

        Args:
            inputs: of one example, or of N.
            batch_size: examples that are computed at a time.
            seed: of a stochastic rule's draws, which are taken batch by batch.

        Returns:
            (N, ...) the rule's scores, higher is better, or real outputs; N is 1 for a single example.

        Raises:
            UsageError: inputs of another shape or range than those of training, that are not finite, or are no numbers.
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.cat([self._outputs(part, generator) for part in self._parts(inputs, batch_size, "predict")])

    def _parts(self, inputs: Any, batch_size: int, where: str) -> list[Any]:
        """Check inputs, and divide them into batches; one, empty, for no examples."""
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise UsageError(f"batch_size={batch_size!r}", where=where, fix="give a whole number of 1 or more")
        batch = as_batch(self.spec, inputs, where)
        check_inputs(self.spec, batch, where)
        return [_part(batch, part) for part in torch.arange(length(batch)).split(batch_size)]

    @torch.no_grad()
    def _outputs(self, batch: Any, generator: torch.Generator) -> Tensor:
        with evaluating(self.rule), explained(self.device, type(self.rule).__name__):
            return self.rule.predict(self.spec.normalise(move(batch, self.device), self.rule.network.dtype), generator)

    @torch.no_grad()
    def _drawn(self, batch: Any, draws: int, generator: torch.Generator) -> Tensor:
        with evaluating(self.rule), explained(self.device, type(self.rule).__name__):
            return self.rule.sample(self.spec.normalise(move(batch, self.device), self.rule.network.dtype), draws, generator)

    def sample(self, inputs: Any, draws: int = 99, *, batch_size: int = BATCH_SIZE, seed: int = 0) -> Tensor:
        """Draw real targets from the distribution that the rule predicts: (draws, N, ...), on its device.

        Args:
            inputs, batch_size, seed: as of :meth:`predict`.
            draws: for each example.

        Raises:
            UsageError: as of :meth:`predict`; or the rule has no distribution, or has not measured what it needs for it.
        """
        if why_not := self.rule.cannot_sample():
            raise UsageError(why_not, where=str(self.path), fix="train noprop-dt with task.validation or calibration.folds, for example")
        if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
            raise UsageError(f"draws={draws!r}", where="sample", fix="give a whole number of 1 or more")
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.cat([self._drawn(part, draws, generator) for part in self._parts(inputs, batch_size, "sample")], 1)

    def predict_interval(
        self, inputs: Any, level: float = 0.9, *, draws: int = 999, batch_size: int = BATCH_SIZE, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Predict the ends (N, ...) of the interval that a real target is in with probability ``level``, half of the rest on each side.

        They are quantiles of draws, for each entry of a target by itself.

        Args:
            inputs, batch_size, seed: as of :meth:`predict`.
            level: such as 0.9.
            draws: for each example; few of them make the ends unsteady.

        Raises:
            UsageError: as of :meth:`sample`; or a level that needs more draws.
        """
        return central(self.sample(inputs, draws, batch_size=batch_size, seed=seed), level)

    def predict_proba(self, inputs: Any, *, batch_size: int = BATCH_SIZE, seed: int = 0) -> Array:
        """Predict probabilities (N, C) of the classes; rows sum to one, except those of several labels at once.

        They are the softmax of the scores, or each label's sigmoid, which is what loss and calibration error (``ece``) take them for. The
        scores of most rules are logits or log-probabilities. Where they are something else, such as the norms of ``hebbian-norm``, the
        order of the classes is the rule's, but the numbers are no calibrated probabilities.

        Args:
            inputs, batch_size, seed: as of :meth:`predict`.

        Raises:
            UsageError: as of :meth:`predict`; or the task has no classes.
        """
        self._check_classes("predict_proba")
        scores = self.predict(inputs, batch_size=batch_size, seed=seed)
        return probabilities(self.spec, scores).numpy()

    def predict_classes(self, inputs: Any, *, batch_size: int = BATCH_SIZE, seed: int = 0) -> list[Any]:
        """Predict the class of each example: its name, or its number where classes have no names.

        Of several labels at once: a list of those whose probability is above one half, for each example.

        Args:
            inputs, batch_size, seed: as of :meth:`predict`.

        Raises:
            UsageError: as of :meth:`predict_proba`.
        """
        self._check_classes("predict_classes")
        names: Sequence[Any] = self.spec.class_names or range(self.spec.outputs)
        return decided(self.spec, self.predict(inputs, batch_size=batch_size, seed=seed), names)

    def _check_classes(self, where: str) -> None:
        if self.spec.targets not in NAMED or (has_own_loss(self.spec) and self.spec.targets != "classes"):
            what = f"the task {self.spec.name} has no classes: its targets are {self.spec.targets}"
            raise UsageError(what, where=where, fix="use predict, which returns the outputs")


def probabilities(spec: TaskSpec, scores: Tensor) -> Tensor:
    """Return probabilities (N, C), float64 on the CPU, of scores of classes (softmax) or of several labels (sigmoid)."""
    exact = scores.cpu().double()
    return exact.sigmoid() if spec.targets == "multilabel" else exact.softmax(1)


def decided(spec: TaskSpec, scores: Tensor, names: Sequence[Any]) -> list[Any]:
    """Return the name of each example's best class, or the names of all labels with a positive score."""
    if spec.targets == "multilabel":
        return [[name for name, chosen in zip(names, row, strict=True) if chosen] for row in (scores > 0).tolist()]
    return [names[place] for place in scores.argmax(1).tolist()]


def _part(batch: Any, places: Tensor) -> Any:
    """Take consecutive examples without a copy."""
    first = int(places[0]) if len(places) else 0
    return tree_map(lambda leaf: leaf[first : first + len(places)], batch)


def spec_of(content: Mapping[str, Any], path: Path) -> TaskSpec:
    """Read the spec of a checkpoint's task.

    A subclass is the one that is imported under its recorded name, or that the module of an installed plugin has; others are never
    imported, since a checkpoint may come from anybody.

    Raises:
        BpfreeError: the class is not known here, or takes other fields.
    """
    values = {key: value for key, value in content.items() if key != CLASS}
    values["structure"] = structure_from(values.get("structure"))
    kind, address = TaskSpec, str(content.get(CLASS, ""))
    if address:
        found = _class_at(address)
        if found is None:
            raise BpfreeError(
                f"the task has a spec of its own, {address}, which is not imported here",
                where=str(path),
                fix="import its module first, or give it: bpfree.load(..., spec=...)",
            )
        kind = found
    try:
        return kind(**values)
    except TypeError as error:
        fix = "give the spec: bpfree.load(..., spec=...)"
        raise BpfreeError(
            f"the spec {address or 'TaskSpec'} of the checkpoint cannot be made: {error}", where=str(path), fix=fix
        ) from error


def _class_at(address: str) -> type[TaskSpec] | None:
    name, _, place = address.partition(":")
    plugins = {record.path for record in installed_plugins().records.values() if record.path}
    if name not in sys.modules and any(_belongs(name, Path(path)) for path in plugins):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    found: Any = sys.modules.get(name)
    for part in place.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) and issubclass(found, TaskSpec) else None


def _belongs(module: str, plugin: Path) -> bool:
    """Tell whether a module is of the package whose ``__init__.py`` (or module of its own) registers a plugin."""
    return module.partition(".")[0] == (plugin.parent.name if plugin.name == "__init__.py" else plugin.stem)


def _knowing(registry: Plugins, config: Mapping[str, Any], spec: TaskSpec, path: Path) -> Plugins:
    """Let the name of a task that was made in Python stand for its spec: its data are not needed.

    Raises:
        BpfreeError: rule or network is not registered here.
    """
    for kind in ("rule", "network", "task"):
        name = str(config.get(kind, {}).get("name", ""))
        if not name or name in registry.names(f"{kind}s") or CodeName.parse(name) is not None:
            continue
        if kind == "task":
            return registry.knowing("tasks", name, DataSource(lambda options, root: spec, _no_data), PluginRecord("Python", "Python", "?"))
        what = f"the run's {kind} {name!r} was made in Python, or its plugin is not installed here"
        raise BpfreeError(what, where=str(path), fix="build the rule with its network, and give it: bpfree.load(path, rule=rule)")
    return registry


def _no_data(options: Any, root: Path | None) -> Any:
    raise BpfreeError("the data were made in Python", where="task", fix="load them there")


def load(
    place: str | Path,
    *,
    rule: Rule | None = None,
    spec: TaskSpec | None = None,
    device: str | torch.device = "cpu",
    output: str | Path = "runs",
    changes: Iterable[Leaf] = (),
    allow_code: Iterable[str | Path] = (),
    registry: Plugins | None = None,
) -> Saved:
    """Load the tested weights of a run, or a checkpoint.

    Args:
        place: a run's folder, its name under ``output``, or a checkpoint file.
        rule: built in Python, for a run whose rule or network was.
        spec: of the task, for a run of a task of your own whose class is not imported.
        device: where to put it; also ``auto``.
        output: folder of runs.
        changes: of the configuration, such as another kind of inference.
        allow_code: files of code that may be executed, for a run whose rule or network is named by its file.
        registry: of names; the installed plugins by default, with the files that are allowed.

    Raises:
        UsageError: no such checkpoint; or it names code in a file that is not allowed, or has changed.
        BpfreeError: it is corrupt, of another rule, or lacks what is needed to build its rule.
    """
    path = find_checkpoint(place, output=output, prefer="selected")
    content = read_checkpoint(path)
    spec = spec_of(content["task"], path) if spec is None else spec
    recipe = None
    if rule is None:
        registry = _knowing(registry or allowing(files=allow_code), content["config"] or {}, spec, path)
        recipe = recipe_of(content["config"], changes, spec=spec, where=str(path), registry=registry)
        rule = recipe.build_rule(spec)
    check_rule(content, rule, path)
    with torch.random.fork_rng(devices=[]):  # phases may add parameters, and initialise them
        list(replay(rule, walk(rule, Budget(**content["budget"]), stages_from(content.get("stages", ()))), content))
    load_weights(rule, content, where=f"{path}: ")
    rule.to(device_of(rule, str(device)))
    return Saved(rule.eval(), spec, recipe, path)
