"""Rules, networks and tasks that are made in Python, as a study takes them: objects in place of names.

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
"""What a file may hold in place of a name, rightly or wrongly."""


class Things:
    """Names for what is made in Python.

    Args:
        registry: of names; each thing becomes known in a copy of it.

    Attributes:
        registry: with the things.
    """

    def __init__(self, registry: Plugins) -> None:
        self.registry = registry

    def settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings with names in place of rules, networks and tasks."""
        return {key: self._value(key, value) for key, value in settings.items()}

    def _value(self, key: str, value: Any) -> Any:
        section, _, rest = canonical(key, value).partition(".")
        if section not in CHOSEN or rest != "name" or value is None or isinstance(value, PLAIN):
            return value
        return self.name(f"{section}s", value)

    def name(self, kind: str, thing: Any) -> str:
        """The name of a thing; a text is one already.

        Args:
            kind: ``rules``, ``networks`` or ``tasks``.
            thing: the class, function, task, builder or data set.

        Raises:
            UsageError: it is of another kind, or what it does does not follow from its source.
        """
        if isinstance(thing, str):
            return thing
        for name, known, _ in self.registry.items(kind):  # bpfree.mlp is the network that is called so
            if thing is known or thing is _made_by(known):
                return name
        for (other, name), (known, _) in self.registry.given.things.items():
            if other == kind and known is thing:
                return name
        name, module = self._own_name(kind, thing), _module(thing)
        registered(kind, thing, name)  # refused before its source is looked for
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
    """The study with names in place of objects, and the registry that knows them.

    Raises:
        UsageError: an object is none that a study takes.
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
    """The class or function whose source says what a thing does."""
    if isinstance(thing, NetworkBuilder):
        return thing.build
    return thing.load if isinstance(thing, DataSource) else thing


def _module(thing: Any) -> str:
    return str(getattr(_made_by(thing), "__module__", type(thing).__module__))


def _code(thing: Any) -> str:
    """A hash of all that a thing does.

    Raises:
        UsageError: it cannot be known from its source.
    """
    if isinstance(thing, Task):
        spec = type(thing.spec)
        own = "" if spec is TaskSpec else source_of(spec)
        return digest([thing.fingerprint(), spec.__qualname__, own, dataclasses.asdict(thing.spec)])
    made = _made_by(thing)
    if captured := sorted(_captured(made)):
        what = f"{made.__name__} captures the variables {', '.join(captured)}, of which its source does not say the values"
        raise UsageError(what, where=made.__qualname__, fix="write it at the level of a module, with parameters that are options")
    return hashlib.sha256(f"{getattr(made, '__qualname__', '')}\0{source_of(made)}".encode()).hexdigest()[:16]


def _captured(made: Any) -> set[str]:
    """Names of variables that a function, or a class's methods, take from a function around them."""
    if isinstance(made, types.FunctionType):
        return set(made.__code__.co_freevars) - {"__class__"}
    methods = [inspect.unwrap(getattr(each, "__func__", each)) for each in vars(made).values()] if isinstance(made, type) else []
    return {name for method in methods if isinstance(method, types.FunctionType) for name in _captured(method)}
