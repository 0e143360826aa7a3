"""Splitting of any module into a network of blocks that share its submodules.

::

    network = bpfree.split(torchvision.models.resnet18(num_classes=10), (3, 64, 64))
    print(bpfree.plan(network))

The command line prints the plan; in Python it is logged (``bpfree.network``, level INFO).
Training the network trains the module in place: parameters and buffers are the same objects.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn

from bpfree.errors import UsageError
from bpfree.network.cuts import Cut, Traced, automatic_cuts, common_path, named_cuts, trace
from bpfree.network.network import Network, evaluating
from bpfree.network.watching import main_output, watch
from bpfree.tasks.trees import move

__all__ = ["plan", "split"]

logger = logging.getLogger("bpfree.network")


def split(
    module: nn.Module,
    input_shape: Sequence[int],
    *,
    at: Sequence[str] | None = None,
    readout: str | None = "auto",
    example: Any = None,
) -> Network:
    """Cut a module into blocks at places where a single tensor passes.

    Composed in order, the blocks are the module: in value, in gradients, in train and in eval mode. A block that is
    exactly one submodule is that submodule; another is an ``fx.GraphModule`` over the original submodules.

    Args:
        module: an ``nn.Sequential``, or any module that ``torch.fx`` can trace; optional arguments keep their defaults. Submodules that
            it cannot trace, or whose forward depends on ``self.training``, are kept whole. A module with a method ``bpfree_blocks()``
            declares its own blocks, in order and by name; their composition must equal its forward.
        input_shape: of one example, without the batch axis.
        at: paths of submodules; each begins a block (``["layer1.0", "layer2", "fc"]``), and what comes before the
            first is a block too. Where ``torch.fx`` cannot trace the module (control flow or assertions in its outermost forward, a
            mapping of outputs), forward passes on made-up examples are watched instead. ``None``: a block begins with each layer
            that has weights, so that norm, activation and pooling stay with the layer before them, and residual blocks stay whole.
        readout: name of the last block as the readout; ``None``: there is none; ``"auto"``: it is, if its only layer
            with weights is an ``nn.Linear`` that makes the final output.
        example: made-up inputs of two examples, where they are no single tensor of real numbers: ``spec.example(2)``.

    Returns:
        A network whose blocks are named after submodules, with ``_`` for ``.``; a name that would begin with a digit
        (in an ``nn.Sequential``) begins with ``b``.

    Raises:
        UsageError: the module can neither be traced nor watched, or has no place for a cut; ``at`` names no submodule, or one before
            which more than one tensor passes; two blocks would share parameters; a block overwrites its input.
    """
    before = set(vars(module))
    try:
        if at is None and hasattr(module, "bpfree_blocks"):
            network = own_blocks(module, input_shape, readout, example)
        else:
            network = traced_blocks(module, input_shape, at, readout, example)
        logger.info("%s is split into blocks:\n%s", type(module).__name__, plan(network))
        return network
    finally:
        for leftover in set(vars(module)) - before:  # constants that torch.fx sets on the module
            delattr(module, leftover)


def traced_blocks(
    module: nn.Module, input_shape: Sequence[int], at: Sequence[str] | None, readout: str | None, example: Any = None
) -> Network:
    """Make blocks by tracing the module, or, where that fails and the cuts are given, by watching it."""
    try:
        traced = trace(module, input_shape, example)
    except UsageError as error:
        if at is None or example is not None:  # watching makes up examples of real numbers
            raise
        return watched_blocks(module, input_shape, at, readout, error)
    cuts = automatic_cuts(traced) if at is None else named_cuts(traced, at)
    return assemble(traced, cuts, input_shape, readout, example)


def watched_blocks(module: nn.Module, input_shape: Sequence[int], at: Sequence[str], readout: str | None, untraced: UsageError) -> Network:
    """Make blocks by watching the module; their outputs equal the module's, bit for bit."""
    try:
        traced = watch(module, input_shape, at)
        network = assemble(traced, named_cuts(traced, at), input_shape, readout)
        check_composition(network, module, rtol=0.0, atol=0.0)
    except UsageError as error:
        raise UsageError(error.what, where=f"{error.where}; torch.fx: {untraced.what}", fix=error.fix) from untraced
    logger.info("%s is split by watching it run: %s", type(module).__name__, untraced.what)
    return network


