"""Trained rules from disk: predictions and networks without trainer, tracking or data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bpfree.config import allowing, recipe_of
from bpfree.leaves import Leaf
from bpfree.network.network import Network, evaluating
from bpfree.plugins import Plugins
from bpfree.recipe import Recipe
from bpfree.rule import Rule
from bpfree.step import Budget
from bpfree.tasks.check import check_inputs
from bpfree.tasks.task import TaskSpec
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
    def predict(self, x: Tensor, *, seed: int = 0) -> Tensor:
        """Scores (N, C) for inputs as the data set has them.

        Args:
            x: (N, *input_shape) raw inputs as in training, in any dtype; they are normalised here (``spec.normalise``).
            seed: of a stochastic rule's draws.

        Raises:
            UsageError: inputs of another shape or range than those of training, or that are not finite.
        """
        check_inputs(self.spec, x, "predict")
        device = next(self.rule.parameters()).device
        generator = torch.Generator(device).manual_seed(seed)
        with evaluating(self.rule):
            return self.rule.predict(self.spec.normalise(x.to(device), self.rule.network.dtype), generator)


def load(
    place: str | Path,
    *,
    rule: Rule | None = None,
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
        device: where to put it.
        output: folder of runs.
        changes: of the configuration, such as another kind of inference.
        allow_code: files of code that may be executed, for a run whose rule or network is named by its file.
        registry: of names; the installed plugins by default, with the files that are allowed.

    Raises:
        UsageError: no such checkpoint; or it names code in a file that is not allowed, or has changed.
        BpfreeError: it is corrupt, of another rule, or does not say how to build its rule.
    """
    path = find_checkpoint(place, output=output, prefer="selected")
    content = read_checkpoint(path, device=device)
    spec = TaskSpec(**content["task"])
    recipe = None
    if rule is None:
        registry = registry or allowing(files=allow_code)
        recipe = recipe_of(content["config"], changes, spec=spec, where=str(path), registry=registry)
        rule = recipe.build_rule(spec)
    check_rule(content, rule, path)
    with torch.random.fork_rng(devices=[]):  # phases may add parameters, and initialise them
        list(replay(rule, iter(rule.phases(Budget(**content["budget"]))), content))
    load_weights(rule, content, where=f"{path}: ")
    rule.to(device)
    return Saved(rule.eval(), spec, recipe, path)
