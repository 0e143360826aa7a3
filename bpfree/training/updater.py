"""Updates of parameters: groups, optimisers, schedules, clipping."""

from __future__ import annotations

import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bpfree.addons import Activations, make_addons
from bpfree.errors import BpfreeError, unknown_name
from bpfree.options import OptimizerConfig, ScheduleConfig, option
from bpfree.plugins import installed_plugins
from bpfree.rule import Rule
from bpfree.step import Phase
from bpfree.training.optimizers import adopt, make_optimizer, needs_closure
from bpfree.training.schedules import shape_of, torch_scheduler

__all__ = ["ClipConfig", "Updater", "told_groups"]


@dataclass
class ClipConfig:
    """Clipping of gradients before the optimiser."""

    norm: float | None = option(None, "largest gradient norm; none: no clipping", gt=0)
    scope: Literal["group", "global"] = option(
        "group", "norm of each group, or of all (which couples the blocks)", unless={"norm": (None,)}
    )


class Updater:
    """One optimiser over all groups of a rule, and the operations around its step.

    A phase may name another optimiser; each is made when first needed and kept. RunState is saved by parameter name, because
    torch's positional state silently moves to the wrong parameter when a network grows.

    Args:
        rule: whose ``groups`` are updated.
        optimizer: over the rule's default.
        schedule: of the learning rates.
        clip: of gradients.

    Attributes:
        groups: the rule's trainable groups, of the current phase.
        exchange: called with the parameters that are about to be updated, before anything else: where several processes train together, it
            adds up their gradients.
        received: whether a parameter has had a ``.grad`` at an update so far.
        count: updates so far.
        watches: whether an add-on asks for activations.
        recompute: computes the current step's credit again and gives its loss, for optimisers with a closure.
        activations: of the step in progress, for add-ons that ask for them.
    """

    received = False
    count = 0
    exchange: Callable[[list[nn.Parameter]], None] | None = None
    recompute: Callable[[], Tensor] | None = None

    def __init__(
        self,
        rule: Rule,
        optimizer: OptimizerConfig | None = None,
        *,
        schedule: ScheduleConfig | None = None,
        clip: ClipConfig | None = None,
    ) -> None:
        self.rule = rule
        self.config = (optimizer or OptimizerConfig()).over(rule.optimizer)
        self.schedule = schedule or ScheduleConfig()
        self.clip = clip or ClipConfig()
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        self._schedulers: dict[str, Any] = {}
        known = {name: kind for name, kind, _ in installed_plugins().items("addons")} if self.config.addons else {}
        self._addons = make_addons(self.config.addons, rule, known)
        self.watches = any(kind.watches for kind, _ in self._addons)
        self.activations = Activations(rule)
        self._before_update, self._after_update = told_groups(rule.before_update), told_groups(rule.after_update)
        self.start_phase(Phase())

    def start_phase(self, phase: Phase) -> None:
        """Adopt new or replaced parameters, drop the state of reset groups, choose the phase's optimiser."""
        self.groups = _trainable_groups(self.rule)
        config = self.config if phase.optimizer is None else phase.optimizer.over(self.config)
        self.wants_closure = needs_closure(config)
        schedule = phase.schedule or self.schedule
        self._key = repr((config, schedule))
        if self._key not in self._optimizers:
            self._optimizers[self._key] = make_optimizer(config, self.groups, self.rule.group_options())
            self._schedulers[self._key] = torch_scheduler(schedule, self._optimizers[self._key])
        self._factor = shape_of(schedule)
        reset = {id(p) for name in phase.reset for p in self.groups.get(name, [])}
        for optimizer in self._optimizers.values():
            adopt(optimizer, self.groups, self.rule.group_options(), reset)
        self._current = self._optimizers[self._key]

    def apply(self, *names: str) -> None:
        """Update all groups, or the named ones: normalise, clip, optimiser step, drop their ``.grad``."""
        if self.exchange is not None:
            self.exchange([p for name in names or self.groups for p in self._members(name)])
        applied = names or tuple(self.groups)
        self.count += 1
        self._ready(applied)
        self.received = self.received or any(p.grad is not None for name in applied for p in self._members(name))
        groups = self._current.param_groups
        try:
            if names:
                self._current.param_groups = self._only(names)
            self._current.step(*[self._closure(applied)] if self.wants_closure else ())
            self._current.zero_grad(set_to_none=True)
        finally:
            self._current.param_groups = groups
        self._after_update(applied)

    def _ready(self, applied: Sequence[str]) -> None:
        """Prepare the gradients of some groups for the optimiser."""
        self._before_update(applied)
        for _, addon in self._addons:
            addon.update({name: self._members(name) for name in applied}, self.activations)
        for name in applied:
            _lay_out_as_parameters(self._members(name))
        if self.clip.norm is not None:
            self._clip(tuple(applied))

    def _closure(self, applied: Sequence[str]) -> Any:
        """Make the function by which an optimiser computes loss and gradients again."""

        def again() -> Tensor:
            if self.recompute is None:
                what = f"{self.config.name} computes gradients several times a step, which works only in steps taken by Stepper.take"
                raise BpfreeError(what, where="optimizer.name", fix="choose another optimiser")
            loss = self.recompute()
            self._ready(applied)
            return loss

        return again

    def addon_states(self) -> list[dict[str, Any]]:
        """Return the state of each add-on that has one, in order."""
        return [dict(addon.state_dict()) if isinstance(addon, nn.Module) else {} for _, addon in self._addons]

    def load_addon_states(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Restore the states that :meth:`addon_states` returned."""
        for (_, addon), state in zip(self._addons, saved, strict=False):
            if isinstance(addon, nn.Module):
                addon.load_state_dict(dict(state))

    def _members(self, name: str) -> list[nn.Parameter]:
        if name not in self.groups:
            raise unknown_name("group", name, self.groups, where="Step")
        return self.groups[name]

    def _only(self, names: tuple[str, ...]) -> list[dict[str, Any]]:
        """Return the optimiser's parameter groups, each with the parameters of the named groups alone."""
        chosen = {id(p) for name in names for p in self._members(name)}
        return [{**group, "params": [p for p in group["params"] if id(p) in chosen]} for group in self._current.param_groups]

    def _clip(self, names: tuple[str, ...]) -> None:
        members = [self._members(name) for name in names]
        for parameters in [list(itertools.chain.from_iterable(members))] if self.clip.scope == "global" else members:
            torch.nn.utils.clip_grad_norm_(parameters, self.clip.norm or math.inf)

    def lr(self, name: str) -> float:
        """Return the current learning rate of a group."""
        first = self._members(name)[0]
        return float(next(group["lr"] for group in self._current.param_groups if any(p is first for p in group["params"])))

    def at(self, progress: float) -> None:
        """Set the learning rates for this share of the budget."""
        if self._factor is not None:
            factor = self._factor(progress)
            for group in self._current.param_groups:
                group["lr"] = group["base_lr"] * factor

    def epoch_ended(self) -> None:
        """Step a schedule of ``torch.optim.lr_scheduler``, if there is one."""
        scheduler = self._schedulers[self._key]
        if scheduler is not None:
            scheduler.step()

    def zero_grad(self) -> None:
        """Drop the ``.grad`` of every parameter of the rule."""
        for parameter in self.rule.parameters():
            parameter.grad = None

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Optimisers made so far, one per kind of phase."""
        return list(self._optimizers.values())

    def tensors(self) -> list[Tensor]:
        """List all tensors of the optimisers' state."""
        return [v for o in self._optimizers.values() for state in o.state.values() for v in state.values() if isinstance(v, Tensor)]

    def state_dict(self) -> dict[str, Any]:
        """Return optimiser and scheduler states; tensors and plain values only, keyed by parameter and group names."""
        names = {id(p): name for name, p in self.rule.named_parameters()}
        result = {}
        for key, optimizer in self._optimizers.items():
            order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
            state = optimizer.state_dict()
            scheduler = self._schedulers[key]
            result[key] = {
                "state": {order[index]: value for index, value in state["state"].items()},
                "groups": {group["name"]: {k: v for k, v in group.items() if k != "params"} for group in state["param_groups"]},
                "scheduler": None if scheduler is None else scheduler.state_dict(),
            }
        return result

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, for a rule whose phases up to now have been replayed."""
        names = {id(p): name for name, p in self.rule.named_parameters()}
        for key, part in saved.items():
            if key not in self._optimizers:
                raise BpfreeError("the checkpoint holds an optimiser that this run does not have", where=key)
            optimizer = self._optimizers[key]
            position = {names[id(p)]: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
            current = optimizer.state_dict()
            groups = [{**group, **part["groups"].get(group["name"], {})} for group in current["param_groups"]]
            state = {position[name]: value for name, value in part["state"].items() if name in position}
            optimizer.load_state_dict({"state": state, "param_groups": groups})
            if part["scheduler"] is not None:
                self._schedulers[key].load_state_dict(part["scheduler"])


def told_groups(method: Callable[..., None]) -> Callable[[Sequence[str]], None]:
    """Adapt a rule's ``before_update`` or ``after_update`` to be called with the groups that are applied.

    A method of an older plugin that takes no argument is called without one, with a ``DeprecationWarning``.
    """
    try:
        inspect.signature(method).bind(())
    except TypeError:
        owner = type(getattr(method, "__self__", None)).__name__
        name = getattr(method, "__name__", "before_update")
        warnings.warn(
            f"{owner}.{name} takes no groups, so it runs over all of them at every step.apply(name); "
            f"define {name}(self, groups: Sequence[str]) and touch the parameters of these groups only",
            DeprecationWarning,
            stacklevel=2,
        )
        return lambda groups: method()
    return method


def _lay_out_as_parameters(parameters: Iterable[nn.Parameter]) -> None:
    """Lay out each ``.grad`` with its parameter's strides: fused optimisers walk both in memory order and would mix up the entries.

    Autograd does so itself; gradients that a rule has computed in closed form may be laid out otherwise (channels last).
    """
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None and gradient.layout is torch.strided and gradient.stride() != parameter.stride():
            parameter.grad = torch.empty_like(parameter, requires_grad=False).copy_(gradient)


def _trainable_groups(rule: Rule) -> dict[str, list[nn.Parameter]]:
    owner: dict[int, str] = {}
    for name, members in rule.groups().items():
        for parameter in members:
            if owner.setdefault(id(parameter), name) != name:
                raise BpfreeError(f"a parameter is in two groups, {owner[id(parameter)]!r} and {name!r}", where=type(rule).__name__)
    return rule.groups()
