"""Cuts of a module: its graph of operations, and the places where a single tensor passes.

The graph comes from ``torch.fx``. A submodule that cannot be traced, or whose forward depends on ``self.training``
(which a graph would freeze), is kept whole as one operation. What cannot be kept whole is refused.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise, takewhile, zip_longest
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bpfree.errors import UsageError, unknown_name
from bpfree.network.network import evaluating
from bpfree.tasks.trees import move

__all__ = ["Cut", "Traced", "automatic_cuts", "named_cuts", "trace"]

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
MAPS = {
    *(F.linear, F.bilinear, F.embedding, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    *(torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.einsum, operator.matmul, "matmul", "mm", "bmm"),
}
"""Functions and methods that are a layer with weights when one of their arguments is a parameter."""
PLAIN = (type(None), bool, int, float, str)
"""Types of defaults with which optional arguments are traced."""
ASSERTIONS = {torch._assert, fx._symbolic_trace._assert_is_none}
Call = tuple[tuple[Any, ...], dict[str, Any], Any]


@dataclass(frozen=True)
class Cut:
    """The beginning of a block at operation ``position``; ``name`` is the requested module, if one was requested."""

    position: int
    name: str = ""


class BlockTracer(fx.Tracer):
    """Records calls of submodules, and the innermost one in which tracing failed."""

    def __init__(self, opaque: set[str]) -> None:
        super().__init__()
        self.opaque, self.failed = opaque, ""
        self.calls: dict[str, list[Call]] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.opaque or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = self.path_of_module(m)
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or path
            raise
        self.calls.setdefault(path, []).append((args, kwargs, result))
        return result

    def owner(self, node: fx.Node) -> str:
        """Return the path of the submodule that an operation is, or is in."""
        if node.op == "call_module":
            return str(node.target)
        scope = self.node_name_to_scope.get(node.name)
        return scope[0] if scope else ""


class Tracer(Protocol):
    """The interface of objects that record a graph: by tracing, or by watching.

    Attributes:
        calls: arguments and results of each call, by path of submodule.
    """

    calls: dict[str, list[Call]]

    def owner(self, node: fx.Node) -> str:
        """Return the path of the submodule that an operation is, or is in."""
        ...


class Traced:
    """A module as a list of operations, in order, the input first.

    Attributes:
        module: the original.
        nodes: the operations, without the final ``output``.
        owners: path of the submodule that each operation is, or is in.
        calls: arguments and results of each call, by path of submodule.
        result: the operation whose value is the module's.
        single: whether exactly one tensor with a batch axis passes from before an operation to it or beyond.
        constants: operations on parameters and buffers alone, which are repeated where they are used.
        weights: positions of the operations with weights (convolutions, linear maps, embeddings, ...).
    """

    def __init__(self, module: nn.Module, graph: fx.Graph, tracer: Tracer, input_shape: Sequence[int], example: Any = None) -> None:
        self.module, self.calls = module, tracer.calls
        nodes = list(graph.nodes)
        self.result: fx.Node = single_output(nodes[-1])
        self.nodes = one_input(nodes[:-1])
        self.owners = [tracer.owner(node) for node in self.nodes]
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self.constants = constants_of(self.nodes)
        batched = run_once(module, graph, input_shape, example)
        self.single = [self._single(index, batched) for index in range(len(self.nodes))]
        self.weights = [index for index, node in enumerate(self.nodes) if has_weight(node, module, self.constants)]

    def passing(self, position: int) -> list[fx.Node]:
        """List the values made before a position and used there or later; parameters are none."""
        return [
            node
            for node in self.nodes[:position]
            if node not in self.constants and (node is self.result or any(self.position.get(user, 0) >= position for user in node.users))
        ]

    def _single(self, position: int, batched: dict[str, bool]) -> bool:
        values = self.passing(position)
        return len(values) == 1 and values[0].op != "placeholder" and batched[values[0].name]

    def under(self, path: str) -> list[int]:
        """List the positions of the operations of a submodule."""
        return [index for index, owner in enumerate(self.owners) if owner == path or owner.startswith(f"{path}.")]


def trace(module: nn.Module, input_shape: Sequence[int], example: Any = None) -> Traced:
    """Trace the module's operations.

    Raises:
        UsageError: its forward cannot be traced, depends on ``self.training``, has more than one input or output, or
            cannot take an input of that shape.
    """
    opaque: set[str] = set()
    while True:
        tracers: list[tuple[fx.Graph, BlockTracer]] = []
        culprit, problem = None, ""
        for training in (False, True):
            tracer = BlockTracer(opaque)
            try:
                with in_mode(module, training):
                    tracers.append((without_defaults(tracer.trace(module, defaults(module))), tracer))
            except Exception as error:  # any user code may fail in any way when it meets a symbolic value
                culprit, problem = tracer.failed, f"it cannot be traced: {type(error).__name__}: {first_line(error)}"
                break
        else:
            culprit = mode_dependence(*tracers)
            problem = "its forward depends on self.training, as functional dropout or batch norm does, and a cut would freeze that"
        if culprit is None:
            return Traced(module, *tracers[0], input_shape, example)
        if culprit == "" or culprit in opaque:
            fix = (
                "name the submodules that begin a block, at=[...] (network.at=[...]), so that one forward pass is watched; "
                "or give the module a method bpfree_blocks() that returns its blocks in order, by name"
            )
            raise UsageError(
                f"{type(module).__name__} cannot be split: {problem}", where=culprit or f"{type(module).__name__}.forward", fix=fix
            )
        opaque.add(culprit)


def defaults(module: nn.Module) -> dict[str, Any] | None:
    """Return the optional arguments of a module's forward that have plain values, with which it is traced."""
    arguments = inspect.signature(type(module).forward).parameters.values()
    plain = {each.name: each.default for each in arguments if each.kind is each.POSITIONAL_OR_KEYWORD and type(each.default) in PLAIN}
    return plain or None


