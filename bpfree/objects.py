"""Objects of a file, or of a Python program, as plugins register them: a rule, a builder of networks, a data set.

A rule is a subclass of :class:`bpfree.Rule`. A network is a :class:`~bpfree.network.builders.NetworkBuilder`, a function that returns a
network or any module, or a subclass of ``nn.Module``. A task is a :class:`~bpfree.tasks.task.DataSource`, a :class:`bpfree.Task`, or a
function that returns either, or ``(train, test)``, each a :class:`bpfree.Split` or a pair of inputs and targets.

Functions and modules are called with what their parameters ask for by name: ``spec``, ``input_shape`` and ``outputs`` of the task for a
network (a first parameter without a default is the spec, whatever its name), ``root`` for a task. Further parameters have defaults and
are options, ``network.NAME`` and ``task.NAME``; or there is one, ``config``, whose type is the dataclass of the options.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bpfree.errors import BpfreeError, UsageError
from bpfree.kinds import misfit
from bpfree.network.builders import NetworkBuilder
from bpfree.network.network import Network
from bpfree.network.split import split
from bpfree.options import NoOptions, option
from bpfree.tasks.task import DataSource, Task, TaskSpec, as_split, guessed_spec

__all__ = ["WholeTask", "registered"]

OPTIONS = (bool, int, float, str)
"""Types of options; also lists of them, and any of them or ``None``."""
NETWORKS = "a function that returns a network or module, a subclass of nn.Module, or a NetworkBuilder"
TASKS = "a bpfree.Task, a function that returns one or (train, test), or a DataSource"


def registered(kind: str, thing: Any, name: str) -> Any:
    """Return an object in the form in which a plugin would register it.

    Args:
        kind: ``rules``, ``networks`` or ``tasks``.
        thing: the object.
        name: for messages, and of a task that has none.

    Raises:
        UsageError: it is of another kind.
    """
    made = {"rules": lambda thing, name: thing, "networks": _builder, "tasks": _source}[kind](thing, name)
    wanted = misfit(kind, made)
    if wanted:
        wanted = {"networks": NETWORKS, "tasks": TASKS}.get(kind, wanted)
        is_instance = not isinstance(thing, type) and isinstance(thing, nn.Module)
        fix = "each seed needs a new one: give the class, or a function that makes it" if is_instance else ""
        raise UsageError(f"{name} is {_what(thing)}, not {wanted}", where=name, fix=fix or "name another one")
    return made


def _what(thing: Any) -> str:
    if isinstance(thing, type):
        return f"the class {thing.__name__}"
    return f"the function {thing.__name__}" if inspect.isfunction(thing) else f"of type {type(thing).__name__}"


# --- networks -----------------------------------------------------------------------------------------------------------


def _builder(thing: Any, name: str) -> Any:
    is_module = isinstance(thing, type) and issubclass(thing, nn.Module)
    if isinstance(thing, NetworkBuilder) or not (is_module or inspect.isfunction(thing)):
        return thing
    call = _Call(thing, name, ("spec", "input_shape", "outputs"), first="" if is_module else "spec")

    def build(spec: TaskSpec, config: Any) -> Network:
        made = call(config, {"spec": spec, "input_shape": tuple(spec.input_shape), "outputs": spec.outputs})
        if not isinstance(made, nn.Module):
            raise BpfreeError(f"{name} returns {_what(made)}, not a network or module", where=name, fix="return the network")
        example = None if spec.takes_real_tensors else spec.example(2)
        return made if isinstance(made, Network) else split(made, spec.input_shape, example=example)

    return NetworkBuilder(build, call.Config, _summary(thing))


def _summary(thing: Any) -> str:
    """Return the first line of the object's own docstring, not of an inherited one."""
    return inspect.cleandoc(thing.__doc__ or "").partition("\n")[0]


class _Call:
    """A function or class with its parameters: passed values and options.

    Args:
        function: what is called.
        name: for messages.
        given: parameters that are passed by these names.
        first: what a first parameter of another name stands for, if it has no default.

    Attributes:
        Config: dataclass of the options.
    """

    def __init__(self, function: Callable[..., Any], name: str, given: Sequence[str], first: str = "") -> None:
        self._function, self._given = function, dict[str, str]()
        self._whole: type | None = None
        parameters = inspect.signature(function).parameters
        hints = _hints(function)
        fields: list[tuple[str, Any, Any]] = []
        for position, (key, parameter) in enumerate(parameters.items()):
            if key in given:
                self._given[key] = key
            elif position == 0 and first and parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                self._given[key] = first
            elif key == "config" and (own := _dataclass_in(hints.get(key))) is not None:
                self._whole = own
            elif parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                fields.append((key, *_option(parameter, hints.get(key), name, given)))
        made = dataclasses.make_dataclass("Config", fields, namespace={"__doc__": f"Options of {name}."}) if fields else NoOptions
        self.Config: type = self._whole or made

    def __call__(self, config: Any, values: Mapping[str, Any]) -> Any:
        """Call the function with the options, and with those of the values that are among its parameters."""
        own = {"config": config} if self._whole else {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
        return self._function(**{key: values[source] for key, source in self._given.items()}, **own)


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function.__init__ if isinstance(function, type) else function)  # type: ignore[misc]
    except (NameError, TypeError, AttributeError):  # annotations that cannot be resolved here
        return {}


