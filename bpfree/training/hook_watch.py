"""Checks around each call of an observer's hook: it must not change anything that is trained or reported."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bpfree import devices
from bpfree.errors import BpfreeError
from bpfree.process_state import unchanged
from bpfree.run import Run
from bpfree.training.guards import Values, kind_of, named_tensors, version
from bpfree.training.state import RunState

__all__ = ["HookWatch", "is_our_own", "name_of"]


def is_our_own(plugin: Any) -> bool:
    """Tell whether an observer is part of this package; then only its use of a rule is watched, which may run the rule's code."""
    module = plugin.__name__ if isinstance(plugin, ModuleType) else type(plugin).__module__
    return module.split(".")[0] == "bpfree"


def name_of(plugin: Any) -> str:
    """Return an observer's name for messages: a module's name, or an object's class."""
    return plugin.__name__ if isinstance(plugin, ModuleType) else type(plugin).__name__


class HookWatch:
    """Compares the rule, its optimiser, the step and the run before and after a hook.

    Tensors are compared by value, except around ``step_end``, where versions have to suffice so that no step waits for the device: there by
    value at the 1st, 2nd, 4th, 8th ... call. An observer that was found to write into weights and put them back is compared by value at
    each call.
    The states of torch's global generators and the rule's are restored: an observer may draw. Settings of the process are restored too.

    Args:
        run: the trainer's own.
        state: of the run.
    """

    def __init__(self, run: Run, state: RunState) -> None:
        self._run, self._state = run, state
        self._calls: dict[tuple[int, str], int] = {}
        self._perturbing: set[int] = set()
        self._tensors, self._modules, self._begun = named_tensors(state.rule), list(state.rule.modules()), -1

    @contextmanager
    def around(self, hook: str, plugin: Any) -> Iterator[None]:
        """Watch the call inside.

        Raises:
            BpfreeError: it has changed something.
        """
        call = self._calls[id(plugin), hook] = self._calls.get((id(plugin), hook), 0) + 1
        in_step = hook == "step_end"
        if not in_step or self._begun != self._state.begun:  # a phase that begins may make parameters
            rule = self._state.rule
            self._tensors, self._modules, self._begun = named_tensors(rule), list(rule.modules()), self._state.begun
        by_value = not in_step or call & (call - 1) == 0 or id(plugin) in self._perturbing
        recorded = None if in_step else _recorded(self._run)
        random, generator, device = devices.global_state(self._state.device), self._state.step.generator, self._state.device
        drawn = generator.get_state()
        before, versions = self._facts(whole=not in_step), self._versions()
        values = Values(self._tensors) if by_value else None
        try:
            with unchanged() as settings:
                yield
        finally:
            devices.set_global_state(random, device)
            generator.set_state(drawn)
        changed = self._changed_tensors(versions, values, plugin)
        after = self._facts(whole=not in_step)
        changed = changed or next((what for what, fact in before.items() if after[what] != fact), None)
        changed = changed or self._rewritten(recorded) or next(iter(settings), None)
        if changed:
            who = name_of(plugin)
            raise BpfreeError(
                f"the observer {who} changed {changed} in {hook}",
                where=f"{who}.{hook}",
                fix="hooks only observe: let it work on a copy (copy.deepcopy(rule)), or write a rule, whose methods may change things",
            )

    def _versions(self) -> list[tuple[int, int]]:
        return [version(tensor) for tensor in self._tensors.values()]

    def _changed_tensors(self, versions: list[tuple[int, int]], values: Values | None, plugin: Any) -> str | None:
        rule = self._state.rule
        now = self._versions()
        if values is None:
            names = [name for name, one, other in zip(self._tensors, versions, now, strict=True) if one != other]
        else:
            names = values.changed(named_tensors(rule))
            if versions != now:
                self._perturbing.add(id(plugin))
        return kind_of(rule, names[0]) if names else None

    def _facts(self, *, whole: bool) -> dict[str, Any]:
        state, step = self._state, self._state.step
        parameters = [tensor for tensor in self._tensors.values() if isinstance(tensor, torch.nn.Parameter)]
        facts = {
            "the parameters, by step.apply()": state.updater.count,  # fused optimisers move no version
            "gradients": [(id(p.grad), None if p.grad is None else version(p.grad)) for p in parameters],
            "which parameters learn (requires_grad)": [p.requires_grad for p in parameters],
            "train or eval mode of the rule": [module.training for module in self._modules],
            "the step": [getattr(step, field.name) for field in dataclasses.fields(step)],
            "settings of the optimiser": [
                {name: value for name, value in group.items() if name != "params" and not isinstance(value, Tensor)}
                for optimizer in state.updater.optimizers
                for group in optimizer.param_groups
            ],
        }
        if whole:
            facts["the optimiser's state"] = [(id(tensor), *version(tensor)) for tensor in state.updater.tensors()]
        return facts

    def _rewritten(self, recorded: dict[str, Any] | None) -> str | None:
        """Restore the run's attributes that a hook rewrote, and name the first of them."""
        changed = [name for name, value in (recorded or {}).items() if getattr(self._run, name) != value]
        for name in changed:
            setattr(self._run, name, (recorded or {})[name])
        return f"the run's {changed[0]}" if changed else None


def _recorded(run: Run) -> dict[str, Any]:
    recorded: dict[str, Any] = {}
    for field in dataclasses.fields(run):
        if field.name not in ("artifacts", "tracking"):
            value = getattr(run, field.name)
            recorded[field.name] = dict(value) if isinstance(value, dict) else list(map(dict, value)) if isinstance(value, list) else value
    return recorded
