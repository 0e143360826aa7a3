"""Forward-mode differentiation: linear maps term by term, noise behind a ReLU, and torch without its own warning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

__all__ = ["Products", "differentiable_attention", "differentiable_kernels", "dual", "prepare", "where_active"]

PRODUCTS = {F.linear, F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d}


@functools.cache
def prepare() -> None:
    """Load torch's decompositions for forward mode, without its warning of a deprecated function of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        with forward_ad.dual_level():
            forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


class Products(TorchFunctionMode):
    """Linear maps of dual tensors, term by term.

    torch's own rule multiplies by a tangent of zeros where weights or inputs have none, which costs a whole product.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in PRODUCTS or len(args) < 2:
            return func(*args, **(kwargs or {}))
        options = dict(kwargs or {})
        x, weight, *rest = args
        bias = rest.pop(0) if rest else options.pop("bias", None)
        return _product(lambda x, w, b: func(x, w, b, *rest, **options), x, weight, bias)


def _product(func: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x, x_moves = forward_ad.unpack_dual(x)
    weight, weight_moves = forward_ad.unpack_dual(weight)
    bias, bias_moves = (None, None) if bias is None else forward_ad.unpack_dual(bias)
    output = func(x, weight, bias)
    terms: list[Tensor] = []
    if x_moves is not None:
        terms.append(func(x_moves, weight, None))
    if weight_moves is not None:
        terms.append(func(x, weight_moves, bias_moves))
    elif bias_moves is not None:
        terms.append(func(x, torch.zeros_like(weight), bias_moves))
    return dual(output, sum(terms[1:], terms[0])) if terms else output


def dual(value: Tensor, tangent: Tensor) -> Tensor:
    return forward_ad.make_dual(value, tangent)  # type: ignore[no-any-return]


def where_active(noise: Tensor, value: Tensor) -> Tensor:
    """Return noise (1 or K, N or 1, ...) where the ReLU of value (N, ...) is active, else zero.

    One elementwise kernel: a product with a boolean mask takes eight times as long on a CPU, ``torch.where`` thirty times.
    """
    return torch.ops.aten.threshold_backward(noise, value, 0)  # type: ignore[no-any-return]


def differentiable_attention() -> AbstractContextManager[None]:
    """Select the kernel of scaled dot-product attention that has a derivative by forward mode; the fused ones have none."""
    return sdpa_kernel(SDPBackend.MATH)  # type: ignore[no-any-return]


@contextmanager
def differentiable_kernels(module: nn.Module) -> Iterator[None]:
    """Select kernels that have a derivative by forward mode, of attention and of an LSTM on a CPU (oneDNN's has none)."""
    one_dnn = torch._C._get_mkldnn_enabled()
    recurrent = one_dnn and any(isinstance(part, nn.LSTM) for part in module.modules())
    if recurrent:
        torch._C._set_mkldnn_enabled(False)
    try:
        with differentiable_attention():
            yield
    finally:
        if recurrent:
            torch._C._set_mkldnn_enabled(True)
