"""Gradients of single layers in closed form: no graph, no reverse-mode call.

A rule that knows dLoss/dOutput of a linear map, or an estimate of it, gets the gradient of the map's weights as an outer
product with its input, and the cotangent in front of a normalisation by a formula. Layers that torch does not have
can join in, with methods of their own:

- a linear map: ``parameter_gradients(x, signal) -> dict[str, Tensor]`` by parameter name, and, if its outputs are rows of
  its weight, an integer attribute ``rows``;
- a normalisation without parameters: a true attribute ``normalises`` and ``input_gradient(x, signal) -> Tensor``.

Subclasses of torch's layers are not taken for what they derive from: they may compute something else (torchvision's ``LayerNorm2d``
moves axes first), or make their weights from other parameters.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import grad as conv_gradients
from torch.nn.modules.batchnorm import _BatchNorm

from bpfree.errors import BpfreeError

__all__ = [
    "input_gradient",
    "is_batch_norm",
    "is_linear",
    "is_norm",
    "linear_input_gradient",
    "norm_parameter_gradients",
    "output_rows",
    "parameter_gradients",
]

CONVOLUTIONS = {
    nn.Conv1d: conv_gradients.conv1d_weight,
    nn.Conv2d: conv_gradients.conv2d_weight,
    nn.Conv3d: conv_gradients.conv3d_weight,
}
NORMS = {nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm}


def is_linear(module: nn.Module) -> bool:
    """Tell whether :func:`parameter_gradients` knows the module: a linear layer, a convolution, or one with its own method."""
    if type(module) is nn.Linear or type(module) in CONVOLUTIONS:
        return isinstance(module._parameters.get("weight"), Tensor)  # not computed from other parameters, as pruning and weight_norm do
    return hasattr(module, "parameter_gradients")


def is_norm(module: nn.Module) -> bool:
    """Tell whether :func:`input_gradient` knows the module: layer, group or batch norm, or one with its own method."""
    if type(module) in NORMS:
        return isinstance(module._parameters.get("weight"), Tensor) or getattr(module, "weight", None) is None
    return bool(getattr(module, "normalises", False)) and next(module.parameters(), None) is None


def is_batch_norm(module: nn.Module) -> bool:
    """Tell whether the module normalises with statistics of the batch in training, as batch norms and their subclasses do."""
    return isinstance(module, _BatchNorm)


def output_rows(module: nn.Module) -> int | None:
    """Return the length of the weight's first axis, if its entries make successive runs of the output's channels; else ``None``."""
    if not is_linear(module):
        return None
    if type(module) is nn.Linear:
        return module.out_features
    if type(module) in CONVOLUTIONS:
        return int(module.out_channels)  # type: ignore[arg-type]
    rows = getattr(module, "rows", None)
    return None if rows is None else int(rows)


def parameter_gradients(module: nn.Module, x: Tensor, signal: Tensor) -> dict[str, Tensor]:
    """Compute a linear map's parameter gradients: the outer product of signal and input, summed over examples and positions.

    Args:
        module: for which :func:`is_linear` holds.
        x: (N, ...) its input.
        signal: (N, ...) dLoss/dOutput, of its output's shape.

    Returns:
        By parameter name, of the parameters' shapes and types.

    Raises:
        BpfreeError: a layer's own closed form leaves out a parameter, which would never learn.
    """
    kind = type(module)
    if kind is not nn.Linear and kind not in CONVOLUTIONS:
        result: dict[str, Tensor] = module.parameter_gradients(x, signal)  # type: ignore[operator]
        missing = [name for name, _ in module.named_parameters() if name not in result]
        if missing:
            raise BpfreeError(
                f"{kind.__name__}.parameter_gradients leaves out {', '.join(missing)}", fix="return a gradient for each of its parameters"
            )
        return result
    weight: Tensor = module.weight  # type: ignore[assignment]
    if kind is nn.Linear:
        rows = signal if signal.dim() == 2 else signal.flatten(0, -2)
        gradients = {"weight": rows.t() @ (x if x.dim() == 2 else x.flatten(0, -2)).to(rows.dtype)}
    else:
        rows = signal.transpose(0, 1).flatten(1).t()
        gradients = {"weight": _convolution(module, x, signal)}
    if module.bias is not None:
        gradients["bias"] = rows.sum(0)
    return {name: value.to(weight.dtype) for name, value in gradients.items()}


def _convolution(module: Any, x: Tensor, signal: Tensor) -> Tensor:
    padding = module.padding
    if isinstance(padding, str) or module.padding_mode != "zeros":
        mode = "constant" if module.padding_mode == "zeros" else str(module.padding_mode)
        x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=mode), 0
    weight: Tensor = CONVOLUTIONS[type(module)](
        x,
        module.weight.shape,
        signal.to(x.dtype),
        stride=module.stride,
        padding=padding,
        dilation=module.dilation,
        groups=module.groups,
    )
    return weight


def linear_input_gradient(module: Any, x: Tensor, signal: Tensor, weight: Tensor | None = None) -> Tensor:
    """Compute the cotangent in front of a linear layer or convolution, through its own weight or through another one.

    Args:
        module: a ``nn.Linear``, ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``.
        x: (N, ...) its input, of which only shape and type matter.
        signal: (N, ...) dLoss/dOutput.
        weight: of the shape of the module's weight, used in its place.

    Returns:
        (N, ...) in the signal's type.
    """
    weight = module.weight if weight is None else weight
    weight = weight if weight.dtype == signal.dtype else weight.to(signal.dtype)  # autocast may have lowered the signal's
    if isinstance(module, nn.Linear):
        dense: Tensor = signal @ weight
        return dense
    if not isinstance(module.padding, str) and module.padding_mode == "zeros":
        return _pull_convolution(module, x, signal, weight, list(module.padding))
    mode, sides = module.padding_mode, module._reversed_padding_repeated_twice
    with torch.enable_grad():  # reverse mode of the padding alone
        source = x.detach().to(signal.dtype).requires_grad_()
        padded = F.pad(source, sides, mode="constant" if mode == "zeros" else mode)
    pulled = _pull_convolution(module, padded.detach(), signal, weight, [0] * (x.dim() - 2))
    return torch.autograd.grad(padded, source, pulled)[0]


def _pull_convolution(module: Any, x: Tensor, signal: Tensor, weight: Tensor, padding: list[int]) -> Tensor:
    sizes = (list(module.stride), padding, list(module.dilation), False, [0] * (x.dim() - 2), module.groups)
    x = x if x.dtype == signal.dtype else x.to(signal.dtype)
    pulled: Tensor = torch.ops.aten.convolution_backward.default(signal, x, weight, None, *sizes, [True, False, False])[0]
    return pulled


def input_gradient(module: Any, x: Tensor, signal: Tensor) -> Tensor:
    """Compute the cotangent in front of a normalisation.

    For y = gamma (x - m) / s with m and s over a set of entries, dL/dx = (d - mean d - xhat mean(d xhat)) / s with
    d = gamma dL/dy; with fixed statistics, d / s.

    Args:
        module: for which :func:`is_norm` holds, in the mode in which it was executed.
        x: (N, ...) its input.
        signal: (N, ...) dLoss/dOutput.

    Returns:
        (N, ...) in single precision at least.
    """
    if hasattr(module, "input_gradient"):
        result: Tensor = module.input_gradient(x, signal)
        return result
    x, signal = _precise(x), _precise(signal)
    gamma = _scale(module, x)
    scaled = signal if gamma is None else signal * gamma
    if isinstance(module, _BatchNorm) and not _uses_batch(module):
        return scaled / _fixed(module, x)[1]
    hat, deviation, view, axes = _normalised(module, x)
    scaled = scaled.reshape(view)
    centred = scaled - scaled.mean(axes, keepdim=True) - hat * (scaled * hat).mean(axes, keepdim=True)
    return (centred / deviation).reshape(x.shape)


def norm_parameter_gradients(module: Any, x: Tensor, signal: Tensor) -> dict[str, Tensor]:
    """Compute gradients of a normalisation's own scale and shift, by parameter name; empty if it has none.

    Args:
        module: for which :func:`is_norm` holds, in the mode in which it was executed.
        x: (N, ...) its input.
        signal: (N, ...) dLoss/dOutput.
    """
    weight = getattr(module, "weight", None)
    if weight is None:
        return {}
    x, signal = _precise(x), _precise(signal)
    if isinstance(module, _BatchNorm) and not _uses_batch(module):
        mean, deviation = _fixed(module, x)
        hat = (x - mean) / deviation
    else:
        hat = _normalised(module, x)[0].reshape(x.shape)
    kept = x.dim() - len(module.normalized_shape) if isinstance(module, nn.LayerNorm) else None
    axes = list(range(kept)) if kept is not None else [0, *range(2, x.dim())]
    gradients = {"weight": (signal * hat).sum(axes).to(weight.dtype)}
    if getattr(module, "bias", None) is not None:
        gradients["bias"] = signal.sum(axes).to(weight.dtype)
    return gradients


def _precise(x: Tensor) -> Tensor:
    """Convert to single precision at least, in which statistics are taken, also of activities in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _uses_batch(module: _BatchNorm) -> bool:
    return module.training or module.running_mean is None


