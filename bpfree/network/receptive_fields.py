"""Linear receptive fields: the pattern that excites each unit of a hidden block, drawn in the space of the input images.

A unit is an output of its block's last linear map (of a convolution, the one at the centre of the map, cropped to what it
sees). Its weights are carried back through the layers below by their transposed linear maps,

    r_l = W_1^T D_1 W_2^T D_2 ... W_l^T e_unit,

where each D replaces a layer that is not linear: the identity for activations, dropout and normalisations; for
batch norm with running statistics its own slope, weight / sqrt(var + eps); for max-pooling the mean over its window. Average
poolings, flattening and zero padding are exact, other paddings count as zeros. On a linear network this is the row of the
Jacobian. Closed forms only: nothing is executed, no graph is made, no random number drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bpfree.network.closed_form import is_batch_norm
from bpfree.network.network import Network, evaluating

__all__ = ["receptive_fields"]

LARGEST = 2**26
"""Entries of all of a block's fields on the map of one layer; a block that needs more is left out."""

POOLINGS = (nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
PADDINGS = (nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d)
NORMS_AND_PRELU = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.PReLU)
FUNCTIONS = {"relu", "relu_", "leaky_relu", "gelu", "silu", "elu", "tanh", "hardtanh", "sigmoid", "dropout", "contiguous"}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Fields:
    """K fields on the map between two layers: (K, D), or the part (K, C, h, w) of a larger map that begins at ``corner``."""

    values: Tensor
    corner: tuple[int, ...] = (0, 0)


Pull = Callable[[_Fields], _Fields]


@dataclass(frozen=True)
class _Layer:
    """A layer at its place: its output's shape, its transposed map, and its weight if its outputs are units."""

    shape: Shape
    pull: Pull
    units: Tensor | None = None


class _Unknown(Exception):
    """A layer that has no place in a sequence of linear maps."""


class _TooLarge(Exception):
    """Fields of more than :data:`LARGEST` entries."""


@torch.no_grad()
def receptive_fields(network: Network, count: int = 64, image: Sequence[int] | None = None) -> dict[str, Tensor]:
    """Compute the linear receptive fields of the first ``count`` units of each hidden block.

    Args:
        network: a chain. A block with a layer that is not known (attention, residual sums, parallel paths) is left out, and so are
            those above it. Modules without parameters that keep their input's shape are taken for activations.
        count: of units; of a convolution, channels.
        image: (C, H, W), the shape of an input image where the network takes it flat; by default the network's own.

    Returns:
        By block, (K, C, h, w) on the weights' device. Empty if inputs are no images of 1 or 3 channels.
    """
    shape = tuple(network.input_shape if image is None else image)
    if not network.chain or len(shape) != 3 or shape[0] not in (1, 3) or network.input_shape not in (shape, (math.prod(shape),)):
        return {}
    fields: dict[str, Tensor] = {}
    path: list[_Layer] = []
    with evaluating(network):  # a parametrised weight may change itself when it is read in training
        for name in network.hidden:
            try:
                layers = list(_layers(network.blocks[name], path[-1].shape if path else tuple(network.input_shape)))
            except _Unknown:
                break
            if layers and layers[-1].shape != tuple(network.shapes[name]):
                break
            units = [index for index, layer in enumerate(layers) if layer.units is not None]
            if units:
                found = _carry([*path, *layers[: units[-1] + 1]], count)
                if found is not None:
                    fields[name] = found.reshape(len(found), *shape) if found.dim() == 2 else found
            path += layers
    return fields


