"""The options that every task has, and their effect on its examples and its spec."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from bpfree.errors import UsageError
from bpfree.options import option
from bpfree.tasks.check import check_split, settled
from bpfree.tasks.spec import TaskSpec, has_own_loss
from bpfree.tasks.splits import Examples, Split
from bpfree.tasks.weighted import WeightedSpec

__all__ = ["TaskCommon", "constants", "described", "fitted", "stratified_order", "subset_of"]

SUBSET_SEED = 20_261_130
"""Subsets are the same for every seed and every user."""
CHUNK = 1 << 24
"""Numbers that constants are computed from in one go."""

Normalise = Literal["source", "auto", "none", "given"]


@dataclass
class TaskCommon:
    """Options of every task."""

    validation: float = option(0.1, "share of the training examples held out for validation; 0: none", ge=0, lt=1)
    split_seed: int = option(0, "of the validation cut; independent of seed", ge=0, unless={"validation": (0,)})
    augment: list[Any] = option(
        factory=list, help="augmentations of training batches, in order: a name, or {name: random-rotation, degrees: 10}"
    )
    subset: int | None = option(
        None,
        "training examples to learn from, validation included (none: all); stratified by class, a smaller one is part of a larger",
        ge=2,
    )
    normalise: Normalise = option(
        "source",
        "constants of the inputs: auto: mean and deviation of the training split; none: 0 and 1; given: task.mean and task.std; "
        "source: what the data set says",
    )
    mean: list[float] = option(
        factory=list,
        help="subtracted from inputs after division by their scale: one, or one per channel or feature (none: the data set's)",
        unless={"normalise": ("auto", "none")},
    )
    std: list[float] = option(
        factory=list,
        help="then divides inputs: one, or one per channel or feature (none: the data set's)",
        gt=0,
        unless={"normalise": ("auto", "none")},
    )
    class_weights: Any = option(
        "none", "weights of the classes in the loss: none, balanced (examples / (classes * examples of the class)), or a list"
    )
    sampling: Literal["uniform", "balanced"] = option(
        "uniform", "order of the training examples: each once a pass, or all classes equally often"
    )

    @property
    def is_weighted(self) -> bool:
        """Whether classes have weights in the loss."""
        return self.class_weights not in ("none", None)


def described(spec: TaskSpec, common: TaskCommon, normalise: str = "given") -> TaskSpec:
    """Apply the options that need no data: given constants, and class weights, which are 1 until they are known.

    Args:
        spec: of the data set.
        common: the options.
        normalise: what ``source`` stands for.

    Raises:
        UsageError: options that do not fit the task, all at once.
    """
    if problems := list(_problems(spec, common)):
        raise UsageError.of(problems, "options of the task", where=f"task {spec.name}")
    chosen = normalise if common.normalise == "source" else common.normalise
    if chosen == "none" and _is_normalised(spec):
        spec = replace(spec, mean=(0.0,), std=(1.0,))
    if common.mean or common.std:
        spec = replace(spec, mean=tuple(common.mean) or spec.mean, std=tuple(common.std) or spec.std)
    if not common.is_weighted:
        return spec
    weights = (1.0,) * spec.outputs if common.class_weights == "balanced" else tuple(map(float, common.class_weights))
    return WeightedSpec(**{item.name: getattr(spec, item.name) for item in fields(TaskSpec)}, class_weights=weights)


def fitted(spec: TaskSpec, common: TaskCommon, train: Examples, normalise: str = "given") -> TaskSpec:
    """Fill in what comes from the training split, without the validation split: constants and balanced class weights.

    Args:
        spec: as :func:`described` gives it.
        common: the options.
        train: the examples that are learned from.
        normalise: what ``source`` stands for.

    Raises:
        UsageError: there are no such constants or weights.
    """
    chosen = normalise if common.normalise == "source" else common.normalise
    if chosen == "auto" and _is_normalised(spec) and not (common.mean and common.std):
        spec = settled(spec, train)
        check_split(spec, train, "train")
        mean, std = constants(spec, train)
        spec = replace(spec, mean=tuple(common.mean) or mean, std=tuple(common.std) or std)
    if common.class_weights == "balanced":
        spec = replace(spec, class_weights=_balanced(spec, train))  # type: ignore[call-arg]
    return spec


def _problems(spec: TaskSpec, common: TaskCommon) -> Iterator[str]:
    classes = spec.targets == "classes"
    said = [f"task.{name}" for name in ("mean", "std") if getattr(common, name)]
    if (common.normalise not in ("source", "none") or said) and not _is_normalised(spec):
        yield f"{said[0] if said else f'task.normalise={common.normalise}'} does nothing: task {spec.name!r} takes its inputs as they are"
        return
    if common.normalise == "given" and len(said) < 2:
        yield "task.normalise=given needs both task.mean and task.std"
    for name in ("mean", "std"):
        values = getattr(common, name)
        if len(values) not in (0, 1, *spec.input_shape[:1]):
            yield f"task.{name}: {len(values)} values for inputs of shape {spec.input_shape}: give one, or {spec.input_shape[0]}"
    if common.is_weighted:
        yield from _weight_problems(spec, common.class_weights)
    if common.sampling == "balanced" and not classes:
        yield f"task.sampling=balanced is for classes, but task {spec.name!r} has {spec.targets!r} targets"


def _weight_problems(spec: TaskSpec, weights: Any) -> Iterator[str]:
    if has_own_loss(spec):
        yield f"task.class_weights does nothing with the loss that task {spec.name!r} brings"
    elif spec.targets not in ("classes", "soft"):
        yield f"task.class_weights is for classes, but task {spec.name!r} has {spec.targets!r} targets"
    elif weights != "balanced" and not _are_weights(weights):
        yield f"task.class_weights={weights!r}: give none, balanced, or a list of positive numbers, one for each class"
    elif weights != "balanced" and len(weights) != spec.outputs:
        yield f"task.class_weights has {len(weights)} numbers for {spec.outputs} classes"


def _are_weights(weights: Any) -> bool:
    if not isinstance(weights, (list, tuple)):
        return False
    return all(isinstance(each, (int, float)) and not isinstance(each, bool) and 0 < each < math.inf for each in weights)


def _is_normalised(spec: TaskSpec) -> bool:
    return spec.takes_real_tensors and type(spec).normalise is TaskSpec.normalise


def _balanced(spec: TaskSpec, train: Examples) -> tuple[float, ...]:
    """Compute weights whose mean over the training examples is 1."""
    where = f"task {spec.name}, task.class_weights=balanced"
    if train.targets is None:
        raise UsageError(
            "the targets are read with the inputs, so the classes cannot be counted", where=where, fix="give a list of weights"
        )
    counts = train.targets.double().sum(0) if train.targets.dim() > 1 else train.targets.long().bincount(minlength=spec.outputs).double()
    absent = [spec.label(place) for place in (counts == 0).nonzero().flatten().tolist()]
    if absent:
        what = f"no training example is of {', '.join(absent[:8])}, so a balanced weight would be infinite"
        raise UsageError(what, where=where, fix="give a list of weights, one for each class")
    return tuple((counts.sum() / (len(counts) * counts)).tolist())


def constants(spec: TaskSpec, train: Examples) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute mean and standard deviation of the scaled training inputs.

    Images have one of each per channel, vectors one per feature; other inputs one in all. A deviation of 0 is given as 1.

    Args:
        spec: whose ``scale`` is known.
        train: the training split; examples that are in files are all read, once.
    """
    per_entry = len(spec.input_shape) in (1, 3)
    count, mean, squares = 0, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for chunk in _inputs(train):
        values = spec.scaled(chunk, torch.float64)
        rows = values.transpose(0, 1).flatten(1) if per_entry else values.reshape(1, -1)
        part, size = rows.mean(1), rows.shape[1]
        step = part - mean  # Chan, Golub and LeVeque (1979): exact also where the mean is large beside the deviation
        squares = squares + (rows - part[:, None]).pow(2).sum(1) + step.pow(2) * (count * size / (count + size))
        mean, count = mean + step * (size / (count + size)), count + size
    std = (squares / count).sqrt()
    small = std <= 1e-12 * mean.abs().clamp_min(1.0)
    return tuple(mean.tolist()), tuple(torch.where(small, torch.ones_like(std), std).tolist())


