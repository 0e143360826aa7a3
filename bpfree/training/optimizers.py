"""Making ``torch.optim`` optimisers over the groups of a rule."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from bpfree.errors import UsageError, unknown_name
from bpfree.options import OptimizerConfig

__all__ = ["adopt", "check_optimizer", "make_optimizer", "merged"]

Groups = Mapping[str, list[nn.Parameter]]
Special = Mapping[str, dict[str, Any]]


def merged(groups: Groups, special: Special) -> dict[str, dict[str, Any]]:
    """Torch's parameter groups: one for all of the rule's groups that have the same options.

    A fused optimiser makes a call per parameter group, and ten small ones cost several times what one large one does.
    """
    result: dict[str, dict[str, Any]] = {}
    for name, members in groups.items():
        options = special.get(name, {})
        label = ", ".join(f"{key}={options[key]!r}" for key in sorted(options)) or "all"
        result.setdefault(label, {"params": [], "name": label, **options})["params"].extend(members)
    return result


def make_optimizer(config: OptimizerConfig, groups: Groups, special: Special) -> torch.optim.Optimizer:
    """A ``torch.optim`` optimiser over the groups, fused where it can be.

    Raises:
        UsageError: no such optimiser, an argument that it does not take, or one that cannot work here: LBFGS needs a
            closure, Muon takes matrices only.
    """
    known = {
        name.lower(): value
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer)
    }
    known = {name: value for name, value in known.items() if name not in ("optimizer", "lbfgs", "sparseadam", "muon")}
    if config.name.lower() not in known:
        raise unknown_name("optimizer", config.name, known, where="optimizer.name")
    factory = known[config.name.lower()]
    accepted = inspect.signature(factory).parameters
    wanted = {"lr": config.lr, "weight_decay": config.weight_decay, "momentum": config.momentum, **config.options}
    arguments = {key: value for key, value in wanted.items() if value is not None}
    for key in arguments:
        if key not in accepted:
            raise unknown_name(f"option of {config.name}", key, [k for k in accepted if k != "params"], where=f"optimizer.{key}")
    if "fused" in accepted and "fused" not in arguments and "foreach" not in arguments:
        # torch's fused SGD fails where parameters meet their first gradient at different steps, since their momentum begins then
        late = factory is torch.optim.SGD and bool(arguments.get("momentum"))
        arguments["fused"] = not late and all(p.is_floating_point() for params in groups.values() for p in params)
    try:
        optimizer = factory(list(merged(groups, special).values()), **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{config.name} refuses its options: {error}", where="optimizer") from error
    for group in optimizer.param_groups:
        group["base_lr"] = float(group["lr"])
    return optimizer


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
    """Try the configuration on a single parameter.

    Raises:
        UsageError: as :func:`make_optimizer`.
    """
    make_optimizer(config, {"probe": [nn.Parameter(torch.zeros(1))]}, {})
