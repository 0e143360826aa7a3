"""Inputs as they are given for prediction: tensors, arrays or nested lists, of one example or of many, made into one batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bpfree.errors import UsageError
from bpfree.tasks.spec import InputPart, TaskSpec
from bpfree.tasks.trees import leaves, named_leaves, tree_map

__all__ = ["as_batch", "as_tensor"]


def as_batch(spec: TaskSpec, inputs: Any, where: str) -> Any:
    """Make given inputs into a batch (N, *input_shape), or a tree of such tensors where the task has these.

    A single example becomes a batch of one. What else can be read in one way alone is brought into shape: axes of size one that are
    missing or superfluous (grey images without a channel), images whose channels are last, and grey images that are flattened. Other
    shapes stay as they are, for the check that refuses them.

    Args:
        spec: of the task.
        inputs: tensors, arrays, images of PIL, or nested lists of numbers; a tree of them where the task has several.
        where: for messages.

    Raises:
        UsageError: they are no numbers, or lists whose lengths differ.
    """
    if spec.structure is not None:
        return _parts(spec.structure, inputs, where)
    given = as_tensor(inputs, where)
    return _shaped(given, tuple(spec.input_shape))


def as_tensor(values: Any, where: str) -> Tensor:
    """Convert an array, or a nested list of numbers or of arrays, to a tensor of the same numbers.

    Raises:
        UsageError: they are no numbers, or differ in shape.
    """
    if isinstance(values, Tensor):
        return values.detach()
    if isinstance(values, (list, tuple)) and values and all(isinstance(each, Tensor) for each in values):
        shapes = {tuple(each.shape) for each in values}
        if len(shapes) == 1:
            return torch.stack([each.detach() for each in values])
        raise _ragged(where)
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:  # a tensor on another device, lists of different lengths
        raise _ragged(where) from error
    if array.dtype.kind not in "biufc":
        what = f"the inputs hold {array.dtype} ({type(values).__name__}), not numbers"
        raise UsageError(what, where=where, fix="give a tensor, an array or nested lists of numbers")
    array = np.ascontiguousarray(array) if array.ndim else array
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:  # of which torch knows little
        array = array.astype(np.int64)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=not array.flags.writeable))


def _ragged(where: str) -> UsageError:
    return UsageError("the inputs differ in shape, so they are no batch", where=where, fix="give examples of the same shape, or one by one")


def _shaped(given: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a batch of examples of the shape, where there is one way to read what is given as such; else what is given."""
    sizes = tuple(given.shape)
    if sizes[1:] == shape and sizes:
        return given
    if sizes == shape:
        return given[None]
    for count, rest in ((sizes[0], sizes[1:]), (1, sizes)) if sizes else ((1, sizes),):
        if _without_ones(rest) == _without_ones(shape):
            return given.reshape(count, *shape)
    if len(shape) != 3:
        return given
    last = (*shape[1:], shape[0])
    if sizes[1:] == last or sizes == last:
        return given.movedim(-1, -3).reshape(-1, *shape)
    if shape[0] == 1 and len(sizes) in (1, 2) and sizes[-1] == math.prod(shape):
        return given.reshape(-1, *shape)
    return given


def _without_ones(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in sizes if size != 1)


def _parts(structure: Any, inputs: Any, where: str) -> Any:
    """Convert the parts of a structure; those of a single example, if all are, become parts of a batch of one."""
    converted = _converted(structure, inputs, where)
    described, found = dict(named_leaves(structure)), dict(named_leaves(converted))
    if described.keys() == found.keys() and all(found[place].dim() == len(part.shape) for place, part in described.items()):
        return tree_map(lambda leaf: leaf[None], converted)
    return converted


def _converted(structure: Any, inputs: Any, where: str) -> Any:
    """Convert each part; a structure that is not the spec's is left to the check, with whatever tensors it has."""
    if isinstance(structure, InputPart):
        return as_tensor(inputs, where)
    if isinstance(structure, Mapping) and isinstance(inputs, Mapping) and structure.keys() == inputs.keys():
        return {key: _converted(structure[key], inputs[key], where) for key in structure}
    same = isinstance(structure, Sequence) and isinstance(inputs, (list, tuple)) and len(structure) == len(inputs)
    if same and not all(isinstance(each, (int, float)) for each in leaves(inputs)):
        return type(inputs)(_converted(part, each, where) for part, each in zip(structure, inputs, strict=True))
    return tree_map(lambda leaf: as_tensor(leaf, where), inputs)
