"""Executions of blocks with their local Jacobian products: in closed form where the layers are known, else by the block's trace.

Both kinds have the same three members, and nothing above them knows which one it has. In closed form there is no autograd graph at
all: what a layer's derivative needs (its input, its output, a pooling's choices) is kept, and torch's own backward kernels are called
on it. Known are linear layers, convolutions padded with zeros, elementwise activations, poolings, flattening, and the plugin's residual
sums and scaled maps, in (nested) ``nn.Sequential``; nothing that is subclassed, parametrised, hooked or works in place.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bpfree import Network, Trace
from bpfree.network import add_gradients, kept_buffers
from bpfree.network.closed_form import is_linear, linear_input_gradient, parameter_gradients
from bpfree.network.trace import run_block
from bpfree_predictive_coding.layers import Residual, Scaled

__all__ = ["ClosedForm", "Execution", "Executor", "Traced", "known_layers"]

aten = torch.ops.aten
NOTHING = nullcontext()
Extra = Any
"""What a layer's derivative needs beyond input and output."""


class Execution(Protocol):
    """Execution of one block on one batch.

    Attributes:
        output: (N, ...) without a graph.
    """

    output: Tensor

    def pull(self, signal: Tensor) -> Tensor:
        """Return ``J^T signal``, (N, ...) of the input's shape, at the input of this execution; may be called again."""
        ...

    def backward(self, signal: Tensor) -> None:
        """Add the parameters' vector-Jacobian product with ``signal`` (N, ...) to their ``.grad``; the last call."""
        ...


class Kind(NamedTuple):
    """How a layer is executed, and how a cotangent of its output becomes one of its input."""

    forward: Callable[[Any, Tensor], tuple[Tensor, Extra]]
    pull: Callable[[Any, Tensor, Tensor, Extra, Tensor], Tensor]


def _elementwise(pull: Callable[[Any, Tensor, Tensor, Tensor], Tensor]) -> Kind:
    return Kind(lambda layer, x: (layer.forward(x), None), lambda layer, x, y, extra, signal: pull(layer, x, y, signal))


def _max_pool(layer: nn.MaxPool2d, x: Tensor) -> tuple[Tensor, Tensor]:
    sizes = [_pair(value) for value in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)]
    y, indices = aten.max_pool2d_with_indices.default(x, *sizes, layer.ceil_mode)
    return y, indices


def _like(x: Tensor, other: Tensor) -> Tensor:
    """Convert to the type of the other tensor, which autocast may have lowered."""
    return x if x.dtype == other.dtype else x.to(other.dtype)


def _pair(value: Any) -> list[int]:
    return list(value) if isinstance(value, tuple | list) else [value, value]


def _pull_max_pool(layer: Any, x: Tensor, y: Tensor, indices: Tensor, signal: Tensor) -> Tensor:
    sizes = [_pair(value) for value in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)]
    pulled: Tensor = aten.max_pool2d_with_indices_backward.default(signal.contiguous(), x, *sizes, layer.ceil_mode, indices)
    return pulled


def _pull_average_pool(layer: Any, x: Tensor, y: Tensor, signal: Tensor) -> Tensor:
    sizes = [_pair(value) for value in (layer.kernel_size, layer.stride, layer.padding)]
    pulled: Tensor = aten.avg_pool2d_backward.default(
        signal.contiguous(), x, *sizes, layer.ceil_mode, layer.count_include_pad, layer.divisor_override
    )
    return pulled


def _pull_linear(layer: Any, x: Tensor, y: Tensor, signal: Tensor) -> Tensor:
    return linear_input_gradient(layer, x, signal)


def _scaled(layer: Scaled, x: Tensor) -> tuple[Tensor, Extra]:
    return layer.forward(x), None


def _pull_scaled(layer: Scaled, x: Tensor, y: Tensor, extra: Extra, signal: Tensor) -> Tensor:
    return KINDS[type(layer.linear)].pull(layer.linear, x, y, None, signal) * layer.factor


def _residual(layer: Residual, x: Tensor) -> tuple[Tensor, ClosedForm]:
    inner = ClosedForm(known_layers(layer.inner) or [], x)
    return x + inner.output, inner


KINDS: dict[type[nn.Module], Kind] = {
    nn.Linear: _elementwise(_pull_linear),
    nn.Conv1d: _elementwise(_pull_linear),
    nn.Conv2d: _elementwise(_pull_linear),
    nn.Flatten: _elementwise(lambda layer, x, y, signal: signal.reshape(x.shape)),
    nn.Identity: _elementwise(lambda layer, x, y, signal: signal),
    nn.ReLU: _elementwise(lambda layer, x, y, signal: aten.threshold_backward.default(signal, y, 0)),
    nn.LeakyReLU: _elementwise(lambda layer, x, y, signal: aten.leaky_relu_backward.default(signal, x, layer.negative_slope, False)),
    nn.GELU: _elementwise(lambda layer, x, y, signal: aten.gelu_backward.default(signal, x, approximate=layer.approximate)),
    nn.SiLU: _elementwise(lambda layer, x, y, signal: aten.silu_backward.default(signal, x)),
    nn.ELU: _elementwise(lambda layer, x, y, signal: aten.elu_backward.default(signal, layer.alpha, 1, 1, False, x)),
    nn.Tanh: _elementwise(lambda layer, x, y, signal: aten.tanh_backward.default(signal, y)),
    nn.Sigmoid: _elementwise(lambda layer, x, y, signal: aten.sigmoid_backward.default(signal, y)),
    nn.Hardtanh: _elementwise(lambda layer, x, y, signal: aten.hardtanh_backward.default(signal, x, layer.min_val, layer.max_val)),
    nn.MaxPool2d: Kind(_max_pool, _pull_max_pool),
    nn.AvgPool2d: _elementwise(_pull_average_pool),
    Scaled: Kind(_scaled, _pull_scaled),
    Residual: Kind(_residual, lambda layer, x, y, inner, signal: signal + inner.pull(signal)),
}