def _carry(path: Sequence[_Layer], count: int) -> Tensor | None:
    """Carry fields of the last layer's first outputs back to the first layer's input; ``None`` if they would be too large."""
    weight, (channels, *size) = path[-1].units, path[-1].shape
    assert weight is not None
    values = torch.eye(min(count, channels), channels, device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))
    fields = _Fields(values.reshape(*values.shape, *[1] * len(size)), tuple(length // 2 for length in size))
    try:
        for layer in reversed(path):
            fields = layer.pull(fields)
    except _TooLarge:
        return None
    return fields.values


# --- the layers of a block --------------------------------------------------------------------------------------------


def _layers(block: nn.Module, shape: Shape) -> Iterator[_Layer]:
    for leaf in _leaves(block):
        layer = _layer(leaf, shape)
        yield layer
        shape = layer.shape


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules in the order of their calls, if each takes nothing but the output of the one before."""
    if isinstance(module, fx.GraphModule):
        yield from _graph_leaves(module)
    elif type(module).forward is nn.Sequential.forward:
        for part in module:  # type: ignore[attr-defined]
            yield from _leaves(part)
    elif next(module.children(), None) is None or hasattr(module, "parametrizations"):
        yield module
    else:
        raise _Unknown


def _graph_leaves(module: fx.GraphModule) -> Iterator[nn.Module]:
    last: fx.Node | None = None
    for node in module.graph.nodes:
        if node.op != "placeholder" and (node.all_input_nodes != [last] or last is None or len(last.users) != 1):
            raise _Unknown
        name = str(getattr(node.target, "__name__", node.target))
        if node.op == "call_module" and len(node.args) == 1:
            yield from _leaves(module.get_submodule(str(node.target)))
        elif name == "flatten" and node.args[1:] == (1,) and not node.kwargs:
            yield nn.Flatten()
        elif node.op not in ("placeholder", "output") and name not in FUNCTIONS:
            raise _Unknown
        last = node


def _layer(leaf: nn.Module, shape: Shape) -> _Layer:
    own = type(leaf).forward  # subclasses may compute something else
    if own is nn.Linear.forward:
        return _linear(leaf, shape)
    if own is nn.Conv2d.forward:
        return _convolution(leaf, shape)
    if any(own is kind.forward for kind in POOLINGS):
        return _pooling(leaf, shape)
    if own is nn.Flatten.forward or own is nn.Unflatten.forward:
        return _reshaping(leaf, shape)
    if isinstance(leaf, PADDINGS):
        return _padding(leaf, shape)
    if is_batch_norm(leaf):
        return _batch_norm(leaf, shape)
    if isinstance(leaf, NORMS_AND_PRELU) or next(leaf.parameters(), None) is None:
        return _Layer(shape, lambda fields: fields)
    raise _Unknown


def _linear(leaf: Any, shape: Shape) -> _Layer:
    if shape != (leaf.in_features,):
        raise _Unknown
    return _Layer((leaf.out_features,), lambda fields: _Fields(fields.values @ leaf.weight.to(fields.values.dtype)), leaf.weight)


def _convolution(leaf: Any, shape: Shape) -> _Layer:
    if len(shape) != 3 or shape[0] != leaf.in_channels:
        raise _Unknown
    left, right, top, bottom = leaf._reversed_padding_repeated_twice
    spans = [step * (width - 1) + 1 for step, width in zip(leaf.dilation, leaf.kernel_size, strict=True)]
    padded = (shape[1] + top + bottom, shape[2] + left + right)
    size = [(length - span) // step + 1 for length, span, step in zip(padded, spans, leaf.stride, strict=True)]

    def pull(fields: _Fields) -> _Fields:
        seen = [(n - 1) * step + span for n, step, span in zip(fields.values.shape[2:], leaf.stride, spans, strict=True)]
        _check_size(len(fields.values), shape[0], *seen)
        weight = leaf.weight.to(fields.values.dtype)
        values = F.conv_transpose2d(fields.values, weight, stride=leaf.stride, dilation=leaf.dilation, groups=leaf.groups)
        (y, x), (down, across) = fields.corner, leaf.stride
        return _cropped(values, (y * down - top, x * across - left), shape)

    return _Layer((leaf.out_channels, *size), pull, leaf.weight)


def _cropped(values: Tensor, corner: tuple[int, int], shape: Shape) -> _Fields:
    """Crop to the map of the shape a part of it that begins at ``corner`` and may extend into the padding."""
    (y, x), (height, width) = corner, values.shape[2:]
    top, left = max(0, -y), max(0, -x)
    return _Fields(values[:, :, top : min(height, shape[1] - y), left : min(width, shape[2] - x)], (y + top, x + left))


def _padding(leaf: Any, shape: Shape) -> _Layer:
    left, right, top, bottom = leaf.padding
    if len(shape) != 3:
        raise _Unknown
    return _Layer(
        (shape[0], shape[1] + top + bottom, shape[2] + left + right),
        lambda fields: _cropped(fields.values, (fields.corner[0] - top, fields.corner[1] - left), shape),
    )


def _reshaping(leaf: Any, shape: Shape) -> _Layer:
    """Make the layer of flattening or its inverse, between a map and all of its entries."""
    if type(leaf).forward is nn.Flatten.forward:
        whole = leaf.start_dim == 1 and leaf.end_dim in (-1, len(shape))
        result: Shape = (math.prod(shape),)
    else:
        whole, result = len(shape) == 1 and leaf.dim in (1, -1), tuple(leaf.unflattened_size)
    if not whole or len(shape) not in (1, 3) or len(result) not in (1, 3) or math.prod(result) != math.prod(shape):
        raise _Unknown

    def pull(fields: _Fields) -> _Fields:
        values = fields.values
        if values.dim() == 4:
            (y, x), (height, width) = fields.corner, values.shape[2:]
            values = F.pad(values, (x, result[2] - x - width, y, result[1] - y - height))
        return _Fields(values.reshape(len(values), *shape))

    return _Layer(result, pull)


def _batch_norm(leaf: Any, shape: Shape) -> _Layer:
    def pull(fields: _Fields) -> _Fields:
        if leaf.running_var is None:
            return fields
        slope = (leaf.running_var + leaf.eps).rsqrt() * (1.0 if leaf.weight is None else leaf.weight)
        slope = slope.to(fields.values.dtype).view(-1, *[1] * (fields.values.dim() - 2))
        return _Fields(fields.values * slope, fields.corner)

    return _Layer(shape, pull)


# --- pooling ----------------------------------------------------------------------------------------------------------


def _pooling(leaf: Any, shape: Shape) -> _Layer:
    """Make the layer of means over windows, axis by axis: (out, in) matrices whose rows are the windows."""
    if len(shape) != 3 or getattr(leaf, "divisor_override", None) is not None:
        raise _Unknown
    result = leaf(torch.empty(1, *shape, device="meta"))
    if not isinstance(result, Tensor):  # return_indices
        raise _Unknown
    sizes = tuple(result.shape[2:])

    def pull(fields: _Fields) -> _Fields:
        values, corner, matrices = fields.values, [], []
        for axis, (begin, inside, outside) in enumerate(zip(fields.corner, shape[1:], sizes, strict=True)):
            windows = _windows(leaf, axis, inside, outside)[begin : begin + values.shape[2 + axis]]
            seen = windows.any(0).nonzero().flatten().tolist()
            corner.append(seen[0])
            matrices.append(windows[:, seen[0] : seen[-1] + 1].to(values))
        _check_size(*values.shape[:2], *(matrix.shape[1] for matrix in matrices))
        return _Fields(matrices[0].T @ values @ matrices[1], (corner[0], corner[1]))

    return _Layer((shape[0], *sizes), pull)


def _windows(leaf: Any, axis: int, inside: int, outside: int) -> Tensor:
    windows = torch.zeros(outside, inside)
    for row in range(outside):
        if hasattr(leaf, "output_size"):
            begin, end, step = row * inside // outside, -(-(row + 1) * inside // outside), 1
            divisor = end - begin
        else:
            width, stride, padding, step = (
                value[axis] if isinstance(value, tuple) else value
                for value in (leaf.kernel_size, leaf.stride, leaf.padding, getattr(leaf, "dilation", 1))
            )
            begin = row * stride - padding
            end = begin + step * (width - 1) + 1
            divisor = min(end, inside + padding) - begin if getattr(leaf, "count_include_pad", False) else 0
        places = [place for place in range(begin, end, step) if 0 <= place < inside]
        windows[row, places] = 1 / (divisor or len(places))
    return windows


def _check_size(*sizes: int) -> None:
    if math.prod(sizes) > LARGEST:
        raise _TooLarge
