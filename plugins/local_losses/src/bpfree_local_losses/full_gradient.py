"""Rectified units whose backward pass lets every gradient through, as in the code for forward-forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, autograd, nn

__all__ = ["full_gradients"]


class _FullGradient(autograd.Function):
    """Computes ``max(u, 0)``; its derivative is taken for one everywhere."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        return u.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, *signals: Tensor) -> Tensor:
        return signals[0].clone()


@contextmanager
def full_gradients(module: nn.Module) -> Iterator[None]:
    """Let the ReLUs of a module, ``nn.ReLU``, pass gradients where they are zero too, in graphs that are made inside.

    Values stay what they are. A unit that is silent for all examples can be reached by a loss in this way; see the peer normalisation of
    forward-forward.
    """
    with ExitStack() as stack:
        for part in module.modules():
            if isinstance(part, nn.ReLU):
                part.forward = _FullGradient.apply  # type: ignore[method-assign]
                stack.callback(vars(part).pop, "forward")
        yield