def without_defaults(graph: fx.Graph) -> fx.Graph:
    """Remove the assertions that a module's optional arguments have their defaults from the graph."""
    for node in reversed(graph.nodes):
        if node.op == "call_function" and node.target in ASSERTIONS and not node.users:
            sources = list(node.all_input_nodes)
            compared = [source for source in sources if source.target is operator.eq]
            if all(source.op == "placeholder" for each in sources for source in (each.all_input_nodes if each in compared else [each])):
                graph.erase_node(node)
                for source in compared:
                    graph.erase_node(source)
    return graph


def mode_dependence(evaluated: tuple[fx.Graph, BlockTracer], trained: tuple[fx.Graph, BlockTracer]) -> str | None:
    """Return the submodule in which the two graphs first differ; ``None`` if they are equal."""

    def text(node: fx.Node | None) -> str:
        return "" if node is None else f"{node.op} {node.target} {node.args} {node.kwargs}"

    for one, other in zip_longest(evaluated[0].nodes, trained[0].nodes):
        if text(one) != text(other):
            node, tracer = (one, evaluated[1]) if one is not None else (other, trained[1])
            owner = tracer.owner(node)
            if node.op == "call_module":
                owner = owner.rpartition(".")[0]
            while owner and owner not in tracer.calls:
                owner = owner.rpartition(".")[0]
            return owner
    return None


def automatic_cuts(traced: Traced) -> list[Cut]:
    """Cut before each operation with weights if its predecessor is in another block, as close to it as possible.

    So what follows a weight (norm, activation, pooling) stays with it. Where one instance of a class cannot be cut
    inside, none is: an inverted residual without a shortcut stays whole because its siblings with one do.
    """
    closed = closed_positions(traced)
    cuts = []
    for earlier, later in pairwise(traced.weights):
        places = [index for index in range(earlier + 1, later + 1) if traced.single[index] and index not in closed]
        if places:
            cuts.append(Cut(max(places)))
    if len(traced.weights) > 1 and not cuts:
        raise UsageError(
            f"{type(traced.module).__name__} cannot be split: no single tensor passes between any two of its layers",
            fix="make a Network of blocks of your own, or keep it whole as one block: Network({'all': module}, ...)",
        )
    return cuts


def closed_positions(traced: Traced) -> set[int]:
    """Return the positions inside instances of classes of which some instance cannot be cut."""
    insides: dict[type, list[range]] = {}
    for path in traced.calls:
        part, places = traced.module.get_submodule(path), traced.under(path)
        if type(part) is not nn.Sequential and len(places) > 1:
            insides.setdefault(type(part), []).append(range(places[0] + 1, places[-1] + 1))
    closed: set[int] = set()
    for ranges in insides.values():
        if any(not any(traced.single[index] for index in inside) for inside in ranges):
            closed.update(index for inside in ranges for index in inside)
    return closed


