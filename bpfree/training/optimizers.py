"""Making ``torch.optim`` optimisers over the groups of a rule."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from bpfree.errors import UsageError, unknown_name
from bpfree.options import OptimizerConfig
from bpfree.plugins import installed_plugins

__all__ = ["adopt", "check_optimizer", "make_optimizer", "merged", "misfit", "needs_closure", "untaken"]

Groups = Mapping[str, list[nn.Parameter]]
Special = Mapping[str, dict[str, Any]]
OWN_KEYS = ("lr", "weight_decay", "momentum")
"""Arguments of optimisers that have a key of their own."""


def merged(groups: Groups, special: Special) -> dict[str, dict[str, Any]]:
    """Merge the rule's groups that have the same options into one of torch's parameter groups.

    A fused optimiser makes a call per parameter group, and ten small ones cost several times what one large one does.
    """
    result: dict[str, dict[str, Any]] = {}
    for name, members in groups.items():
        options = special.get(name, {})
        label = ", ".join(f"{key}={options[key]!r}" for key in sorted(options)) or "all"
        result.setdefault(label, {"params": [], "name": label, **options})["params"].extend(members)
    return result


def make_optimizer(config: OptimizerConfig, groups: Groups, special: Special) -> torch.optim.Optimizer:
    """Make a ``torch.optim`` optimiser over the groups, fused where it can be.

    Raises:
        UsageError: no such optimiser, an argument that it does not take, or one that cannot work here, as Muon, which takes matrices only.
    """
    for _, error in untaken(config):
        raise error
    factory = _factory(config)
    accepted = inspect.signature(factory).parameters
    wanted = {"lr": config.lr, "weight_decay": config.weight_decay, "momentum": config.momentum, **config.options}
    arguments = {key: value for key, value in wanted.items() if value is not None}
    if "fused" in accepted and "fused" not in arguments and "foreach" not in arguments:
        # torch's fused SGD fails where parameters meet their first gradient at different steps, since their momentum begins then
        late = factory is torch.optim.SGD and bool(arguments.get("momentum"))
        arguments["fused"] = not late and all(p.is_floating_point() for params in groups.values() for p in params)
    try:
        made: type[Any] = factory if arguments.get("differentiable") else _without_compiler(factory)
        optimizer: torch.optim.Optimizer = made(list(merged(groups, special).values()), **arguments)
    except Exception as error:  # torch checks little, and may raise any exception
        raise UsageError(f"{config.name} refuses its options: {error}", where=_said(config)) from error
    for group in optimizer.param_groups:
        group["base_lr"] = float(group["lr"])
    return optimizer


def _factory(config: OptimizerConfig) -> Any:
    """Return the class that the configuration names.

    Raises:
        UsageError: there is none, or it cannot work here.
    """
    known = {
        name.lower(): value
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer)
    }
    known = {name: value for name, value in known.items() if name not in ("optimizer", "sparseadam", "muon")}
    known |= {name.lower(): kind for name, kind, _ in installed_plugins().items("optimizers")}
    if config.name.lower() not in known:
        raise unknown_name("optimizer", config.name, known, where="optimizer.name")
    return known[config.name.lower()]


def needs_closure(config: OptimizerConfig) -> bool:
    """Tell whether each step of an optimiser computes the gradients several times.

    Raises:
        UsageError: there is no such optimiser.
    """
    factory = _factory(config)
    return factory is torch.optim.LBFGS or bool(getattr(factory, "needs_closure", False))


@cache
def _without_compiler(factory: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """Make an optimiser's class whose methods do not import torch's compiler, which takes 1.4 s of processor time.

    Torch wraps them in marks for code that it compiles; optimisers are not compiled here. What is not wrapped so stays as it is.
    """
    methods = ("add_param_group", "zero_grad", "state_dict", "load_state_dict", "step")
    plain = {name: inspect.unwrap(getattr(factory, name), stop=lambda method: not _names_compiler(method)) for name in methods}
    if plain["step"] is not factory.step:
        plain["step"] = torch.no_grad()(plain["step"])  # that mark also switches gradients off
    return type(factory.__name__, (factory,), plain)


def _names_compiler(method: Any) -> bool:
    return "_dynamo" in getattr(getattr(method, "__code__", None), "co_names", ())


def untaken(config: OptimizerConfig) -> Iterator[tuple[str, UsageError]]:
    """Yield each setting that this optimiser does not take, by key, with the error to raise; none for an unknown ``auto``.

    Raises:
        UsageError: there is no such optimiser.
    """
    if config.name == "auto":
        return
    accepted = inspect.signature(_factory(config)).parameters
    names = [name for name in accepted if name != "params"]
    for key in OWN_KEYS:
        if getattr(config, key) is not None and key not in names:
            yield f"optimizer.{key}", unknown_name(f"option of {config.name}", key, names, where=f"optimizer.{key}")
    for key, value in config.options.items():
        where = f"optimizer.options.{key}"
        if key in OWN_KEYS:
            yield where, UsageError(f"{where} has a key of its own", where=where, fix=f"optimizer.{key}={value}")
        elif key not in names:
            yield where, unknown_name(f"option of {config.name}", key, names, where=where)
        elif reason := misfit(value, accepted[key]):
            yield where, UsageError(f"{config.name} refuses its options: {key} {reason}, not {value!r}", where=where)
    if config.options.get("dampening") and not config.momentum:
        where = "optimizer.options.dampening"
        yield where, UsageError(f"{where} does nothing without a momentum", where=where, fix="optimizer.momentum=0.9, or leave it out")


def misfit(value: Any, parameter: inspect.Parameter) -> str:
    """Say what a value must be for this parameter of torch's, as far as its signature says; empty if it fits."""
    default, kind = parameter.default, str(parameter.annotation)
    if value is None:
        return "" if default is None else "must have a value"
    if isinstance(default, tuple):
        right = isinstance(value, (list, tuple)) and len(value) == len(default) and all(map(_is_number, value))
        return "" if right else f"must be a list of {len(default)} numbers"
    if isinstance(default, bool) or kind in ("bool | None", "<class 'bool'>", "bool"):
        return "" if isinstance(value, bool) else "must be true or false"
    if kind in ("int", "int | None", "<class 'int'>"):
        return "" if isinstance(value, int) and not isinstance(value, bool) else "must be a whole number"
    if kind == "Iterable[int]":
        right = isinstance(value, (list, tuple)) and all(type(entry) is int for entry in value)
        return "" if right else "must be a list of whole numbers"
    if isinstance(default, (int, float)) or kind == "float":
        return "" if _is_number(value) or "list" in kind else "must be a number"
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _said(config: OptimizerConfig) -> str:
    """Name the configured options, for a message."""
    return ", ".join(f"optimizer.options.{key}" for key in config.options) or "optimizer"


