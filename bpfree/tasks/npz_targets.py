"""Kinds of targets in arrays: classes, several labels, soft labels, tokens or numbers.

Unambiguous values decide the kind; ``task.targets`` decides for ambiguous ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bpfree.errors import UsageError
from bpfree.tasks.check import SUM_TOLERANCE, is_whole, listed, not_finite
from bpfree.tasks.spec import IGNORED

__all__ = ["Array", "Kind", "as_targets", "describe_targets", "is_column", "refuse", "tensor"]

Array = NDArray[Any]
Kind = Literal["classes", "multilabel", "soft", "real", "tokens"]


def describe_targets(targets: Mapping[str, Array], said: Kind | Literal["auto"], classes: int | None, where: str) -> tuple[Kind, int]:
    """Return the kind of the targets and the number of outputs, the same for all splits.

    Args:
        targets: of the splits, by the names of their arrays.
        said: the kind that the user gives.
        classes: that there are, or tokens in the vocabulary; ``None``: those that occur.
        where: for messages.

    Raises:
        UsageError: targets that are not of the given kind, or can be read in several ways.
    """
    where, parts = f"{where}: {', '.join(targets)}", list(targets.values())
    for name, part in targets.items():
        refuse(not_finite(tensor(part), name), where, "remove these rows, or fill in numbers")
    kind: Kind = kind_of(parts, where) if said == "auto" else said
    if kind == "classes":
        return kind, count_classes(parts, classes, where)
    if len({part.shape[1:] for part in parts}) > 1 and kind == "tokens":
        refuse("the tokens of the splits differ in number", where, "correct the file")
    if kind == "tokens":
        return kind, count_tokens(parts, classes, where)
    if classes is not None:
        refuse(f"task.classes={classes} does nothing with targets of kind {kind}", where, "leave it out, or set task.targets=classes")
    if len({math.prod(part.shape[1:]) for part in parts}) > 1:
        refuse("the targets of the splits differ in the number of outputs", where, "correct the file")
    if kind == "soft" and not all(is_soft(part) for part in parts):
        refuse(
            "soft labels must be (N, classes) with rows that sum to one", where, "set task.targets to what they are, or correct the file"
        )
    if kind == "multilabel" and not all(part.ndim == 2 and bool(((part == 0) | (part == 1)).all()) for part in parts):
        refuse("several labels at once must be (N, labels) of 0 and 1", where, "set task.targets to what they are, or correct the file")
    return kind, math.prod(parts[0].shape[1:])


def count_tokens(parts: list[Array], vocabulary: int | None, where: str) -> int:
    """Count the tokens: one more than the largest that counts, or as many as ``task.classes`` gives."""
    if any(part.ndim < 2 or part.dtype.kind not in "iu" for part in parts):
        refuse("tokens must be integers (N, ...), several for each example", where, "set task.targets to what they are")
    counted = [part[part != IGNORED] for part in parts]
    if not all(part.size for part in counted):
        refuse(f"a split has no token that counts: all are {IGNORED}", where, "give tokens to predict")
    low, high = min(int(part.min()) for part in counted), max(int(part.max()) for part in counted)
    count = high + 1 if vocabulary is None else vocabulary
    if low < 0 or high >= count:
        what = f"the tokens are {low} to {high}, but {count} tokens are 0 to {count - 1}"
        refuse(what, where, f"count them from 0, with {IGNORED} for those that do not count")
    return max(2, count)


def tensor(targets: Array) -> Tensor:
    return torch.from_numpy(targets.astype(np.float64 if targets.dtype.kind == "f" else np.int64))


def refuse(what: str | None, where: str, fix: str) -> None:
    if what:
        raise UsageError(what, where=where, fix=fix)


def kind_of(parts: list[Array], where: str) -> Kind:
    """Determine the kind of targets by their values; their dtype alone never decides what is learned.

    Raises:
        UsageError: they can be read in several ways.
    """
    low, whole = min(part.min() for part in parts), all(is_whole(tensor(part)) for part in parts)
    integers = all(part.dtype.kind in "biu" for part in parts)
    if all(is_column(part) for part in parts):
        if integers and low < 0:
            negative, count = sum(int((part < 0).sum()) for part in parts), sum(map(len, parts))
            what = f"the labels are integers from {low}, {negative} of {count} are negative: classes are counted from 0"
            refuse(what, where, "remove or re-encode them; task.targets=real if they are numbers")
        if whole and not integers:
            refuse(
                "the targets are whole numbers stored as floats: classes or numbers?",
                where,
                "set task.targets=classes or task.targets=real",
            )
        return "classes" if integers else "real"
    if whole and low >= 0 and max(part.max() for part in parts) <= 1:
        fix = "set task.targets=classes (one-hot rows), multilabel, soft, or real (each column is a number)"
        refuse("the targets are rows of 0 and 1: one class each, or several labels at once?", where, fix)
    if integers:
        refuse("the targets are rows of integers", where, "set task.targets=real if they are numbers, tokens if each is a class")
    return "soft" if all(is_soft(part) for part in parts) else "real"


def count_classes(parts: list[Array], classes: int | None, where: str) -> int:
    """Count the classes: those of the labels, which are 0, 1, 2 and so on, or as many as ``task.classes`` gives."""
    if not all(is_column(part) for part in parts):
        if not all(is_one_hot(part) for part in parts) or len({part.shape[1] for part in parts}) > 1:
            refuse("classes must be integers (N,), counted from 0, or one-hot rows", where, "set task.targets to what they are")
        return int(parts[0].shape[1])
    if not all(is_whole(tensor(part)) for part in parts):
        refuse("classes must be integers, counted from 0, but some targets are fractions", where, "set task.targets to what they are")
    labels = np.unique(np.concatenate([np.unique(part) for part in parts]))
    count = int(labels[-1]) + 1 if classes is None else classes
    shown = listed(labels.astype(float).tolist())
    again = "re-encode them: y = numpy.unique(y, return_inverse=True)[1]"
    if labels[0] < 0 or labels[-1] >= count:
        refuse(f"the labels are {shown}, but {count} classes are 0 to {count - 1}, counted from 0", where, again)
    if len(labels) < 2:
        refuse(f"all labels are {shown}: there is nothing to tell apart", where, "give at least two classes")
    if classes is None and len(labels) < count:
        what = "are counted from 0" if labels[0] else "have no gaps"
        refuse(f"the labels are {shown}, but classes {what}", where, f"{again}; or set task.classes={count}, if the others exist")
    return count


def is_column(targets: Array) -> bool:
    return targets.ndim == 1 or targets.shape[1:] == (1,)


def is_one_hot(targets: Array) -> bool:
    return targets.ndim == 2 and bool(((targets == 0) | (targets == 1)).all() and (targets.sum(1, dtype=np.float64) == 1).all())


def is_soft(targets: Array) -> bool:
    if targets.ndim != 2 or targets.shape[1] < 2 or (targets < 0).any():
        return False
    return np.allclose(targets.sum(1, dtype=np.float64), 1, atol=SUM_TOLERANCE)


def as_targets(array: Array, kind: Kind) -> Tensor:
    if kind == "classes":
        return torch.from_numpy((array.reshape(-1) if is_column(array) else array.argmax(1)).astype(np.int64))
    if kind == "tokens":
        return torch.from_numpy(array.astype(np.int64))
    return torch.from_numpy(array.reshape(len(array), -1).astype(np.float32))
