"""Recordings of a module's execution: the common part of two passes, and the graph that it makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

__all__ = ["Operation", "Recording", "Ref", "Watched", "created", "mapped", "merged", "needed", "to_graph"]


@dataclass(frozen=True)
class Ref:
    """The value of an operation, by its position."""

    position: int


@dataclass(frozen=True)
class TimesExamples:
    """A number that is a multiple of the number of examples."""

    times: int


@dataclass(frozen=True)
class Operation:
    """An executed operation.

    Attributes:
        kind: of the node in a graph of ``torch.fx``.
        target: a submodule's path, a function, or a method's name.
        args, kwargs: with :class:`Ref` in place of tensors.
        owner: path of the submodule that it is, or is in.
        batched: whether its value is a tensor with an axis of examples.
        in_place: whether it may change a value that has another name, too.
    """

    kind: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    owner: str
    batched: bool = False
    in_place: bool = False


@dataclass
class Recording:
    """One pass: its operations, the first being the input, the value of the output, calls of submodules, and reads of values.

    Attributes:
        examples: their number.
    """

    operations: list[Operation] = field(default_factory=list)
    result: Ref = Ref(0)
    calls: dict[str, list[tuple[Any, Any, Any]]] = field(default_factory=dict)
    reads: list[str] = field(default_factory=list)
    examples: int = 0


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Apply a function to each leaf of a value's tuples, lists, mappings and slices."""
    return map_aggregate(value, change)


# --- several passes ---------------------------------------------------------------------------------------------------


def needed(recording: Recording) -> Recording:
    """Drop operations on which neither the result nor a change in place depends, and renumber the rest."""
    operations = recording.operations
    wanted, open_refs = {0}, [recording.result, *(Ref(index) for index, each in enumerate(operations) if each.in_place)]
    while open_refs:
        ref = open_refs.pop()
        if ref.position in wanted:
            continue
        wanted.add(ref.position)
        mapped((operations[ref.position].args, operations[ref.position].kwargs), lambda leaf: _collect(leaf, open_refs))
    order = sorted(wanted)
    moved = {old: Ref(new) for new, old in enumerate(order)}

    def move(leaf: Any) -> Any:
        return moved.get(leaf.position) if isinstance(leaf, Ref) else leaf

    def kept(each: Operation) -> Operation:
        return replace(each, args=mapped(each.args, move), kwargs=mapped(each.kwargs, move))

    calls = {path: [mapped(call, move) for call in made] for path, made in recording.calls.items()}
    return Recording(
        [kept(operations[position]) for position in order], moved[recording.result.position], calls, recording.reads, recording.examples
    )


def _collect(leaf: Any, found: list[Ref]) -> Any:
    if isinstance(leaf, Ref):
        found.append(leaf)
    return leaf


def merged(one: Recording, other: Recording) -> list[Operation] | None:
    """Merge the operations of two passes, marking multiples of the number of examples; ``None`` if they differ."""
    counts = (one.examples, other.examples)
    if one.result != other.result or len(one.operations) != len(other.operations):
        return None
    common = []
    for a, b in zip(one.operations, other.operations, strict=True):
        if (a.kind, a.target, a.owner, a.batched) != (b.kind, b.target, b.owner, b.batched):
            return None
        try:
            common.append(replace(a, args=_common(a.args, b.args, counts), kwargs=_common(a.kwargs, b.kwargs, counts)))
        except _DifferentError:
            return None
    return common


class _DifferentError(Exception):
    """Two passes differ."""


def _common(a: Any, b: Any, counts: tuple[int, int]) -> Any:
    """Return an argument that is common to both passes."""
    if type(a) is not type(b):
        raise _DifferentError
    if isinstance(a, (tuple, list)):
        if len(a) != len(b):
            raise _DifferentError
        entries = [_common(x, y, counts) for x, y in zip(a, b, strict=True)]
        return tuple(entries) if isinstance(a, tuple) else entries
    if isinstance(a, Mapping):
        if list(a) != list(b):
            raise _DifferentError
        return {key: _common(value, b[key], counts) for key, value in a.items()}
    if isinstance(a, slice):
        return slice(*(_common(x, y, counts) for x, y in ((a.start, b.start), (a.stop, b.stop), (a.step, b.step))))
    if a == b or a is b:
        return a
    if type(a) is int and a * counts[1] == b * counts[0] and a % counts[0] == 0:
        return TimesExamples(a // counts[0])
    raise _DifferentError


# --- as a graph -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Value:
    """The place of a value in a call, as a proxy of ``torch.fx`` describes it."""

    node: fx.Node


class Watched:
    """The tracer's methods that :class:`Traced` needs, for a recording.

    Attributes:
        calls: of submodules, with the nodes of their arguments and values.
    """

    def __init__(self, calls: dict[str, list[Any]]) -> None:
        self.calls = calls
        self.owners: dict[fx.Node, str] = {}

    def owner(self, node: fx.Node) -> str:
        """Return the path of the submodule that an operation is, or is in."""
        return self.owners.get(node, "")


def to_graph(operations: list[Operation], recording: Recording) -> tuple[fx.Graph, Watched]:
    graph = fx.Graph()
    nodes: list[fx.Node] = []
    recent: fx.Node | None = None
    watched = Watched({})

    def found(leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            return nodes[leaf.position]
        if isinstance(leaf, TimesExamples):
            made = graph.call_function(examples_of, (recent, leaf.times))
            watched.owners[made] = operation.owner
            return made
        if isinstance(leaf, torch.device):
            made = graph.call_function(getattr, (recent, "device"))
            watched.owners[made] = operation.owner
            return made
        return leaf

    for operation in operations:
        if operation.kind == "placeholder":
            node = graph.placeholder("x")
        elif operation.kind == "get_attr":
            node = graph.get_attr(operation.target)
        else:
            node = graph.create_node(operation.kind, operation.target, mapped(operation.args, found), mapped(operation.kwargs, found))
        if operation.target is created:
            node.meta["is_wrapped"] = True  # or a copy of the graph would call it with symbolic sizes
        watched.owners[node] = operation.owner
        nodes.append(node)
        recent = node if operation.batched else recent
    graph.output(nodes[recording.result.position])

    def value(leaf: Any) -> Any:
        return _Value(nodes[leaf.position]) if isinstance(leaf, Ref) else leaf

    watched.calls = {path: [mapped(call, value) for call in made] for path, made in recording.calls.items()}
    return graph, watched


def examples_of(x: Tensor, times: int) -> int:
    """Return a multiple of the number of examples; the blocks execute this function."""
    return x.size(0) * times


def created(name: str, *args: Any, **kwargs: Any) -> Any:
    """Make a tensor by a function of torch from numbers alone; the blocks execute this function."""
    return getattr(torch, name)(*args, **kwargs)
