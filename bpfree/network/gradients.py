"""Gradients that a rule has computed itself, added to ``.grad``."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from bpfree.errors import BpfreeError

__all__ = ["add_gradient", "add_gradients"]


def add_gradient(parameter: Tensor, value: Tensor) -> None:
    """Add a value to a parameter's ``.grad``, if the parameter learns, in the parameter's dtype.

    Args:
        parameter: one with ``requires_grad=False`` stays without a gradient.
        value: of the parameter's shape; what the optimiser descends, so minus the increment of an ascent. It is not written to.

    Raises:
        BpfreeError: the value has another shape.
    """
    if not parameter.requires_grad:
        return
    if value.shape != parameter.shape:
        raise BpfreeError(f"a gradient of shape {tuple(value.shape)} for a parameter of shape {tuple(parameter.shape)}")
    value = value.detach().to(parameter.dtype)  # autocast makes products of lower precision
    parameter.grad = value if parameter.grad is None else parameter.grad + value


def add_gradients(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Add values to the ``.grad`` of a module's parameters by :func:`add_gradient`, by their names: ``weight``, ``inner.bias``."""
    for name, value in values.items():
        add_gradient(module.get_parameter(name), value)
