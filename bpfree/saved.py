"""Trained rules from disk: predictions and networks without trainer, tracking or data."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bpfree.config import allowing, recipe_of
from bpfree.errors import BpfreeError
from bpfree.leaves import Leaf
from bpfree.network.network import Network, evaluating
from bpfree.plugins import Plugins, installed_plugins
from bpfree.recipe import Recipe
from bpfree.rule import Rule
from bpfree.step import Budget
from bpfree.tasks.check import check_inputs
from bpfree.tasks.spec import CLASS, TaskSpec, structure_from
from bpfree.tasks.stages import stages_from, walk
from bpfree.tasks.trees import move
from bpfree.training.checkpoint import check_rule, find_checkpoint, load_weights, read_checkpoint, replay

__all__ = ["Saved", "load"]


@dataclass(frozen=True)
class Saved:
    """A trained rule.

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

    @property
    def network(self) -> Network:
        """The trained network, a plain ``nn.Module`` that takes normalised inputs (``spec.normalise``)."""
        return self.rule.network

    @torch.no_grad()
    def predict(self, x: Any, *, seed: int = 0) -> Tensor:
        """Predict outputs, such as scores (N, C), for inputs as the data set has them.

        Args:
            x: (N, *input_shape) raw inputs as in training, in any dtype, or a tree of tensors where the task has such inputs; they are
                normalised here (``spec.normalise``).
            seed: of a stochastic rule's draws.

        Raises:
            UsageError: inputs of another shape or range than those of training, or that are not finite.
        """
        check_inputs(self.spec, x, "predict")
        device = next(self.rule.parameters()).device
        generator = torch.Generator(device).manual_seed(seed)
        with evaluating(self.rule):
            return self.rule.predict(self.spec.normalise(move(x, device), self.rule.network.dtype), generator)


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
        device: where to put it.
        output: folder of runs.
        changes: of the configuration, such as another kind of inference.
        allow_code: files of code that may be executed, for a run whose rule or network is named by its file.
        registry: of names; the installed plugins by default, with the files that are allowed.

    Raises:
        UsageError: no such checkpoint; or it names code in a file that is not allowed, or has changed.
        BpfreeError: it is corrupt, of another rule, or lacks what is needed to build its rule.
    """
    path = find_checkpoint(place, output=output, prefer="selected")
    content = read_checkpoint(path, device=device)
    spec = spec_of(content["task"], path) if spec is None else spec
    recipe = None
    if rule is None:
        registry = registry or allowing(files=allow_code)
        recipe = recipe_of(content["config"], changes, spec=spec, where=str(path), registry=registry)
        rule = recipe.build_rule(spec)
    check_rule(content, rule, path)
    with torch.random.fork_rng(devices=[]):  # phases may add parameters, and initialise them
        list(replay(rule, walk(rule, Budget(**content["budget"]), stages_from(content.get("stages", ()))), content))
    load_weights(rule, content, where=f"{path}: ")
    rule.to(device)
    return Saved(rule.eval(), spec, recipe, path)