def named_cuts(traced: Traced, names: Sequence[str]) -> list[Cut]:
    """Cut so that each named submodule begins a block.

    Raises:
        UsageError: an unknown name, a submodule that is never called, or one before which several tensors pass.
    """
    known = [path for path, _ in traced.module.named_modules() if path]
    cuts = []
    for name in names:
        if name not in known:
            raise unknown_name("module", name, known, where="at")
        places = traced.under(name)
        if not places:
            raise UsageError(f"module {name!r} is never called", where="at", fix=f"name one of: {possible(traced)}")
        first = places[0]
        if all(node.op in ("placeholder", "get_attr") for node in traced.nodes[:first]):
            cuts.append(Cut(0, name))
        elif traced.single[first]:
            cuts.append(Cut(first, name))
        else:
            passing = ", ".join(node.name for node in traced.passing(first))
            what = f"cannot cut before {name!r}: what passes there is not a single tensor with a batch axis ({passing})"
            raise UsageError(what, where="at", fix=f"name one of: {possible(traced)}")
    return sorted(cuts, key=lambda cut: cut.position)


def possible(traced: Traced) -> str:
    """List the modules at which a block may begin."""
    found = []
    for path in traced.calls:
        places = traced.under(path)
        if places and traced.single[places[0]]:
            found.append(path)
    return ", ".join(found) or "none is possible"


def has_weight(node: fx.Node, module: nn.Module, constants: set[fx.Node]) -> bool:
    """Tell whether an operation is a map with a matrix (or more axes) of parameters; normalisations and scalings are not."""
    if node.op == "call_module":
        part = module.get_submodule(str(node.target))
        return not isinstance(part, NORMS) and any(parameter.dim() > 1 for parameter in part.parameters())
    return node.target in MAPS and not constants.isdisjoint(node.all_input_nodes)


def constants_of(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Find the operations whose values are computed from parameters and buffers alone."""
    found: set[fx.Node] = set()
    for node in nodes:
        if node.op == "get_attr" or (node.all_input_nodes and found.issuperset(node.all_input_nodes)):
            found.add(node)
    return found


def single_output(output: fx.Node) -> fx.Node:
    if not isinstance(output.args[0], fx.Node):
        raise UsageError("a module that is split must return one tensor", where=f"it returns {output.args[0]}", fix="wrap it")
    return output.args[0]


def one_input(nodes: list[fx.Node]) -> list[fx.Node]:
    """Remove inputs that nothing uses (optional ones).

    Raises:
        UsageError: if more than one is used.
    """
    used = [node for node in nodes if node.op == "placeholder" and node.users]
    if len(used) != 1:
        names = ", ".join(node.name for node in used)
        raise UsageError(
            f"a module that is split must use one input, not {len(used)}",
            where=names,
            fix="wrap it in a module that supplies the other inputs",
        )
    return [node for node in nodes if node.op != "placeholder" or node is used[0]]


class Shapes(fx.Interpreter):
    """Executes a graph on two examples and notes which values are tensors with a batch axis."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.batched: dict[str, bool] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.batched[n.name] = isinstance(value, Tensor) and value.dim() > 0 and len(value) == 2
        return value


def run_once(module: nn.Module, graph: fx.Graph, input_shape: Sequence[int], example: Any = None) -> dict[str, bool]:
    """Tell for each operation, by name, whether its value is a tensor with a batch axis."""
    some = next((parameter for parameter in module.parameters() if parameter.is_floating_point()), torch.zeros(()))
    shapes = Shapes(fx.GraphModule(module, graph))
    try:
        with torch.no_grad(), evaluating(module):
            shapes.run(
                torch.zeros(2, *input_shape, device=some.device, dtype=some.dtype) if example is None else move(example, some.device)
            )
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise UsageError(
            f"{type(module).__name__} cannot take an input of shape {tuple(input_shape)}",
            where=f"{type(error).__name__}: {first_line(error)}",
            fix="give the shape of one example, without the batch axis",
        ) from error
    return shapes.batched


def first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "no message")


def common_path(paths: Sequence[str]) -> str:
    """Return the innermost submodule that contains all paths (or is one of them)."""
    levels = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, levels))


@contextmanager
def in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Use train or eval mode inside, and restore each submodule's own mode afterwards."""
    before = [(part, part.training) for part in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for part, mode in before:
            part.training = mode
