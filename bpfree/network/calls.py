"""Inputs and outputs of single layers during an execution of a module: a layer's pre-activation, above all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from bpfree.errors import UsageError

__all__ = ["Call", "recorded_calls"]


class Call(NamedTuple):
    """One call of a layer.

    Attributes:
        input: (N, ...) what the layer took.
        output: (N, ...) what it made, the pre-activation of a linear layer or convolution; both with the graph that they have.
    """

    input: Tensor
    output: Tensor


@contextmanager
def recorded_calls(*layers: nn.Module) -> Iterator[dict[nn.Module, list[Call]]]:
    """Record the inputs and outputs of layers inside.

    ::

        with recorded_calls(linear) as calls:
            trace = network.trace("b1", x)
        source, pre_activation = calls[linear][0]

    Args:
        layers: modules that are called with one tensor and return one.

    Yields:
        For each layer its calls so far, in order.

    Raises:
        UsageError: at the end, if an operation after the layer has overwritten the output in place.
    """
    calls: dict[nn.Module, list[Call]] = {layer: [] for layer in layers}
    versions: list[tuple[nn.Module, Tensor, int]] = []

    def note(layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        calls[layer].append(Call(arguments[0], output))
        if not output.is_inference():
            versions.append((layer, output, output._version))

    with ExitStack() as stack:
        for layer in calls:
            stack.callback(layer.register_forward_hook(note).remove)
        yield calls
    for layer, output, version in versions:
        if output._version != version:
            raise UsageError(
                f"the output of {layer} is overwritten in place, so that its pre-activation is lost",
                fix="set inplace=False on the operation that follows it",
            )
