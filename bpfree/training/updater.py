"""Applying updates: parameter groups, optimisers, schedules, clipping."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bpfree.errors import BpfreeError, UsageError, unknown_name
from bpfree.options import OptimizerConfig, ScheduleConfig, option
from bpfree.rule import Metrics, Rule
from bpfree.step import Batch, Phase, Step
from bpfree.training.seeds import KeyedGenerators, derive

__all__ = ["ClipConfig", "Updater", "accumulate", "new_step"]


@dataclass
class ClipConfig:
    """Clipping of gradients before the optimiser."""

    norm: float | None = option(None, "largest gradient norm; none: no clipping", gt=0)
    scope: Literal["group", "global"] = option("group", "norm of each group, or of all (which couples the blocks)")


class Updater:
    """One optimiser over all groups of a rule, a parameter group each, and what surrounds its step.

    A phase may name another optimiser; each is made when first needed and kept. State is saved by parameter name, because
    torch's positional state silently moves to the wrong parameter when a network grows.

    Args:
        rule: whose ``groups`` are updated.
        optimizer: over the rule's default.
        schedule: of the learning rates.
        clip: of gradients.
    """

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
        self.start_phase(Phase())

    def start_phase(self, phase: Phase) -> None:
        """Take up new or replaced parameters, drop the state of reset groups, choose the phase's optimiser."""
        self.groups = _trainable_groups(self.rule)
        config = self.config if phase.optimizer is None else phase.optimizer.over(self.config)
        schedule = phase.schedule or self.schedule
        self._key = repr((config, schedule))
        if self._key not in self._optimizers:
            self._optimizers[self._key] = make_optimizer(config, self.groups, self.rule.group_options())
            self._schedulers[self._key] = _torch_scheduler(schedule, self._optimizers[self._key])
        self._factor = _shape(schedule)
        reset = {id(p) for name in phase.reset for p in self.groups.get(name, [])}
        for optimizer in self._optimizers.values():
            _adopt(optimizer, self.groups, self.rule.group_options(), reset)
        self._current = self._optimizers[self._key]
        self._by_name = {group["name"]: group for group in self._current.param_groups}

    def apply(self, *names: str) -> None:
        """Update all groups, or the named ones: normalise, clip, optimiser step, drop their ``.grad``."""
        for name in names:
            if name not in self._by_name:
                raise unknown_name("group", name, self._by_name, where="step.apply")
        self.rule.before_update()
        groups = self._current.param_groups
        chosen = [self._by_name[name] for name in names] if names else groups
        if self.clip.norm is not None:
            self._clip(chosen)
        try:
            self._current.param_groups = chosen
            self._current.step()
            self._current.zero_grad(set_to_none=True)
        finally:
            self._current.param_groups = groups
        self.rule.after_update()

    def _clip(self, groups: list[dict[str, Any]]) -> None:
        together = [[p for group in groups for p in group["params"]]]
        for members in together if self.clip.scope == "global" else [group["params"] for group in groups]:
            torch.nn.utils.clip_grad_norm_(members, self.clip.norm or math.inf)

    def lr(self, name: str) -> float:
        """The current learning rate of a group."""
        if name not in self._by_name:
            raise unknown_name("group", name, self._by_name, where="step.lr")
        return float(self._by_name[name]["lr"])

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

    def tensors(self) -> list[Tensor]:
        """All tensors of the optimisers' state."""
        return [v for o in self._optimizers.values() for state in o.state.values() for v in state.values() if isinstance(v, Tensor)]

    def state_dict(self) -> dict[str, Any]:
        """Optimiser and scheduler states; tensors and plain values only, keyed by parameter and group names."""
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

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`, for a rule whose phases up to now have been replayed."""
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


def make_optimizer(
    config: OptimizerConfig, groups: dict[str, list[nn.Parameter]], special: dict[str, dict[str, Any]]
) -> torch.optim.Optimizer:
    """A ``torch.optim`` optimiser with a parameter group per group, fused where it can be.

    Raises:
        UsageError: no such optimiser, an argument that it does not take, or one that needs a closure (LBFGS).
    """
    known = {
        name.lower(): value
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer)
    }
    known = {name: value for name, value in known.items() if name not in ("optimizer", "lbfgs", "sparseadam")}
    if config.name.lower() not in known:
        raise unknown_name("optimizer", config.name, known, where="optimizer.name")
    factory = known[config.name.lower()]
    accepted = inspect.signature(factory).parameters
    wanted = {"lr": config.lr, "weight_decay": config.weight_decay, "momentum": config.momentum, **config.options}
    arguments = {key: value for key, value in wanted.items() if value is not None}
    for key in arguments:
        if key not in accepted:
            raise unknown_name(f"option of {config.name}", key, [k for k in accepted if k != "params"], where=f"optimizer.{key}")
    members = [{"params": list(params), "name": name, **special.get(name, {})} for name, params in groups.items()]
    if "fused" in accepted and "fused" not in arguments and "foreach" not in arguments:
        arguments["fused"] = all(p.is_floating_point() for params in groups.values() for p in params)
    try:
        optimizer = factory(members, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{config.name} refuses its options: {error}", where="optimizer") from error
    for group in optimizer.param_groups:
        group["base_lr"] = float(group["lr"])
    return optimizer


def _trainable_groups(rule: Rule) -> dict[str, list[nn.Parameter]]:
    owner: dict[int, str] = {}
    for name, members in rule.groups().items():
        for parameter in members:
            if owner.setdefault(id(parameter), name) != name:
                raise BpfreeError(f"a parameter is in two groups, {owner[id(parameter)]!r} and {name!r}", where=type(rule).__name__)
    return rule.groups()


def _adopt(
    optimizer: torch.optim.Optimizer, groups: dict[str, list[nn.Parameter]], special: dict[str, dict[str, Any]], reset: set[int]
) -> None:
    """Bring the optimiser's groups up to date with the rule's; forget the state of parameters that left or were reset."""
    existing = {group["name"]: group for group in optimizer.param_groups}
    for name, members in groups.items():
        if name in existing:
            existing[name]["params"] = list(members)
        else:
            optimizer.add_param_group({"params": list(members), "name": name, **special.get(name, {})})
            optimizer.param_groups[-1]["base_lr"] = float(optimizer.param_groups[-1]["lr"])
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["name"] in groups]
    kept = {id(p) for members in groups.values() for p in members} - reset
    for parameter in [p for p in optimizer.state if id(p) not in kept]:
        del optimizer.state[parameter]


def _shape(schedule: ScheduleConfig) -> Callable[[float], float] | None:
    """The factor as a function of progress; ``None`` where the rate is constant or left to torch."""
    shapes: dict[str, Callable[[float], float]] = {
        "constant": lambda progress: 1.0,
        "linear": lambda progress: 1 - (1 - schedule.final) * progress,
        "cosine": lambda progress: schedule.final + (1 - schedule.final) * (1 + math.cos(math.pi * progress)) / 2,
        "milestones": lambda progress: schedule.gamma ** sum(progress >= point for point in schedule.milestones),
    }
    shape = shapes.get(schedule.name)
    if shape is None or (schedule.name == "constant" and not schedule.warmup):
        return None

    def factor(progress: float) -> float:
        if progress < schedule.warmup:
            return progress / schedule.warmup
        return shape((progress - schedule.warmup) / (1 - schedule.warmup) if schedule.warmup < 1 else 1.0)

    return factor


def _torch_scheduler(schedule: ScheduleConfig, optimizer: torch.optim.Optimizer) -> Any:
    if schedule.name in ("constant", "linear", "cosine", "milestones"):
        return None
    base = torch.optim.lr_scheduler.LRScheduler
    known = {n: v for n, v in vars(torch.optim.lr_scheduler).items() if inspect.isclass(v) and issubclass(v, base) and v is not base}
    known.pop("ReduceLROnPlateau", None)  # steps on a metric
    if schedule.name not in known:
        raise unknown_name("schedule", schedule.name, ["constant", "linear", "cosine", "milestones", *known], where="schedule.name")
    try:
        return known[schedule.name](optimizer, **schedule.options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{schedule.name} refuses its options: {error}", where="schedule.options") from error


def accumulate(rule: Rule, batch: Batch, step: Step, parts: int) -> Metrics:
    """One step from ``parts`` micro-batches: each contribution to ``.grad`` scaled by its share of the batch.

    The result equals the large batch's for rules whose credit is a mean over examples.
    """
    total = len(batch)
    sums: Metrics = {}
    size = math.ceil(total / parts)
    parameters = list(rule.parameters())
    for start in range(0, total, size):
        inputs = torch.utils._pytree.tree_map(lambda t, s=start: t[s : s + size], batch.inputs)
        micro = Batch(inputs, None if batch.targets is None else batch.targets[start : start + size])
        share = len(micro) / total
        before = [p.grad for p in parameters if p.grad is not None]
        if before:  # so that scaling the sum afterwards leaves what was there
            torch._foreach_mul_(before, 1 / share)
        for name, value in rule.credit(micro, step).items():
            sums[name] = sums[name] + value * share if name in sums else value * share
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], share)
    step.apply()
    return sums


def new_step(rule: Rule, optimizer: OptimizerConfig | None = None, *, seed: int = 0) -> Step:
    """A step for one's own loop: ``rule.learn(batch, step)``, then ``step.index += 1``.

    Args:
        rule: the rule, on its device.
        optimizer: over the rule's default.
        seed: of the rule's noise.
    """
    device = next(rule.parameters()).device
    updater = Updater(rule, optimizer)
    generator = torch.Generator(device).manual_seed(derive(seed, "noise"))
    keyed = KeyedGenerators(seed, device, lambda: step.index)
    step = Step(generator, keyed, updater.apply, updater.lr, Phase())
    return step


def check_optimizer(config: OptimizerConfig) -> None:
    """Try the configuration on a single parameter.

    Raises:
        UsageError: as :func:`make_optimizer`.
    """
    make_optimizer(config, {"probe": [nn.Parameter(torch.zeros(1))]}, {})


def check_schedule(schedule: ScheduleConfig) -> None:
    """Try the schedule on a single parameter.

    Raises:
        UsageError: no such schedule, or options that it does not take.
    """
    _torch_scheduler(schedule, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