def _inputs(split: Examples) -> Iterator[Tensor]:
    if isinstance(split, Split):
        yield from split.inputs.split(max(1, CHUNK // max(1, split.inputs[:1].numel())))
        return
    for places in torch.arange(len(split)).split(64):
        yield split.batch(places)[0]


def subset_of(train: Examples, count: int | None) -> Examples:
    """Take ``count`` of the training examples, in their original order; ``None`` takes all of them.

    Each class has its share of them, rounded up; a smaller subset is a part of every larger one.

    Raises:
        UsageError: there are fewer examples.
    """
    if count is None:
        return train
    if count > len(train):
        raise UsageError(f"task.subset={count}, but there are {len(train)} training examples", where="task.subset", fix="leave it out")
    return train.subset(stratified_order(train.targets, len(train))[:count].sort().values)


def stratified_order(targets: Tensor | None, count: int) -> Tensor:
    """Order all examples so that every prefix is stratified by class.

    Example k = 0, 1, ... of a class with n examples, in random order, comes at k / n; ties are in random order. Hence a beginning has
    the same share of every class, rounded up: all classes, in any beginning that is long enough, and as many of each where all are
    equally frequent.
    """
    generator = torch.Generator().manual_seed(SUBSET_SEED)
    order = torch.randperm(count, generator=generator)
    if targets is None or targets.dim() != 1 or targets.is_floating_point():
        return order
    place = torch.empty(count, dtype=torch.float64)
    for label in targets.unique().tolist():
        members = order[targets[order] == label]
        place[members] = torch.arange(len(members), dtype=torch.float64) / len(members)
    return order[place[order].argsort(stable=True)]
