"""Translate the declarations of rules of plugin interface 1 to the present interface, for one release.

In interface 1 the traits of a rule, its default optimiser and so on are class attributes, or properties where its options change them;
in interface 2 they are functions of the options and the network, and some names are others: ``docs/from-1-to-2.md``. Each old spelling
gives one ``DeprecationWarning`` that names the new one.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

from torch import nn

from bpfree.options import OptimizerConfig

__all__ = ["FUNCTIONS", "install", "install_hooks", "readout", "translate"]

FUNCTIONS = ("traits", "optimizer", "optimizer_keys", "shared_groups", "draws")
"""Attributes of a class that became functions, ``NAME_of``; on a rule they can still be read."""
RENAMED = {"own_network": "brings_network", "final": "final_prediction", "in_passing": "quick_predictions"}
"""Old names of a rule's attributes, with their new ones."""
STEPLESS = {"encode": 1, "hand_over": 2}
"""Hooks of streamed rules that were given no step: how many arguments they had, and still have in an old spelling."""
READOUTS = {True: "required", False: "optional"}
"""Values of the trait ``readout`` for those of interface 1."""


def install(rule: type, step: type) -> None:
    """Make the old names of rules and steps readable; the class itself returns the values of its default options."""
    for name in FUNCTIONS:
        setattr(rule, name, _ReadOnClass(vars(rule)[name].fget))
    for old, new in RENAMED.items():
        setattr(rule, old, _Alias(f"Rule.{old}", new))
    step.here = _Alias("Step.here", "local_groups")  # type: ignore[attr-defined]


def translate(rule: type, base: type) -> None:
    """Give a new class of rule the functions that replace its class attributes and properties.

    Args:
        rule: as its author wrote it.
        base: the class ``Rule``.
    """
    for name in FUNCTIONS:
        new = f"{name}_of"
        says = next(cls for cls in rule.__mro__ if name in vars(cls) or new in vars(cls))
        if new not in vars(says):
            _warn(f"{says.__name__}.{name} as an attribute of the class", f"the function {new}(config, network)", 4)
            _to_function(rule, name, vars(says)[name])
        elif says is rule:  # the function is what counts, also below a class that has a property
            setattr(rule, name, vars(base)[name])
    for name, count in STEPLESS.items():
        if name in vars(rule) and hasattr(rule, "local_loss") and not _takes(vars(rule)[name], count + 1):
            _warn(f"{rule.__name__}.{name} without a step", f"{name}({'batch' if count == 1 else 'trace, batch'}, step)", 4)
            setattr(rule, name, _stepless(vars(rule)[name], count))
    for old in RENAMED.keys() & vars(rule).keys():
        if RENAMED[old] not in vars(rule):
            _warn(f"{rule.__name__}.{old}", RENAMED[old], 4)
            setattr(rule, RENAMED[old], vars(rule)[old])
        delattr(rule, old)


def install_hooks(streamed: type) -> None:
    """Pass ``super().encode(batch)`` and ``super().hand_over(trace, batch)``, which lack the step, to the base class."""
    for name, count in STEPLESS.items():
        setattr(streamed, name, _tolerant(vars(streamed)[name], count))


def readout(said: Any) -> Any:
    """Return the trait ``readout`` for interface 1's declaration of whether the rule needs one."""
    if isinstance(said, bool):
        _warn(f"Traits(readout={said})", f'Traits(readout="{READOUTS[said]}")', 4)
        return READOUTS[said]
    return said


def _takes(function: Any, count: int) -> bool:
    """Tell whether a method takes this many arguments besides ``self``."""
    try:
        inspect.signature(function).bind(*[None] * (count + 1))
    except (TypeError, ValueError):
        return False
    return True


def _stepless(said: Callable[..., Any], count: int) -> Callable[..., Any]:
    @wraps(said)
    def hook(self: Any, *arguments: Any) -> Any:
        return said(self, *arguments[:count])

    return hook


def _tolerant(said: Callable[..., Any], count: int) -> Callable[..., Any]:
    @wraps(said)
    def hook(self: Any, *arguments: Any, **named: Any) -> Any:
        if len(arguments) + len(named) == count:
            _warn_once(f"super().{said.__name__} without a step", f"super().{said.__name__}(..., step)")
            named["step"] = None
        return said(self, *arguments, **named)

    return hook


def _to_function(rule: type, name: str, said: Any) -> None:
    if hasattr(said, "__get__"):
        function, value = _of_property(rule, name, said)
        setattr(rule, name, property(value))
    else:
        if name in vars(rule):
            delattr(rule, name)

        def function(cls: type, config: Any, network: nn.Module | None = None) -> Any:
            return said

    setattr(rule, f"{name}_of", classmethod(function))


def _of_property(rule: type, name: str, said: Any) -> tuple[Callable[..., Any], Callable[[Any], Any]]:
    """Make the function that replaces a property, and a property in which ``super().NAME`` is the parent class's value."""
    new = f"{name}_of"

    def value(self: Any) -> Any:
        with _set(self, new, getattr(super(rule, self), new)):
            return said.__get__(self, type(self))

    def function(cls: Any, config: Any, network: nn.Module | None = None) -> Any:
        """Read the property of an instance that has its options, perhaps its network, and nothing else."""
        stand_in = cls.__new__(cls)
        nn.Module.__init__(stand_in)
        stand_in.config, stand_in.network = config, network
        try:
            return value(stand_in)
        except Exception:  # the property needs a built rule, and may raise any exception
            return OptimizerConfig() if name == "optimizer" else getattr(super(rule, cls), new)(config, network)

    return function, value


@contextmanager
def _set(instance: Any, name: str, value: Any) -> Iterator[None]:
    attributes = vars(instance)
    before = attributes.get(name)
    attributes[name] = value
    try:
        yield
    finally:
        attributes.pop(name) if before is None else attributes.update({name: before})


class _ReadOnClass(property):
    """A property that on the class returns the value of the default options."""

    def __get__(self, instance: Any, owner: Any = None, /) -> Any:
        if instance is not None:
            return super().__get__(instance, owner)
        name = self.fget.__name__  # type: ignore[union-attr]
        _warn_once(f"{owner.__name__}.{name} of the class", f"{owner.__name__}.{name}_of(config)")
        return getattr(owner, f"{name}_of")(owner.Config())

    def __set__(self, instance: Any, value: Any, /) -> None:
        name = self.fget.__name__  # type: ignore[union-attr]
        _warn_once(f"{type(instance).__name__}.{name} set on a rule", f"the function {name}_of(config, network)")
        vars(instance)[f"{name}_of"] = lambda config, network=None: value


class _Alias:
    """An old name of an attribute or method."""

    def __init__(self, old: str, new: str) -> None:
        self.old, self.new = old, new

    def __get__(self, instance: Any, owner: type) -> Any:
        _warn_once(self.old, self.new)
        return getattr(owner if instance is None else instance, self.new)

    def __set__(self, instance: Any, value: Any) -> None:
        _warn_once(self.old, self.new)
        setattr(instance, self.new, value)


def _warn(old: str, new: str, level: int) -> None:
    warnings.warn(f"{old} is of plugin interface 1: write {new}; docs/from-1-to-2.md", DeprecationWarning, stacklevel=level + 1)


@cache
def _warn_once(old: str, new: str) -> None:
    """Warn at the first access, at the line that reads it."""
    _warn(old, new, 3)