def known_layers(block: nn.Module) -> list[nn.Module] | None:
    """List the layers of a block in order of execution, if all of them are known; else return ``None``."""
    if _is_hooked(block):
        return None
    if type(block) is nn.Sequential:
        parts = [known_layers(part) for part in block]
        return None if any(part is None for part in parts) else [layer for part in parts for layer in part or []]
    return [block] if _is_known(block) else None


def _is_hooked(module: nn.Module) -> bool:
    return "forward" in vars(module) or bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _is_known(layer: Any) -> bool:
    kind = type(layer)
    if kind not in KINDS or getattr(layer, "inplace", False):
        return False
    if kind in (nn.Conv1d, nn.Conv2d):
        return is_linear(layer) and not isinstance(layer.padding, str) and layer.padding_mode == "zeros"
    if kind is nn.Linear:
        return is_linear(layer)
    if kind is nn.Flatten:
        return bool(layer.start_dim > 0)
    if kind is nn.MaxPool2d:
        return not layer.return_indices
    if kind is Scaled:
        return _is_known(layer.linear) and not _is_hooked(layer.linear)
    return kind is not Residual or known_layers(layer.inner) is not None


class ClosedForm:
    """An execution without a graph.

    Args:
        layers: of :func:`known_layers`.
        x: (N, ...) the block's input.
    """

    def __init__(self, layers: list[nn.Module], x: Tensor) -> None:
        self._steps: list[tuple[nn.Module, Kind, Tensor, Tensor, Extra]] = []
        with _no_grad():
            for layer in layers:
                kind = KINDS[type(layer)]
                y, extra = kind.forward(layer, x)
                self._steps.append((layer, kind, x, y, extra))
                x = y
        self.output = x

    def pull(self, signal: Tensor) -> Tensor:
        """Return ``J^T signal``."""
        with _no_grad():
            for layer, kind, x, y, extra in reversed(self._steps):
                signal = kind.pull(layer, x, y, extra, _like(signal, y))
            return signal

    def backward(self, signal: Tensor) -> None:
        """Add the parameters' gradients to ``.grad``; stops at the lowest layer that learns."""
        learning = [any(p.requires_grad for p in layer.parameters()) for layer, *_ in self._steps]
        if True not in learning:
            return
        lowest = learning.index(True)
        with _no_grad():
            for index in range(len(self._steps) - 1, lowest - 1, -1):
                layer, kind, x, y, extra = self._steps[index]
                signal = _like(signal, y)
                if learning[index]:
                    _add_gradients(layer, x, extra, signal)
                if index > lowest:
                    signal = kind.pull(layer, x, y, extra, signal)


def _no_grad() -> AbstractContextManager[object]:
    """Disable gradients only if they are enabled, since ``torch.no_grad()`` takes as long as a small operation."""
    return torch.no_grad() if torch.is_grad_enabled() else NOTHING


def _add_gradients(layer: nn.Module, x: Tensor, extra: Extra, signal: Tensor) -> None:
    if isinstance(layer, Residual):
        extra.backward(signal)
        return
    add_gradients(layer, parameter_gradients(layer, x, signal))


class Traced:
    """An execution by autograd within the block.

    Args:
        trace: of the block; made with ``input_grad=True`` if it is to be pulled through.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self.output = trace.output.detach()

    def pull(self, signal: Tensor) -> Tensor:
        """Return ``J^T signal``."""
        return self._trace.pull(signal.to(self.output.dtype))

    def backward(self, signal: Tensor) -> None:
        """Add the parameters' gradients to ``.grad``."""
        self._trace.backward(signal.to(self.output.dtype))


class Executor:
    """Executes the blocks of a network on one batch, each in closed form if it can be.

    Running statistics of batch norms move with the first execution of a block and stay still in those that follow.

    Args:
        network: a chain.
        path: ``auto``, or ``generic``: all by their traces.

    Attributes:
        closed: names of the blocks that are executed in closed form.
    """

    def __init__(self, network: Network, path: Literal["auto", "generic"] = "auto") -> None:
        self._blocks = list(network.blocks.items())
        layers = {name: known_layers(block) if path == "auto" else None for name, block in self._blocks}
        self._layers = {name: found for name, found in layers.items() if found is not None}
        self.closed = list(self._layers)
        self._executed: set[int] = set()

    def __len__(self) -> int:
        return len(self._blocks)

    def __call__(self, index: int, x: Tensor) -> Execution:
        """Execute block ``index`` on (N, ...); the first one cannot be pulled through, because its input is clamped."""
        name, block = self._blocks[index]
        if name in self._layers:
            return ClosedForm(self._layers[name], x)
        again = index in self._executed
        self._executed.add(index)
        with torch.enable_grad(), kept_buffers(block) if again else NOTHING:
            return Traced(run_block(index, name, block, x, input_grad=index > 0))
