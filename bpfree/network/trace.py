"""Traces: executions of single blocks whose graphs end at the block's own input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bpfree.errors import UsageError

__all__ = ["Trace", "Traces", "run_block", "run_blocks"]


class Trace:
    """One execution of a block, with a graph that ends at the block's own input.

    Attributes:
        index: position of the block in the network.
        name: its name; names joined by ``+`` for a run of consecutive blocks.
        block: the module that was executed.
        input: (N, ...) detached from whatever made it; a tree of tensors where the network's inputs are one.
        output: (N, ...) with the block's local graph, or none if nothing in it requires a gradient.
        parts: the output of each block of a run, by name, all in one graph: a loss of ``parts["b1"]`` reaches ``b1``, and one of
            ``parts["b2"]`` both blocks. Of a single block, its own output.
    """

    __slots__ = ("block", "index", "input", "name", "output", "parts")

    def __init__(
        self, index: int, name: str, block: nn.Module, input: Any, output: Tensor, parts: Mapping[str, Tensor] | None = None
    ) -> None:
        self.index, self.name, self.block, self.input, self.output = index, name, block, input, output
        self.parts: Mapping[str, Tensor] = {name: output} if parts is None else parts

    def pull(self, signal: Tensor) -> Tensor:
        """Compute the input's cotangent ``J^T signal``; leaves every ``.grad`` alone and may be called again.

        Args:
            signal: (N, ...) of the output's shape.

        Raises:
            RuntimeError: if the trace was made without ``input_grad=True``.
        """
        cotangent: Tensor = torch.autograd.grad(self.output, self.input, signal, retain_graph=True)[0]
        return cotangent

    def backward(self, signal: Tensor) -> Tensor | None:
        """Add the vector-Jacobian product with ``signal`` to the parameters' ``.grad``; frees the graph.

        Args:
            signal: (N, ...) of the output's shape: an estimate of dLoss/dOutput that already carries the 1/N of a mean.

        Returns:
            The input's cotangent if the trace was made with ``input_grad=True``, else ``None``.
        """
        if self.output.grad_fn is None:  # a frozen block: nothing to do
            return None
        self.output.backward(signal)
        if not isinstance(self.input, Tensor):  # inputs of several tensors have no cotangent
            return None
        cotangent, self.input.grad = self.input.grad, None
        return cotangent

    def __repr__(self) -> str:
        return f"Trace({self.name!r}, input={tuple(self.input.shape)}, output={tuple(self.output.shape)})"


class Traces(list[Trace]):
    """The traces of all blocks, first to last.

    Attributes:
        tangent: derivative of the last block's output along the perturbations that ``Network.traces`` was given,
            (N, ...) of that output's shape; ``None`` without perturbations.
        perturbations: what was added to each block's output, ``None`` where nothing was.
    """

    def __init__(self, traces: Iterable[Trace] = ()) -> None:
        super().__init__(traces)
        self.tangent: Tensor | None = None
        self.perturbations: list[Tensor | None] = []

    def send_down(self, signal: Tensor) -> None:
        """Send a signal at the last output down from block to block, each of which adds to its parameters' ``.grad``.

        It ends below the lowest block whose trace returns a cotangent: ``Network.traces(..., input_grad="needed")``. With the exact output
        error it is back-propagation.
        """
        cotangent: Tensor | None = signal
        for trace in reversed(self):
            if cotangent is not None:
                cotangent = trace.backward(cotangent)


def run_block(index: int, name: str, block: nn.Module, x: Any, *, input_grad: bool = False) -> Trace:
    """Execute a block on a detached input and return its trace."""
    x = _source(name, x, input_grad)
    return Trace(index, name, block, x, block(x))


def run_blocks(index: int, blocks: Mapping[str, nn.Module], x: Any, *, input_grad: bool = False) -> Trace:
    """Execute consecutive blocks under one graph that ends at the detached input, and return their trace with its parts."""
    source = _source("+".join(blocks), x, input_grad)
    parts: dict[str, Tensor] = {}
    output = source
    for name, block in blocks.items():
        output = parts[name] = block(output)
    return Trace(index, "+".join(blocks), nn.Sequential(*blocks.values()), source, output, parts)


def _source(name: str, x: Any, input_grad: bool) -> Any:
    """Return the input detached from its graph."""
    x = x.detach() if isinstance(x, Tensor) else tree_map(torch.detach, x)
    if input_grad:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            what = f"the input of block {name!r} is no tensor of real numbers, so it has no derivative"
            raise UsageError(what, fix="begin at a later block")
        x.requires_grad_()
    return x