def _fixed(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return running mean and standard deviation, shaped to broadcast over the input."""
    shape = (1, -1, *[1] * (x.dim() - 2))
    return module.running_mean.view(shape), (module.running_var + module.eps).sqrt().view(shape)


def _scale(module: Any, x: Tensor) -> Tensor | None:
    weight = getattr(module, "weight", None)
    if weight is None or isinstance(module, nn.LayerNorm):
        return weight  # type: ignore[no-any-return]
    return weight.view(1, -1, *[1] * (x.dim() - 2))  # type: ignore[no-any-return]


def _normalised(module: Any, x: Tensor) -> tuple[Tensor, Tensor, torch.Size, list[int]]:
    """Return the normalised input and the standard deviation, in the view and over the axes of the statistics."""
    if isinstance(module, nn.LayerNorm):
        view, axes = x.shape, list(range(-len(module.normalized_shape), 0))
    elif isinstance(module, nn.GroupNorm):
        view, axes = torch.Size((x.shape[0], module.num_groups, x[0].numel() // module.num_groups)), [2]
    else:
        view, axes = x.shape, [0, *range(2, x.dim())]
    parts = x.reshape(view)
    variance, mean = torch.var_mean(parts, axes, correction=0, keepdim=True)
    deviation = (variance + module.eps).sqrt()  # type: ignore[operator]
    return (parts - mean) / deviation, deviation, view, axes
