"""The one check of data against their spec: all data for training, testing, scoring or prediction pass here.

It looks at each number at most twice, and not at all at those that cannot be wrong (pixels in uint8).
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bpfree.errors import UsageError
from bpfree.tasks.spec import IGNORED, InputPart, TaskSpec, has_own_loss
from bpfree.tasks.splits import Examples, Split
from bpfree.tasks.trees import check_tree, named_leaves

__all__ = ["check_inputs", "check_lengths", "check_split", "check_task", "is_whole", "listed", "named", "not_finite", "settled"]

logger = logging.getLogger("bpfree")

CHUNK = 1 << 22
"""Numbers that are checked at a time."""
WHITE = 255.0
"""The largest value of a pixel in eight bits."""
BRIGHT = 64.0
"""Non-negative floats that reach this value and stay below 256 may be resized pictures."""
SLACK = 0.1
"""Share of their range by which inputs may be outside of it: resizing overshoots."""
LOOKED_AT = 64
"""Number of examples that are checked of a split that is read example by example."""
SHOWN = 8
"""Labels that a message names."""
SUM_TOLERANCE = 1e-3
SCALE_FIX = (
    "task.scale=255 (in Python: TaskSpec(..., scale=255)) if they are pixels, which are then divided by it; 1 takes them as they are"
)

Extent = tuple[float, float]


def check_task(spec: TaskSpec, train: Examples, validation: Examples | None, test: Examples) -> TaskSpec:
    """Check the splits of a task.

    Args:
        spec: as the source or the user gave it.
        train, validation, test: the splits.

    Returns:
        The spec with the scale and the limits of its inputs filled in from the training split.

    Raises:
        UsageError: as ``check_split``; inputs whose scale is ambiguous; training labels of a single class; or two splits with examples of
            one group.
    """
    splits = {"train": train, "test": test} | ({} if validation is None else {"validation": validation})
    for name, split in splits.items():
        if not isinstance(split, Examples):
            fix = "make it one: bpfree.Split(inputs, targets), or bpfree.Task.of(train, test)"
            raise UsageError(f"the {name} split is no Split but {type(split).__name__}", where=f"task {spec.name}", fix=fix)
        if isinstance(split, Split):
            _check_inputs_type(split.inputs, f"the inputs of the {name} split", f"task {spec.name}")
        if split.targets is not None:
            _check_type(split.targets, f"the targets of the {name} split", f"task {spec.name}")
    spec = settled(spec, train)
    for name, split in splits.items():
        check_split(spec, split, name)
    _check_classes(spec, splits)
    _check_groups(spec, splits)
    return spec


def _check_groups(spec: TaskSpec, splits: Mapping[str, Examples]) -> None:
    """Refuse splits that share a group of examples; a split that is both (as one graph is) holds the same examples."""
    grouped = {name: split.groups for name, split in splits.items() if isinstance(split, Split) and split.groups is not None}
    for (name, one), (other, two) in itertools.combinations(grouped.items(), 2):
        if one is not two and (common := int(torch.isin(one.unique(), two).sum())):
            what = f"the {name} and the {other} split share {common} groups of examples that belong together"
            raise UsageError(what, where=f"task {spec.name}", fix="put all examples of a group into one split")


def check_split(spec: TaskSpec, split: Examples, name: str) -> None:
    """Check that a split fits a spec, and that all of its numbers are finite.

    Of examples that have to be read one by one, only the first 64 are checked.

    Args:
        spec: the task's, or that of the task on which a rule was trained.
        split: the examples.
        name: of the split: ``train``, ``validation`` or ``test``.

    Raises:
        UsageError: it is empty; inputs and targets differ in length; inputs have another shape or lie in another range; targets are
            of another kind, shape or range; or a number is NaN or infinite.
    """
    where = f"task {spec.name}, {name} split"
    if not len(split):
        fix = "give it examples" if name != "test" else "give test examples: a run is tested once, at its end"
        raise UsageError(f"the {name} split holds no examples", where=where, fix=fix)
    check_lengths(split, f"the {name} split")
    looked_at = _looked_at(split, f"the {name} split", f"task {spec.name}")
    _check_inputs(spec, looked_at.inputs, f"x_{name}", where)
    _check_targets(spec, looked_at.targets, f"y_{name}", where)


def _looked_at(split: Examples, what: str, where: str) -> Split:
    """Return the split itself, or the part of it that is read for the check."""
    if isinstance(split, Split):
        return split
    inputs, targets = split.batch(torch.arange(min(LOOKED_AT, len(split))))
    _check_inputs_type(inputs, f"the inputs of {what}", where)
    return Split(inputs, targets)


def _check_inputs_type(inputs: Any, what: str, where: str) -> None:
    if isinstance(inputs, (dict, list, tuple)):
        if problem := check_tree(inputs):
            raise UsageError(f"{what}: {problem}", where=where, fix="give tensors with the same first axis, the examples")
        return
    _check_type(inputs, what, where)


def _check_type(values: Any, what: str, where: str) -> None:
    if not isinstance(values, Tensor):
        raise UsageError(f"{what} are no tensor but {type(values).__name__}", where=where, fix="give torch.as_tensor(...)")


def check_lengths(split: Examples, what: str) -> None:
    """Refuse inputs and targets that differ in number."""
    if split.targets is not None and len(split) != len(split.targets):
        raise UsageError(f"{what} has {len(split)} inputs and {len(split.targets)} targets", fix="each input needs a target of its own")


def check_inputs(spec: TaskSpec, inputs: Any, where: str) -> None:
    """Check inputs alone, such as those that are given to ``predict``.

    Raises:
        UsageError: another shape or range than the spec's, numbers that are not finite, or a scale that is ambiguous.
    """
    _check_inputs_type(inputs, "inputs", where)
    _check_inputs(spec, inputs, "x", where)


def not_finite(values: Tensor, name: str) -> str | None:
    """``x_train holds 24 values that are NaN (in 22 of 300 rows)``; ``None`` if all are finite."""
    if not values.is_floating_point():
        return None
    nan, infinite, rows = 0, 0, 0
    for part in _chunks(values):
        wrong = ~part.isfinite()
        if bool(wrong.any()):
            nan += int(part.isnan().sum())
            infinite += int(part.isinf().sum())
            rows += int(wrong.flatten(1).any(1).sum()) if wrong.dim() > 1 else int(wrong.sum())
    found = ((nan, "NaN"), (infinite, "infinite"))
    counts = [f"{count} {'value that is' if count == 1 else 'values that are'} {kind}" for count, kind in found if count]
    return f"{name} holds {' and '.join(counts)} (in {rows} of {len(values)} rows)" if counts else None


def is_whole(values: Tensor) -> bool:
    """Tell whether all numbers are whole ones, whatever their dtype."""
    return not values.is_floating_point() or all(bool((part == part.round()).all()) for part in _chunks(values))


def listed(labels: Iterable[float]) -> str:
    """List the first few of many labels."""
    return _first([f"{label:g}" for label in labels])


def named(spec: TaskSpec, classes: Iterable[int]) -> str:
    """List the first few of many classes, by their names if they have any."""
    return _first([spec.label(place) for place in classes])


def _first(texts: list[str]) -> str:
    return ", ".join(texts[:SHOWN]) + (f", ... ({len(texts)} of them)" if len(texts) > SHOWN else "")


# --- inputs ---------------------------------------------------------------------------------------------------------------


def _check_inputs(spec: TaskSpec, inputs: Any, name: str, where: str) -> None:
    if not spec.takes_real_tensors:
        _check_parts(spec, inputs, name, where)
        return
    if not isinstance(inputs, Tensor):
        fix = "describe them: TaskSpec(..., structure={...: bpfree.InputPart(shape)})"
        raise UsageError("the inputs are several tensors, but the spec describes one", where=where, fix=fix)
    expected = tuple(spec.input_shape)
    if tuple(inputs.shape[1:]) != expected or not inputs.dim():
        raise UsageError(
            f"inputs have shape {tuple(inputs.shape)}, expected (N, {', '.join(map(str, expected))})",
            where=where,
            fix="give a batch of inputs as the task has them" + ("; of one input: x[None]" if tuple(inputs.shape) == expected else ""),
        )
    if inputs.is_complex():
        raise UsageError(f"{name} holds complex numbers", where=where, fix="give real ones, such as x.abs()")
    if not inputs.numel():
        return
    if inputs.dtype == torch.uint8 and (spec.limits is None or spec.limits[1] >= WHITE):
        return
    extent = _extent(inputs)
    _check_finite(inputs, extent, name, where)
    if type(spec).normalise is not TaskSpec.normalise:
        return
    if spec.scale is None and _scale_of(inputs, extent) is None:  # a checkpoint from before there was a scale
        raise UsageError(
            _ambiguous(inputs, extent, name), where=where, fix="give uint8 (divided by 255), floats from 0 to 1, or a spec with a scale"
        )
    if spec.limits is not None:
        _check_limits(inputs, extent, spec.limits, name, where)


def _check_parts(spec: TaskSpec, inputs: Any, name: str, where: str) -> None:
    """Check integers, and inputs of several tensors, against the parts of the spec."""
    described, given = dict(named_leaves(spec.parts)), dict(named_leaves(inputs))
    if described.keys() != given.keys():
        have, wanted = (", ".join(each) or "one tensor" for each in (given, described))
        raise UsageError(
            f"the inputs have the parts {have}, but the spec describes {wanted}", where=where, fix="give both the same structure"
        )
    for place, part in described.items():
        _check_part(part, given[place], name + place, where)


def _check_part(part: InputPart, leaf: Tensor, name: str, where: str) -> None:
    shape = tuple(leaf.shape[1:])
    if len(shape) != len(part.shape) or any(want not in (-1, have) for want, have in zip(part.shape, shape, strict=True)):
        wanted = ", ".join("any" if size == -1 else str(size) for size in part.shape)
        raise UsageError(f"{name} has shape {tuple(leaf.shape)}, expected (N, {wanted})", where=where, fix="correct the data or the spec")
    if part.dtype == "real":
        if leaf.is_complex():
            raise UsageError(f"{name} holds complex numbers", where=where, fix="give real ones, such as x.abs()")
        if problem := not_finite(leaf, name):
            raise UsageError(problem, where=where, fix="remove these rows, or fill in numbers")
        return
    if leaf.is_floating_point() or leaf.is_complex():
        raise UsageError(f"{name} holds {leaf.dtype}, but its numbers are {part.dtype}", where=where, fix="give integers: x.long()")
    if part.vocabulary is None or not leaf.numel():
        return
    low, high = _extent(leaf)
    if low < 0 or high >= part.vocabulary:
        what = f"{name} holds integers from {low:g} to {high:g}, but its vocabulary is 0 to {part.vocabulary - 1}"
        raise UsageError(what, where=where, fix=f"count them from 0, or set vocabulary={int(high) + 1}")


def _check_finite(inputs: Tensor, extent: Extent, name: str, where: str) -> None:
    if math.isfinite(extent[0]) and math.isfinite(extent[1]):
        largest = max(map(abs, extent))
        if largest <= torch.finfo(torch.float32).max:
            return
        raise UsageError(f"{name} holds {largest:g}, which is infinite as float32", where=where, fix="scale the inputs down")
    problem = not_finite(inputs, name)
    raise UsageError(problem or f"{name} is not finite", where=where, fix="remove these rows, or fill in numbers")


def _check_limits(inputs: Tensor, extent: Extent, limits: Extent, name: str, where: str) -> None:
    (low, high), (least, most) = extent, limits
    slack = SLACK * (most - least)
    if least - slack <= low and high <= most + slack and not (inputs.is_floating_point() and most > 1 and 0 < high <= 1):
        return
    if high <= 1 and low >= 0:
        fix = f"multiply them by {most:g}, or give integers"
    elif most == 1 and low >= 0:
        fix = "bring them to [0, 1]: pixels of 0 to 255 are divided by 255"
    else:
        fix = f"bring them to {least:g} to {most:g}; or, when training, set task.scale (TaskSpec(scale=...)): what inputs are divided by"
    raise UsageError(
        f"{name} holds values from {low:g} to {high:g}, but raw inputs of this task lie in {least:g} to {most:g}", where=where, fix=fix
    )


def settled(spec: TaskSpec, train: Examples) -> TaskSpec:
    """Add scale and limits to the spec, as far as the training inputs determine them; faults in the inputs are left to the check.

    Raises:
        UsageError: the scale of the inputs is ambiguous.
    """
    if not spec.takes_real_tensors or type(spec).normalise is not TaskSpec.normalise or not len(train):
        return spec
    inputs, scale, limits = _looked_at(train, "the train split", f"task {spec.name}").inputs, spec.scale, spec.limits
    if not isinstance(inputs, Tensor) or not inputs.numel() or inputs.is_complex() or (scale is not None and limits is not None):
        return spec
    pixels = inputs.dtype == torch.uint8 and (scale == WHITE or (scale is None and _are_images(inputs)))
    extent = (0.0, WHITE) if pixels else _extent(inputs)
    if scale is None:
        if math.isnan(extent[0]):
            return spec  # refused by the check
        scale = _scale_of(inputs, extent)
        if scale is None:
            what = _ambiguous(inputs, extent, "x_train")
            raise UsageError(what, where=f"task {spec.name}, train split", fix=SCALE_FIX)
    if limits is None:
        limits = _limits_of(inputs, extent, scale)
    return replace(spec, scale=scale, limits=limits)


def _limits_of(inputs: Tensor, extent: Extent, scale: float) -> Extent | None:
    """Return the range in which all inputs of a task must lie; none for features, which are of any size."""
    low, high = extent
    if scale != 1:
        return (0.0, float(scale)) if _are_images(inputs) or (low >= 0 and high <= scale) else None
    if not _are_images(inputs) or low < 0 or high > WHITE:
        return None
    return (0.0, 1.0) if high <= 1 else (0.0, WHITE) if is_whole(inputs) else None


def _scale_of(inputs: Tensor, extent: Extent) -> float | None:
    """Return the number that inputs are divided by if no scale is given; ``None`` where that is ambiguous."""
    images, (low, high) = _are_images(inputs), extent
    if inputs.dtype == torch.uint8:
        return WHITE if images else None
    pictures = images and low >= 0 and high > 1.5 and (is_whole(inputs) or BRIGHT <= high < WHITE + 1)
    return None if pictures else 1.0


def _ambiguous(inputs: Tensor, extent: Extent, name: str) -> str:
    kind = "images" if _are_images(inputs) else "vectors" if inputs.dim() == 2 else "arrays"
    dtype = str(inputs.dtype).removeprefix("torch.")
    return f"{name} holds {kind} of {dtype} with values from {extent[0]:g} to {extent[1]:g}: pixels, or numbers to be taken as they are?"


def _are_images(inputs: Tensor) -> bool:
    return inputs.dim() == 4


def _extent(values: Tensor) -> Extent:
    """Return the smallest and the largest number; NaN if one of them is."""
    if values.dtype == torch.bool:
        return 0.0, 1.0
    low, high = values.aminmax()
    return float(low), float(high)


def _chunks(values: Tensor) -> Iterator[Tensor]:
    yield from values.split(max(1, CHUNK // max(1, values[:1].numel()))) if values.dim() else (values[None],)


# --- targets --------------------------------------------------------------------------------------------------------------


def _check_targets(spec: TaskSpec, targets: Tensor | None, name: str, where: str) -> None:
    if targets is None or spec.targets == "none":
        if (targets is None) != (spec.targets == "none"):
            have = "no targets" if targets is None else "targets"
            fix = "targets=None and targets='none' belong together"
            raise UsageError(f"the split has {have}, but the spec says targets={spec.targets!r}", where=where, fix=fix)
        return
    problem = not_finite(targets, name)
    if problem:
        raise UsageError(problem, where=where, fix="remove these rows, or fill in numbers")
    if has_own_loss(spec) and targets.dim() != 1:
        return
    check = {
        "classes": _classes_problem,
        "multilabel": _labels_problem,
        "soft": _soft_problem,
        "real": _real_problem,
        "tokens": _tokens_problem,
    }[spec.targets]
    what, fix = check(spec, targets, name)
    if what and not (has_own_loss(spec) and spec.targets != "classes"):
        raise UsageError(what, where=where, fix=fix)


def _classes_problem(spec: TaskSpec, targets: Tensor, name: str) -> tuple[str, str]:
    if targets.dim() != 1:
        fix = "targets.reshape(-1)" if targets[0].numel() == 1 else "targets='soft' for distributions over classes"
        return f"{name} has shape {tuple(targets.shape)}, but classes are (N,)", fix
    if targets.is_floating_point() or targets.is_complex():
        return (
            f"{name} holds {targets.dtype}, but classes are integers",
            "targets.long() if they are classes, targets='real' if they are numbers",
        )
    low, high = _extent(targets)
    if low < 0 or high >= spec.outputs:
        found = listed(targets.unique().tolist())
        fix = f"count them from 0: numpy.unique(y, return_inverse=True)[1]; or a spec with {int(high) + 1} outputs"
        return f"{name} holds the labels {found}, but classes of {spec.outputs} outputs are 0 to {spec.outputs - 1}", fix
    return "", ""


def _soft_problem(spec: TaskSpec, targets: Tensor, name: str) -> tuple[str, str]:
    what, fix = _rows_problem(targets, (spec.outputs,), name)
    if not what and bool((targets < 0).any()):
        return f"{name} holds soft labels below 0", "give distributions over classes"
    if not what and bool(((targets.double().sum(1) - 1).abs() > SUM_TOLERANCE).any()):
        return f"{name} holds soft labels that do not sum to one", "divide each row by its sum; targets='real' if they are numbers"
    return what, fix


def _labels_problem(spec: TaskSpec, targets: Tensor, name: str) -> tuple[str, str]:
    if tuple(targets.shape[1:]) != (spec.outputs,):
        return f"{name} has shape {tuple(targets.shape)}, expected (N, {spec.outputs})", "give a 0 or 1 for each label"
    if not bool(((targets == 0) | (targets == 1)).all()):
        return f"{name} holds numbers other than 0 and 1", "targets='soft' for distributions, targets='real' if they are numbers"
    return "", ""


def _tokens_problem(spec: TaskSpec, targets: Tensor, name: str) -> tuple[str, str]:
    if targets.dim() < 2:
        what = f"{name} has shape {tuple(targets.shape)}, but tokens are (N, ...), several for each example"
        return what, "targets='classes' for one class each"
    if targets.is_floating_point() or targets.is_complex():
        return f"{name} holds {targets.dtype}, but tokens are integers", "targets.long()"
    counts = targets[targets != IGNORED]
    if not counts.numel():
        return f"{name} holds no token that counts: all are {IGNORED}", "give tokens to predict"
    low, high = _extent(counts)
    if low < 0 or high >= spec.outputs:
        what = f"{name} holds tokens from {low:g} to {high:g}, but those of {spec.outputs} outputs are 0 to {spec.outputs - 1}"
        return what, f"count them from 0, with {IGNORED} for those that do not count; or a spec with {int(high) + 1} outputs"
    return "", ""


def _real_problem(spec: TaskSpec, targets: Tensor, name: str) -> tuple[str, str]:
    shape = tuple(targets.shape[1:])
    if spec.output_shape is not None:
        return _rows_problem(targets, tuple(spec.output_shape), name)
    fits = targets.dim() > 1 and math.prod(shape) == spec.outputs
    return _rows_problem(targets, shape if fits else (spec.outputs,), name)


def _rows_problem(targets: Tensor, shape: tuple[int, ...], name: str) -> tuple[str, str]:
    if tuple(targets.shape[1:]) != shape or targets.dim() < 2:
        expected = f"(N, {', '.join(map(str, shape))})"
        fix = (
            "targets.reshape(-1, 1)"
            if targets.dim() == 1 and shape == (1,)
            else "give targets of that shape, or correct the spec's outputs"
        )
        return f"{name} has shape {tuple(targets.shape)}, expected {expected}", fix
    if not targets.is_floating_point():
        return f"{name} holds {targets.dtype}, expected floats", "targets.float() if they are numbers or distributions"
    return "", ""


def _check_classes(spec: TaskSpec, splits: dict[str, Examples]) -> None:
    """Refuse a single class; warn of classes that never occur in training."""
    labels = {name: split.targets for name, split in splits.items() if split.targets is not None and split.targets.dim() == 1}
    if spec.targets != "classes" or "train" not in labels or has_own_loss(spec):
        return
    counts = {name: torch.bincount(targets.long(), minlength=spec.outputs) for name, targets in labels.items()}
    known = counts["train"] > 0
    if int(known.sum()) < 2:
        only = int(known.nonzero()[0])
        raise UsageError(
            f"all {len(labels['train'])} training labels are the class {spec.label(only)}: there is nothing to tell apart",
            where=f"task {spec.name}, train split",
            fix="give examples of at least two classes",
        )
    missing = (~known).nonzero().flatten().tolist()
    if missing:
        unseen = [f"{int(counts[name][missing].sum())} of {len(labels[name])} {name} examples" for name in labels if name != "train"]
        held = f"; {' and '.join(unseen)} are of these" if any(counts[name][missing].any() for name in labels) else ""
        logger.warning(
            "task %s: %d of %d classes never occur in training (%s)%s", spec.name, len(missing), spec.outputs, named(spec, missing), held
        )
