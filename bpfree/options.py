"""Typed options: dataclass fields that carry their meaning and their range.

A configuration is a plain dataclass. ``option`` adds to a field what the command line and the method cards
show (a help text) and what is checked before anything is loaded (bounds, choices)::

    @dataclass
    class Config:
        eta: float = option(0.1, "weight of the denoising loss", gt=0)
"""

from __future__ import annotations

import dataclasses
import math
import operator
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Self, TypeVar, cast

from bpfree.errors import UsageError, nearest
from bpfree.typed import Misfit, typed

__all__ = ["ALIASES", "NoOptions", "OptimizerConfig", "ScheduleConfig", "Sectioned", "checked", "describe", "option", "range_problems"]

Filled = TypeVar("Filled")
ALIASES = {"learning_rate": "lr", "rate": "lr", "wd": "weight_decay", "decay": "weight_decay", "batchsize": "batch_size"}
"""Words that people use for keys, for suggestions."""


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    factory: Callable[[], Any] | None = None,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    needs: Mapping[str, Collection[Any]] | None = None,
    unless: Mapping[str, Collection[Any]] | None = None,
) -> Any:
    """Make a dataclass field with a help text, bounds, and the values of other options with which it is read.

    Args:
        default: its value where none is given.
        help: its meaning, for the command line and the method cards.
        factory: makes the default, where that is a list or a mapping.
        ge, gt, le, lt: bounds of the value. ``None`` always passes them: it means "not set". A list or tuple is checked entry by entry.
        needs: values of other options of the same dataclass; the option is read where at least one of them has one of its values.
        unless: values of other options with which it is not read. Where nothing reads it, a value other than the default is refused.
    """
    metadata = {"help": help, "ge": ge, "gt": gt, "le": le, "lt": lt, "needs": needs or {}, "unless": unless or {}}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


class Sectioned:
    """A configuration that is made in Python: refuses names that it does not have, and makes sections of their names or mappings.

    A section is a field that is a dataclass itself: ``optimizer="adam"`` is ``optimizer=OptimizerConfig(name="adam")``, and
    ``budget={"epochs": 3}`` is ``budget=BudgetConfig(epochs=3)``.
    """

    def __new__(cls, *values: Any, **named: Any) -> Self:
        """Refuse unknown names before the dataclass's own ``__init__`` does.

        Raises:
            UsageError: there is no such field; names the section that has it, or a similar one.
        """
        hints = _hints(cls)
        if unknown := next((name for name in named if name not in hints), ""):
            inside = {key: f"{name}={kind.__name__}" for name, kind in hints.items() if _is_section(kind) for key in reversed(_hints(kind))}
            word = ALIASES.get(unknown, unknown)
            guess = word if word in inside else nearest(word, [*hints, *inside])
            place = f"{inside[guess]}({guess}=...)" if guess in inside and guess not in hints else f"{guess}=..."
            fix = f"did you mean {place}?" if guess else f"known: {', '.join(hints)}"
            raise UsageError(f"{cls.__name__} has no field {unknown!r}", where=f"{cls.__name__}({unknown}=...)", fix=fix)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, kind in _hints(type(self)).items():
            value = getattr(self, name)
            if not _is_section(kind) or isinstance(value, kind):
                continue
            if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
                setattr(self, name, kind(**value))
            elif isinstance(value, str) and "name" in _hints(kind):
                setattr(self, name, kind(name=value))
            else:
                fix = f"{name}={kind.__name__}(...), or a dictionary of its fields"
                raise UsageError(f"{name} is a section, not {value!r:.80}", where=f"{type(self).__name__}({name}=...)", fix=fix)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _read_hints(config: Any) -> dict[str, Any]:
    """Return the types of a dataclass's fields by name."""
    hints = typing.get_type_hints(config)
    return {item.name: hints[item.name] for item in dataclasses.fields(config)}


_hints: Callable[[Any], dict[str, Any]] = lru_cache(maxsize=256)(_read_hints)


def checked(config: Filled) -> Filled:
    """Return a configuration with values of the right types, as the command line would read them.

    Raises:
        UsageError: with all values of another type, or out of their range.
    """
    problems: list[str] = []
    converted: Any = _converted(config, "", problems)
    problems += [] if problems else range_problems(converted)
    if problems:
        raise UsageError.of(problems, "configuration")
    return cast(Filled, converted)


def _converted(config: Any, prefix: str, problems: list[str]) -> Any:
    changes = {}
    for name, kind in _hints(type(config)).items():
        value, key = getattr(config, name), f"{prefix}{name}"
        if _is_section(kind):
            found = _converted(value, f"{key}.", problems)
        else:
            try:
                found = typed(_plain(value), kind, key)
            except Misfit as error:
                problems.append(f"{key}={value!r:.80}: {error}")
                continue
        if found is not value and (_is_section(kind) or type(found) is not type(value) or found != value):
            changes[name] = found
    return dataclasses.replace(config, **changes) if changes else config