def _dataclass_in(hint: Any) -> type | None:
    """Return the dataclass in a hint, which may be one ``or None``."""
    return next((part for part in (hint, *typing.get_args(hint)) if isinstance(part, type) and dataclasses.is_dataclass(part)), None)


def _option(parameter: inspect.Parameter, hint: Any, name: str, given: Sequence[str]) -> tuple[Any, Any]:
    """Return type and field of an option.

    Raises:
        UsageError: a parameter that cannot be one.
    """
    default = parameter.default
    if default is parameter.empty:
        known = ", ".join(given)
        fix = f"give it a default, by which it is an option; without one a parameter is one of {known}"
        raise UsageError(f"the parameter {parameter.name!r} of {name} has no default", where=name, fix=fix)
    kind = hint if hint is not None else type(default)
    if isinstance(default, (list, tuple)):
        kind = hint if hint is not None else list[type(default[0]) if default else Any]  # type: ignore[misc]
        return kind, option(factory=lambda: list(default))
    parts = typing.get_args(kind) or (kind,)
    if not all(part in (*OPTIONS, type(None)) or typing.get_origin(kind) in (typing.Literal, list) for part in parts):
        what = f"the parameter {parameter.name!r} of {name} is of type {getattr(kind, '__name__', kind)}, which no setting has"
        raise UsageError(what, where=name, fix="make it a number, a text, a truth value or a list")
    return kind, option(default)


# --- tasks --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WholeTask(DataSource):
    """A data set that may be a whole task, with splits, stages or parts of its own.

    Attributes:
        make: ``(config, root)``: the task, or its spec and its splits, as ``load`` gives them.
    """

    make: Callable[[Any, Path | None], Task | tuple[TaskSpec, Any]] | None = None

    def task(self, config: Any, root: Path | None) -> Task | None:
        """Return the task, if it has more than examples from which a validation split is to be cut."""
        assert self.make is not None
        made = self.make(config, root)
        return made if isinstance(made, Task) and (made.validation is not None or made.stages or made.parts) else None


def _source(thing: Any, name: str) -> Any:
    if isinstance(thing, Task):
        return _whole(lambda config, root: thing, NoOptions, f"{len(thing.train)} training examples")
    if not inspect.isfunction(thing):
        return thing
    call = _Call(thing, name, ("root",))
    known: list[tuple[Any, Any]] = []

    def make(config: Any, root: Path | None) -> Any:
        key = (dataclasses.asdict(config), root)
        if not known or known[0][0] != key:  # the data that were asked for last: two large sets need not be in memory at once
            known.clear()
            known.append((key, _examples(call(config, {"root": root}), config, root, name)))
        return known[0][1]

    return _whole(make, call.Config, _summary(thing))


def _whole(make: Callable[[Any, Path | None], Any], config: type, summary: str) -> WholeTask:
    def spec(config: Any, root: Path | None) -> TaskSpec:
        made = make(config, root)
        return made.spec if isinstance(made, Task) else made[0]  # type: ignore[no-any-return]

    def load(config: Any, root: Path | None) -> Any:
        made = make(config, root)
        if not isinstance(made, Task):
            return made[1]
        return (made.train, made.test) if made.validation is None else (made.train, made.validation, made.test)

    return WholeTask(spec, load, config, summary, make=make)


def _examples(made: Any, config: Any, root: Path | None, name: str) -> Task | tuple[TaskSpec, Any]:
    """Read the return value of a function for a data set.

    Raises:
        UsageError: it is neither a task nor data.
    """
    if isinstance(made, Task):
        return made
    if isinstance(made, DataSource):
        given = made.Config()
        return made.spec(given, root), made.load(given, root)
    if isinstance(made, tuple) and len(made) == 2:
        train, test = (as_split(part, name) for part in made)
        return guessed_spec(name, train, test), (train, test)
    raise UsageError(f"{name} returns {_what(made)}, not a Task or (train, test)", where=name, fix=f"return {TASKS.partition(', or')[0]}")
