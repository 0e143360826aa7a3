"""Networks by name: ``mlp``, ``vgg``, a plugin's, or a model of a family such as ``torchvision:resnet18``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from bpfree.code_files import CodeName
from bpfree.errors import UsageError, unknown_name
from bpfree.network.network import Network
from bpfree.options import range_problems
from bpfree.plugins import Plugins, installed_plugins
from bpfree.remembered import remember
from bpfree.tasks.task import TaskSpec

__all__ = ["build_network", "naming", "spelled_out"]

REGISTRY: ContextVar[Plugins | None] = ContextVar("registry", default=None)


@contextmanager
def naming(registry: Plugins) -> Iterator[None]:
    """Let names that are looked up inside, such as those of parts of a network, mean what they mean in this registry."""
    token = REGISTRY.set(registry)
    try:
        yield
    finally:
        REGISTRY.reset(token)


def spelled_out(name: str, registry: Plugins) -> tuple[str, dict[str, str]]:
    """Return the builder that a name means, and the options in the name: ``("torchvision", {"model": "resnet18"})``.

    A name without a colon, one that is registered with it, and one that leads to a file of code mean themselves.

    Raises:
        UsageError: something after the colon, for a builder that takes nothing there.
    """
    builder, colon, member = name.partition(":")
    if not colon or name in registry.names("networks") or CodeName.parse(name) is not None:
        return name, {}
    family = registry.get("networks", builder, where="network").family
    if not family or not member:
        families = [f"{known}:NAME" for known, made, _ in registry.items("networks") if made.family]
        what = f"the network {builder!r} takes no name after the colon" if not family else f"{name!r} names no model after the colon"
        raise UsageError(what, where=f"network={name}", fix=f"network={builder}, or one of {', '.join(families)}")
    return builder, {family: member}


def hinted(error: UsageError, name: str) -> UsageError:
    """Add to the error for an unknown network how the model of torchvision of this name is named, if there is one."""
    try:
        from torchvision import models
    except ImportError:
        return error
    if name.lower() not in models.list_models(module=models):
        return error
    fix = f"did you mean network=torchvision network.model={name.lower()}?"
    return UsageError(error.what, where=error.where, fix=fix, known=error.known)


def build_network(name: str, spec: TaskSpec, registry: Plugins | None = None, **options: Any) -> Network:
    """Build the network that ``network=NAME`` means on the command line, with options as ``network.KEY``.

    Args:
        name: of a builder, or of a model in a family: ``torchvision:resnet18``.
        spec: of the task.
        registry: of names; by default that of the recipe which is building a rule, with its files of code, or the installed plugins.
        options: of the builder.

    Raises:
        UsageError: an unknown name or option, an option out of its range, or a network that does not fit the task.
    """
    registry = registry or REGISTRY.get() or installed_plugins()
    known, implied = spelled_out(name, registry)
    builder = registry.get("networks", known, where="network")
    keys = [item.name for item in dataclasses.fields(builder.Config)]
    for key in options:
        if key not in keys:
            raise unknown_name("option", key, keys, where=f"network {known}")
    config = builder.Config(**{**implied, **options})
    if problems := list(range_problems(config, "network.")):
        raise UsageError.of(problems, "network")
    return remember(builder.build(spec, config), known, config)