def own_blocks(module: Any, input_shape: Sequence[int], readout: str | None, example: Any = None) -> Network:
    """Return the blocks that a module declares."""
    blocks = {name.replace(".", "_"): block for name, block in module.bpfree_blocks().items()}
    refuse_sharing(blocks)
    if readout == "auto":
        last = list(blocks.values())[-1]
        linear = list(last)[-1] if isinstance(last, nn.Sequential) else last
        matrices = [parameter for parameter in last.parameters() if parameter.dim() > 1]
        readout = list(blocks)[-1] if isinstance(linear, nn.Linear) and len(matrices) == 1 else None
    network = Network(blocks, input_shape=input_shape, readout=readout, example=example)
    check_composition(network, module, rtol=1e-4, atol=1e-5)
    return network


def check_composition(network: Network, module: nn.Module, *, rtol: float, atol: float) -> None:
    """Refuse blocks whose composition differs from the module's forward."""
    x = network.example
    if x is None:
        x = torch.randn(2, *network.input_shape, generator=torch.Generator().manual_seed(0)).to(network.dtype)
    x = move(x, next((parameter.device for parameter in network.parameters()), torch.device("cpu")))
    name = type(module).__name__
    with torch.no_grad(), evaluating(module):
        try:
            expected = main_output(module(x))
        except UsageError as error:
            raise UsageError(f"{name}: {error.what}", where=error.where) from error
        made = network(x)
    if made.shape != expected.shape or not torch.allclose(made, expected, rtol=rtol, atol=atol, equal_nan=True):
        raise UsageError(
            f"the blocks of {name} do not compose to its forward",
            where=f"outputs of shapes {tuple(made.shape)} and {tuple(expected.shape)}",
            fix="return modules from bpfree_blocks() that make its whole forward, each from the previous one's output alone",
        )


def assemble(traced: Traced, cuts: Sequence[Cut], input_shape: Sequence[int], readout: str | None, example: Any = None) -> Network:
    starts = [cut.position for cut in cuts if cut.position > 0]
    spans = [range(first, last) for first, last in pairwise([0, *starts, len(traced.nodes)])]
    names = unique(block_names(traced, spans, {cut.position: cut.name for cut in cuts}))
    blocks = {name: segment(traced, span) for name, span in zip(names, spans, strict=True)}
    refuse_sharing(blocks)
    if readout == "auto":
        readout = names[-1] if ends_in_linear(traced, spans[-1]) else None
    last = None if readout is None else readout.replace(".", "_")
    return Network(blocks, input_shape=input_shape, readout=last, example=example)


def segment(traced: Traced, span: range) -> nn.Module:
    """Make a module of the operations of a span."""
    source = traced.nodes[0] if span.start == 0 else traced.passing(span.start)[0]
    result = traced.result if span.stop == len(traced.nodes) else traced.passing(span.stop)[0]
    whole = whole_module(traced, span, source, result)
    if whole is not None:
        return whole
    graph = fx.Graph()
    copies = {source: graph.placeholder("x")}

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:  # parameters are fetched where they are used; everything else has been copied already
            copies[node] = graph.node_copy(node, copied)
        return copies[node]

    for node in (traced.nodes[index] for index in span):
        if node.op != "placeholder" and node not in traced.constants:
            copied(node)
    graph.output(copied(result))
    return fx.GraphModule(traced.module, graph, class_name="Block")