def _plain(value: Any) -> Any:
    """Convert a number of numpy or torch, and a device of torch, to Python's own type."""
    if type(value).__module__ == "torch" and type(value).__name__ == "device":
        return str(value)
    return value.item() if getattr(value, "ndim", None) == 0 else value


@dataclass
class NoOptions:
    """The configuration of an object without options."""


@dataclass
class OptimizerConfig(Sectioned):
    """The ``torch.optim`` optimiser that applies the updates, and its options.

    ``None`` means the rule's default, or else the optimiser's own.
    """

    name: str = option("auto", "a class of torch.optim, in upper or lower case (sgd, adamw, ...), or auto: as the rule declares")
    lr: float | None = option(None, "learning rate", gt=0)
    weight_decay: float | None = option(None, "weight decay", ge=0)
    momentum: float | None = option(None, "momentum (optimisers that have one)", ge=0, lt=1)
    options: dict[str, Any] = option(factory=dict, help="further arguments of the optimiser, such as betas")
    addons: list[Any] = option(
        factory=list, help="add-ons that change gradients before the optimiser, in order: names, or {name: ..., option: ...}"
    )

    def over(self, base: OptimizerConfig) -> OptimizerConfig:
        """Return this configuration with ``base`` for all that it leaves open.

        Naming another optimiser drops the base's further arguments, which may not exist there.
        """
        same = self.name in ("auto", base.name)
        return OptimizerConfig(
            name=base.name if self.name == "auto" else self.name,
            lr=self.lr if self.lr is not None else (base.lr if same else None),
            weight_decay=self.weight_decay if self.weight_decay is not None else (base.weight_decay if same else None),
            momentum=self.momentum if self.momentum is not None else (base.momentum if same else None),
            options={**base.options, **self.options} if same else dict(self.options),
            addons=self.addons or base.addons,
        )


@dataclass
class ScheduleConfig(Sectioned):
    """The change of the learning rate over a run.

    The named shapes are functions of the progress of the budget (0 to 1) and multiply each group's rate; any class of
    ``torch.optim.lr_scheduler`` is taken by its own name with ``options`` and stepped once per epoch.
    """

    name: str = option("constant", "constant, linear, cosine, milestones, or a class of torch.optim.lr_scheduler")
    warmup: float = option(0.0, "share of the budget over which the rate rises linearly from zero", ge=0, le=1)
    final: float = option(0.0, "factor at the end (linear, cosine)", ge=0, le=1)
    milestones: list[float] = option(factory=list, help="shares of the budget at which the rate is multiplied by gamma", ge=0, le=1)
    gamma: float = option(0.5, "factor at each milestone", gt=0)
    options: dict[str, Any] = option(factory=dict, help="arguments of a torch.optim.lr_scheduler class")


def describe(config: type) -> Iterator[tuple[str, str, Any, str]]:
    """Yield ``(name, type, default, help)`` of each field of a configuration dataclass, in order."""
    hints = typing.get_type_hints(config)
    for item in dataclasses.fields(config):
        default = item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        yield item.name, kind_text(hints[item.name]), default, bounded_help(item)


def kind_text(kind: Any) -> str:
    """Return a type as people write it: ``float | none``, ``relu | gelu``, ``list of int``."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is type(None):
        return "none"
    if origin is typing.Literal:
        return " | ".join(map(str, parts))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(kind_text, parts))
    if origin is list:
        return f"list of {kind_text(parts[0])}"
    return "mapping" if origin is dict else getattr(kind, "__name__", str(kind))


def bounded_help(item: dataclasses.Field[Any]) -> str:
    bounds = bounds_text(item)
    text = str(item.metadata.get("help", ""))
    return f"{text} ({bounds})" if bounds else text


def bounds_text(item: dataclasses.Field[Any]) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    return " and ".join(f"{sign} {item.metadata[key]:g}" for key, sign in signs.items() if item.metadata.get(key) is not None)


def range_problems(config: Any, prefix: str = "") -> Iterator[str]:
    """Yield one sentence for each field of the dataclass instance that is out of its range, nested ones included."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        key = f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            yield from range_problems(value, f"{key}.")
            continue
        for entry in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(entry, (int, float)) and not isinstance(entry, bool) and not inside(entry, item):
                yield f"{key}={entry:g} is out of range: must be {bounds_text(item) or 'finite'}"


def inside(value: float, item: dataclasses.Field[Any]) -> bool:
    checks: dict[str, Callable[[float, float], bool]] = {"ge": operator.ge, "gt": operator.gt, "le": operator.le, "lt": operator.lt}
    bounds = {key: item.metadata.get(key) for key in checks}
    return math.isfinite(value) and all(checks[key](value, bound) for key, bound in bounds.items() if bound is not None)
