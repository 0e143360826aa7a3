"""Modules of the plugin's networks that bring their own local derivatives: a residual sum, and a linear map times a constant."""

from __future__ import annotations

from torch import Tensor, nn

from bpfree.network.closed_form import parameter_gradients

__all__ = ["Residual", "Scaled"]


class Residual(nn.Module):
    """``x + inner(x)``.

    Args:
        inner: keeps the shape of its input.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, ...) to the same shape."""
        out: Tensor = x + self.inner(x)
        return out


class Scaled(nn.Module):
    """A linear layer or convolution times a constant.

    Args:
        linear: has no bias.
        factor: the constant.
    """

    def __init__(self, linear: nn.Module, factor: float) -> None:
        super().__init__()
        self.linear, self.factor = linear, factor

    def extra_repr(self) -> str:
        return f"factor={self.factor:.4g}"

    def forward(self, x: Tensor) -> Tensor:
        """Map an input as the linear map does, times the constant."""
        out: Tensor = self.linear(x) * self.factor
        return out

    def parameter_gradients(self, x: Tensor, signal: Tensor) -> dict[str, Tensor]:
        """Return the gradients by parameter name; see :func:`bpfree.network.closed_form.parameter_gradients`."""
        return {f"linear.{name}": value.mul_(self.factor) for name, value in parameter_gradients(self.linear, x, signal).items()}