def adopt(optimizer: torch.optim.Optimizer, groups: Groups, special: Special, reset: set[int]) -> None:
    """Bring an optimiser up to date with a rule's groups; forget the state of parameters that left or are in ``reset`` (ids)."""
    existing = {group["name"]: group for group in optimizer.param_groups}
    wanted = merged(groups, special)
    for label, group in wanted.items():
        if label in existing:
            existing[label]["params"] = group["params"]
        else:
            optimizer.add_param_group(group)
            optimizer.param_groups[-1]["base_lr"] = float(optimizer.param_groups[-1]["lr"])
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["name"] in wanted]
    kept = {id(p) for members in groups.values() for p in members} - reset
    for parameter in [p for p in optimizer.state if id(p) not in kept]:
        del optimizer.state[parameter]


def check_optimizer(config: OptimizerConfig) -> None:
    """Try the configuration on a single parameter, with two steps: torch alone can judge the values of options.

    Raises:
        UsageError: as :func:`make_optimizer`, or a step fails.
    """
    if config.name == "auto":  # the rule's, which depends on its options
        for _, error in untaken(config):
            raise error
        return
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = make_optimizer(config, {"probe": [parameter]}, {})
    parameter.grad = torch.ones(1)
    closure: list[Any] = [lambda: torch.zeros(())] if needs_closure(config) else []
    try:
        for _ in range(2):
            optimizer.step(*closure)
    except Exception as error:
        raise UsageError(f"{config.name} cannot take a step with its options: {error}", where=_said(config)) from error
