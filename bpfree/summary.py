"""A summary of a run before it trains: data, network, rule, optimiser, device, record."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TextIO

from torch import nn

from bpfree.hooks import hookimpl
from bpfree.network.network import Network
from bpfree.recipe import Recipe
from bpfree.redaction import redact
from bpfree.rule import Rule
from bpfree.run import Run
from bpfree.tasks.check import named
from bpfree.tasks.task import Task, TaskSpec, meaning
from bpfree.tracking.notebook import output
from bpfree.tracking.progress import print_line
from bpfree.training.environment import device_of

__all__ = ["SummaryDisplay", "summary"]

Lines = Sequence[tuple[str, str]]
FEW_BLOCKS = 8


def summary(recipe: Recipe, task: Task, rule: Rule, run: Run, trackers: Iterable[str]) -> Lines:
    """Return name and text of each line.

    Args:
        recipe: the configuration, with what ``auto`` stands for (:meth:`Recipe.pinned`).
        task, rule: as built.
        run: whose folder is known.
        trackers: where else it is recorded, a phrase each.
    """
    names, settings = recipe.names, recipe.settings
    device = device_of(rule, settings.device)
    threads = f", {settings.threads} thread{'s' if settings.threads != 1 else ''}" if device.type == "cpu" else ""
    return [
        ("data", f"{names['task']}: {_examples(task)}; inputs {' x '.join(map(str, task.spec.input_shape))}; {_targets(task.spec)}"),
        ("network", f"{names['network']}: {_blocks(rule.network)}; {_parameters(rule)}"),
        ("rule", f"{names['rule']}{', own-prediction twin' if settings.twin else ''}"),
        ("optimiser", f"{_optimiser(recipe, rule)}; batches of {settings.batch_size:,}; {_budget(recipe)}"),
        ("device", f"{device}{threads}, {settings.precision}"),
        *([("recorded in", "; ".join([str(run.folder), *map(redact, trackers)]))] if run.folder is not None else []),
    ]


def _examples(task: Task) -> str:
    splits = {"training": task.train, "validation": task.validation, "test": task.test}
    counted = [f"{len(split):,} {name}" if split is not None else f"no {name}" for name, split in splits.items()]
    return f"{', '.join(counted)} examples"


def _targets(spec: TaskSpec) -> str:
    return meaning(spec, named(spec, range(spec.outputs)) if spec.class_names else "")


def _blocks(network: Network) -> str:
    names = network.names
    listed = ", ".join(names) if len(names) <= FEW_BLOCKS else f"{names[0]}, {names[1]}, ..., {names[-1]}"
    return f"{len(names)} block{'s' if len(names) != 1 else ''} ({listed})"


def _parameters(rule: Rule) -> str:
    count, own = _count(rule.network), _count(rule) - _count(rule.network)
    return f"{count:,} parameters" + (f", and {own:,} of the rule" if own else "")


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _optimiser(recipe: Recipe, rule: Rule) -> str:
    """Describe the optimiser with its rate; a rule that updates in place has none."""
    optimizer, schedule = recipe.settings.optimizer, recipe.settings.schedule
    rate = "its own rate" if optimizer.lr is None else f"rate {optimizer.lr:g}"
    scheduled = "" if schedule.name == "constant" else f", {schedule.name} schedule"
    name = "none, the rule updates in place" if rule.traits.update == "in-place" else optimizer.name
    return f"{name}, {rate}{scheduled}"


def _budget(recipe: Recipe) -> str:
    given = vars(recipe.settings.budget)
    units = {"samples": "examples", "seconds": "seconds", "forwards": "forward passes of an example", "operations": "operations"}
    texts = [f"{given[name]:,} {unit}" for name, unit in units.items() if given[name] is not None]
    epochs = recipe.settings.budget.resolve(1).epochs
    return texts[0] if texts else f"{epochs:,} epoch{'s' if epochs != 1 else ''}"


class SummaryDisplay:
    """Shows the lines on standard error when the run begins.

    Args:
        lines: as :func:`summary` makes them.
        label: of a cell, for which they are one line.
        stream: where to; ``None``: standard error, or a notebook's output.
    """

    def __init__(self, lines: Lines, label: str | None = None, stream: TextIO | None = None) -> None:
        self._lines, self._label, self._stream = lines, label, stream

    @hookimpl(tryfirst=True)
    def run_start(self, run: Run) -> None:
        """Show the lines."""
        stream = self._stream or output()
        if self._label is not None:
            print_line(stream, f"{self._label}: {'; '.join(f'{name} {text}' for name, text in self._lines)}")
            return
        width = max(len(name) for name, _ in self._lines)
        print_line(stream, "\n".join(f"{name.ljust(width)}  {text}" for name, text in self._lines))
