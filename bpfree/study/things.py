"""Name rules, networks and tasks that a study gets as Python objects instead of names.

Each gets a name in a registry of its own, and a hash: of its module's source (a package's, where it belongs to one), of the data and the
spec for a :class:`bpfree.Task`. So what a class or function does must follow from its source: one that captures variables is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import types
from collections.abc import Mapping
from typing import Any

from bpfree.errors import UsageError
from bpfree.leaves import canonical
from bpfree.network.builders import NetworkBuilder
from bpfree.objects import registered
from bpfree.plugins import Given, PluginRecord, Plugins
from bpfree.recipe import CHOSEN
from bpfree.sources import source_of
from bpfree.study.fingerprints import digest
from bpfree.study.model import Study
from bpfree.tasks.task import DataSource, Task, TaskSpec
from bpfree.yaml_values import Scalar

__all__ = ["Things", "named"]


PLAIN = (str, int, float, list, tuple, Mapping, Scalar)
"""Types that a study file may hold in place of a name; they are checked later."""


class Things:
    """Names for rules, networks and tasks that are made in Python.

    Args:
        registry: of names; each object is added to a copy of it.

    Attributes:
        registry: the copy, with the objects.
    """

    def __init__(self, registry: Plugins) -> None:
        self.registry = registry

    def settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Replace rules, networks and tasks in settings by names."""
        return {key: self._value(key, value) for key, value in settings.items()}

    def _value(self, key: str, value: Any) -> Any:
        section, _, rest = canonical(key, value).partition(".")
        if section not in CHOSEN or rest != "name" or value is None or isinstance(value, PLAIN):
            return value
        return self.name(f"{section}s", value)

    def name(self, kind: str, thing: Any) -> str:
        """Name an object; return a text unchanged.

        Args:
            kind: ``rules``, ``networks`` or ``tasks``.
            thing: the class, function, task, builder or data set.

        Raises:
            UsageError: it is of another kind, or its source does not determine its behaviour.
        """
        if isinstance(thing, str):
            return thing
        for name, known, _ in self.registry.items(kind):  # bpfree.mlp is the registered network of that name
            if thing is known or inspect.unwrap(thing) is _made_by(known):
                return name
        for (other, name), (known, _) in self.registry.given.things.items():
            if other == kind and known is thing:
                return name
        name, module = self._own_name(kind, thing), _module(thing)
        registered(kind, thing, name)  # refused before its source is read
        code = _code(thing)
        self.registry = self.registry.extended(Given(things={(kind, name): (thing, PluginRecord(module, module, "?", code=code))}))
        return name

    def _own_name(self, kind: str, thing: Any) -> str:
        own = thing.spec.name if isinstance(thing, Task) else getattr(_made_by(thing), "__name__", "")
        own = own if own.isidentifier() or isinstance(thing, Task) else kind.removesuffix("s")
        taken = self.registry.names(kind)
        numbered = (f"{own} (Python{number})" for number in ["", *(f" {number}" for number in range(2, len(taken) + 3))])
        return next(name for name in (own, *numbered) if name not in taken)


def named(study: Study, registry: Plugins) -> tuple[Study, Plugins]:
    """Replace objects in a study by names; return it with the registry that has these names.

    Raises:
        UsageError: a study cannot take one of the objects.
    """
    things = Things(registry)
    columns = [dataclasses.replace(column, settings=things.settings(column.settings)) for column in study.columns]
    rows = [
        dataclasses.replace(
            row,
            settings=things.settings(row.settings),
            columns={label: things.settings(own) for label, own in row.columns.items()},
        )
        for row in study.rows
    ]
    return dataclasses.replace(study, settings=things.settings(study.settings), columns=columns, rows=rows), things.registry


def _made_by(thing: Any) -> Any:
    """Return the class or function whose source determines an object's behaviour."""
    if isinstance(thing, NetworkBuilder):
        return inspect.unwrap(thing.build)
    return thing.load if isinstance(thing, DataSource) else thing


def _module(thing: Any) -> str:
    return str(getattr(_made_by(thing), "__module__", type(thing).__module__))


def _code(thing: Any) -> str:
    """Hash the source that determines an object's behaviour.

    Raises:
        UsageError: the source does not determine it.
    """
    if isinstance(thing, Task):
        spec = type(thing.spec)
        own = "" if spec is TaskSpec else source_of(spec)
        return digest([thing.fingerprint(), spec.__qualname__, own, dataclasses.asdict(thing.spec)])
    made = _made_by(thing)
    if captured := sorted(_captured(made)):
        what = f"{made.__name__} captures the variables {', '.join(captured)}, whose values its source does not show"
        raise UsageError(what, where=made.__qualname__, fix="define it at module level, and make these variables options")
    return hashlib.sha256(f"{getattr(made, '__qualname__', '')}\0{source_of(made)}".encode()).hexdigest()[:16]


def _captured(made: Any) -> set[str]:
    """Name the variables that a function, or a class's methods, capture from an enclosing function."""
    if isinstance(made, types.FunctionType):
        return set(made.__code__.co_freevars) - {"__class__"}
    methods = [inspect.unwrap(getattr(each, "__func__", each)) for each in vars(made).values()] if isinstance(made, type) else []
    return {name for method in methods if isinstance(method, types.FunctionType) for name in _captured(method)}