def whole_module(traced: Traced, span: range, source: fx.Node, result: fx.Node) -> nn.Module | None:
    """Return the submodule that equals a span exactly, if it is called once with nothing but the source."""
    inside = [index for index in span if traced.nodes[index].op != "placeholder" and traced.nodes[index] not in traced.constants]
    path = common_path([traced.owners[index] for index in inside])
    calls = traced.calls.get(path, [])
    if len(calls) != 1 or [i for i in traced.under(path) if traced.nodes[i] not in traced.constants] != inside:
        return None
    args, kwargs, value = calls[0]
    same = len(args) == 1 and not kwargs and getattr(args[0], "node", None) is source and getattr(value, "node", None) is result
    return traced.module.get_submodule(path) if same else None


def block_names(traced: Traced, spans: Sequence[range], asked: dict[int, str]) -> list[str]:
    """Name each block: by the requested module, or by the largest submodule whose weights are the block's alone."""
    paths = [path_of(traced, span, spans) for span in spans]
    first = {traced.owners[index].split(".")[0] for index in spans[0]} - {""}
    if 0 not in asked and (not paths[0] or (len(first) > 1 and any("." in path for path in paths[1:]))):
        paths[0] = "stem"
    named = [asked.get(span.start) or path or f"part{index}" for index, (span, path) in enumerate(zip(spans, paths, strict=True))]
    return [f"b{name}" if name[0].isdigit() else name for name in (name.replace(".", "_") for name in named)]


def path_of(traced: Traced, span: range, spans: Sequence[range]) -> str:
    mine = [traced.owners[index] for index in traced.weights if index in span]
    others = [traced.owners[index] for index in traced.weights if index not in span]
    path = common_path(mine) if mine else ""
    if not path:
        return mine[0] if mine and len(spans) > 1 else ""
    parent = path.rpartition(".")[0]
    while parent and not any(owner == parent or owner.startswith(f"{parent}.") for owner in others):
        path, parent = parent, parent.rpartition(".")[0]
    return path


def unique(names: Sequence[str]) -> list[str]:
    """Make names unique by a number after repeated ones."""
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        seen[name] += 1
        result.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return result


def refuse_sharing(blocks: dict[str, nn.Module]) -> None:
    owners: dict[int, str] = {}
    for name, block in blocks.items():
        for path, parameter in block.named_parameters():
            other = owners.setdefault(id(parameter), name)
            if other != name:
                raise UsageError(
                    f"blocks {other!r} and {name!r} would share the parameter {path!r}, so neither could learn on its own",
                    fix="name cuts that keep all its uses in one block, or give each use its own module",
                )


def ends_in_linear(traced: Traced, span: range) -> bool:
    weights = [index for index in traced.weights if index in span]
    if len(weights) != 1 or traced.nodes[weights[0]] is not traced.result or traced.result.op != "call_module":
        return False
    return isinstance(traced.module.get_submodule(str(traced.result.target)), nn.Linear)


def plan(network: Network) -> str:
    """Print a table of the network's blocks: their layers, output shapes and numbers of parameters."""
    rows = [("block", "output", "parameters", "layers")]
    for name, block in network.blocks.items():
        shape = "x".join(map(str, network.shapes[name])) if name in network.shapes else "?"
        title = f"{name} (readout)" if name == network.readout else name
        rows.append((title, shape, f"{sum(p.numel() for p in block.parameters()):,}", layers_of(block)))
    rows.append(("total", "", f"{sum(p.numel() for p in network.parameters()):,}", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows)


def layers_of(block: nn.Module) -> str:
    """List the kinds of the innermost modules and of the functions, in order of first use, with their numbers."""
    kinds: list[str] = []
    if isinstance(block, fx.GraphModule):
        for node in block.graph.nodes:
            if node.op == "call_module":
                kinds.append(type(block.get_submodule(str(node.target))).__name__)
            elif node.op in ("call_function", "call_method"):
                kinds.append(str(getattr(node.target, "__name__", node.target)))
    else:
        innermost = [part for part in block.modules() if not isinstance(part, nn.Sequential) and not list(part.children())]
        kinds = [type(part).__name__ for part in innermost]
    return ", ".join(f"{count} {kind}" if count > 1 else kind for kind, count in Counter(kinds).items())
