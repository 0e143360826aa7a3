"""Tasks: splits, targets, loss and evaluation protocol of what is learned; rules see only the spec."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.data import Subset

from bpfree.errors import UsageError
from bpfree.options import NoOptions
from bpfree.step import Stage
from bpfree.tasks.check import check_lengths, check_task
from bpfree.tasks.common import TaskCommon, described, fitted, subset_of
from bpfree.tasks.pictures import ItemPictures, PictureConfig, form_of
from bpfree.tasks.spec import TaskSpec
from bpfree.tasks.splits import DatasetSplit, Examples, Split, fingerprint_of
from bpfree.tasks.stages import Memory
from bpfree.tasks.trees import tree_map

__all__ = ["DataSource", "Examples", "Split", "Task", "TaskSpec", "fixed_test", "folds", "meaning", "split_validation"]

TEST_SHARE, TEST_SEED = 0.2, 20_230_324


@dataclass(frozen=True)
class DataSource:
    """A registered data set: functions that find its spec cheaply, and load its training and test examples.

    Attributes:
        spec: ``(config, root) -> TaskSpec`` without reading the data.
        load: ``(config, root) -> (train, test)``, of which the validation split is cut; or ``(train, validation, test)`` where the data
            come with a validation split, or can have none (``None``).
        Config: dataclass of its own options.
        summary: one line for listings.
        files: ``(config, root) -> paths`` of the files that ``load`` would read, whether they are there or not; empty for data that
            come with a package. With it a study knows the data's fingerprint without reading them again.
        normalise: what ``task.normalise=source`` stands for: ``given``, the constants in the spec; or ``auto``, those of the training
            split, in place of the ones in the spec.
    """

    spec: Callable[[Any, Path | None], TaskSpec]
    load: Callable[[Any, Path | None], tuple[Examples, Examples] | tuple[Examples, Examples | None, Examples]]
    Config: type = NoOptions
    summary: str = ""
    files: Callable[[Any, Path | None], Sequence[Path]] | None = None
    normalise: Literal["given", "auto"] = "given"


@dataclass(frozen=True)
class Task:
    """A task with its three disjoint splits, which are checked against its spec when it is made.

    Attributes:
        spec: the part that rules see; its ``scale`` and ``limits`` are filled in from the training inputs where they were not given.
        train, validation, test: ``validation`` is ``None`` when the whole training set is used.
        parts: (M,) positions in the training split by name, for phases that are on a part of it (``Phase.part``).
        stages: of a stream, which are learned one after the other; none: all examples are learned together.
        memory: how many examples of earlier stages are trained on again; ``None``: none.
        origin: the data set that it was loaded from, with its options and those of every task; ``None``: it was made of data.

    Raises:
        UsageError: a split that is empty, does not fit the spec, holds numbers that are not finite, or whose meaning is ambiguous.
    """

    spec: TaskSpec
    train: Examples
    validation: Examples | None
    test: Examples
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    memory: Memory | None = None
    origin: tuple[DataSource, Any, TaskCommon] | None = field(default=None, compare=False)
    _fingerprint: list[str] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", check_task(self.spec, self.train, self.validation, self.test))

    def __repr__(self) -> str:
        stages = f", {len(self.stages)} stages" if self.stages else ""
        shape = "x".join("any" if size == -1 else str(size) for size in self.spec.input_shape)
        return f"Task({self.spec.name}: {self.counts()}{stages}; {shape} -> {meaning(self.spec)})"

    def counts(self) -> str:
        """Count the examples of each split: ``1295 train, 143 validation, 359 test``."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return ", ".join(f"{len(split)} {name}" for name, split in splits.items() if split is not None)

    @classmethod
    def from_source(cls, source: DataSource, config: Any = None, *, root: Path | None = None, **common: Any) -> Task:
        """Load a data set, and make a task of its training and test examples.

        Args:
            source: of the data.
            config: its own options; ``None``: their defaults.
            root: folder of data sets.
            common: the options of every task (:class:`bpfree.tasks.common.TaskCommon`): ``validation``, ``split_seed``, ``subset`` and so
                on. A subset is taken first, then the validation split is cut, unless the data come with one; constants and balanced class
                weights are those of what is left.

        Raises:
            UsageError: options that do not fit the data.
        """
        config, options = source.Config() if config is None else config, TaskCommon(**common)
        spec = described(source.spec(config, root), options, source.normalise)
        first, *rest = source.load(config, root)
        assert first is not None
        kept, held = subset_of(first, options.subset), rest[0]
        if len(rest) == 1:
            kept, held = split_validation(kept, options.validation, options.split_seed)
        origin = (source, config, options)
        return cls(fitted(spec, options, kept, source.normalise), kept, held, rest[-1], origin=origin)  # type: ignore[arg-type]

    @classmethod
    def of(
        cls,
        train: Any,
        test: Any,
        *,
        validation: Any = 0.1,
        name: str = "task",
        spec: TaskSpec | None = None,
        split_seed: int = 0,
        **common: Any,
    ) -> Task:
        """Make a task of data in memory.

        Args:
            train, test: each a split (:class:`Split` and its relatives), a pair of arrays or tensors ``(inputs, targets)``, a tree of
                tensors without targets, or a data set of torch, whose items are ``(inputs, target)``; inputs may be pictures of PIL. Its
                ``targets`` and ``classes`` are used, if it has them.
            validation: likewise, or the share of the training examples that is held out; 0 or ``None``: none.
            name: of the task, if there is no ``spec`` with one.
            spec: what the data are; ``None``: found from the training examples, where they are one tensor each with integer classes
                (N,) or real targets (N, ...).
            split_seed: of the validation cut.
            common: further options of every task (:class:`bpfree.tasks.common.TaskCommon`): ``subset``, ``normalise``, ``mean``, ``std``,
                ``class_weights``.

        Raises:
            UsageError: data that are none of these, or a spec that cannot be found from them.
        """
        if of_training := [key for key in ("augment", "sampling") if key in common]:
            fix = "Trainer(..., augment=[...], loading=Loading(sampling=...))"
            raise UsageError(f"{of_training[0]} belongs to the training, not to the task", where="Task.of", fix=fix)
        options = TaskCommon(**common)
        kept, tested = subset_of(as_split(train, "train"), options.subset), as_split(test, "test")
        held: Examples | None
        if isinstance(validation, (int, float)) or validation is None:
            kept, held = split_validation(kept, float(validation or 0), split_seed)
        else:
            held = as_split(validation, "validation")
        if spec is None:
            names = getattr(train, "classes", ())
            spec = guessed_spec(name, kept, tested)
            fits = isinstance(names, (list, tuple)) and len(names) == spec.outputs and all(isinstance(each, str) for each in names)
            spec = replace(spec, class_names=tuple(names)) if fits and spec.targets == "classes" else spec
        found = described(spec, options)
        return cls(fitted(found, options, kept), kept, held, tested)

    def fingerprint(self) -> str:
        """Return the SHA-256 over all three splits' shapes and contents, 16 hex digits; computed once.

        Of a stream also over its stages and its memory, and over parts that the task names.
        """
        if not self._fingerprint:
            places = [part for stage in self.stages for part in (stage.train, stage.validation, stage.test)]
            divided = [self.memory, *self.stages_recorded(), list(self.parts)] if self.stages or self.parts else []
            indices = [part for part in (*places, *self.parts.values()) if part is not None]
            self._fingerprint.append(fingerprint_of((self.train, self.validation, self.test), repr(divided) if divided else "", indices))
        return self._fingerprint[0]

    def stages_recorded(self) -> list[dict[str, Any]]:
        """Describe the stages without their examples, as a checkpoint has them."""
        return [stage.recorded() for stage in self.stages]


def meaning(spec: TaskSpec, names: str = "") -> str:
    """Say in a few words what the targets of a task are.

    Args:
        spec: of the task.
        names: of classes or labels, to be listed after their number.
    """
    names = f" ({names})" if names else ""
    kinds = {"classes": f"{spec.outputs:,} classes{names}", "soft": f"soft labels of {spec.outputs:,} classes{names}", "none": "no targets"}
    kinds |= {"multilabel": f"{spec.outputs:,} labels{names}", "tokens": f"tokens, a class of {spec.outputs:,} each"}
    return kinds.get(spec.targets, f"{spec.outputs:,} real target{'s' if spec.outputs != 1 else ''}")


def as_split(data: Any, name: str) -> Examples:
    """Make a split of an argument of ``Task.of``.

    Raises:
        UsageError: it is nothing of the kind.
    """
    if isinstance(data, (torch.utils.data.Dataset, Subset)) and not isinstance(data, torch.utils.data.TensorDataset):
        if isinstance(data, torch.utils.data.IterableDataset):
            fix = "wrap it: bpfree.StreamedSplit(dataset, count)"
            raise UsageError("the number of examples of an iterable data set is not known", where=name, fix=fix)
        return dataset_split(data)
    if isinstance(data, torch.utils.data.TensorDataset):
        data = data.tensors
    if isinstance(data, Examples):
        return data
    if isinstance(data, (tuple, list)) and len(data) == 2:
        targets = None if data[1] is None else _numbers(data[1], name)
        if targets is not None and targets.dim() == 1 and targets.is_floating_point():
            targets = targets[:, None]
        return Split(_tensors(data[0], name), targets)
    if isinstance(data, (Tensor, Mapping)):
        return Split(_tensors(data, name), None)
    fix = "give a pair (inputs, targets) of arrays, a bpfree.Split, or a torch Dataset"
    raise UsageError(f"{type(data).__name__} is no split", where=name, fix=fix)


def dataset_split(data: Any) -> DatasetSplit:
    """Make a split of a data set of torch: its classes are those in its ``targets``, pictures of PIL become bytes (C, H, W)."""
    listed = getattr(data, "targets", None)
    targets = torch.as_tensor(listed) if isinstance(listed, (Tensor, list, tuple)) and len(listed) == len(data) else None
    first = data[0] if len(data) else None
    if not isinstance(first, (tuple, list)) or len(first) != 2 or not hasattr(first[0], "convert"):
        return DatasetSplit(data, targets=targets)
    if targets is None:
        targets = torch.tensor([int(data[place][1]) for place in range(len(data))])
    name = type(data).__name__
    return DatasetSplit(ItemPictures(data, 0, name, targets, form_of(first[0], PictureConfig())), targets=targets)


def _tensors(inputs: Any, name: str) -> Any:
    if not isinstance(inputs, (Mapping, list, tuple)):
        return _numbers(inputs, name)
    return tree_map(lambda values: _numbers(values, name), inputs)


def _numbers(values: Any, name: str) -> Tensor:
    """Convert values to a tensor, other widths of numbers to float32 and int64."""
    try:
        made = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"this is no array of numbers: {error}", where=name, fix="give arrays or tensors") from error
    if made.dtype == torch.float64:
        return made.float()
    return made.long() if made.dim() == 1 and made.dtype == torch.int32 else made


def guessed_spec(name: str, train: Examples, test: Examples) -> TaskSpec:
    """Find the spec of data whose inputs are one tensor each, with integer classes or real targets.

    Raises:
        UsageError: the data may mean several things.
    """
    inputs, targets = train.batch(torch.arange(min(2, len(train))))
    fix = "give the spec: Task.of(..., spec=bpfree.TaskSpec(...))"
    if not isinstance(inputs, Tensor):
        raise UsageError("the inputs are not a single tensor, so their spec cannot be guessed", where=name, fix=fix)
    shape = tuple(inputs.shape[1:])
    if targets is None:
        return TaskSpec(name, shape, 1, "none")
    known = [split.targets for split in (train, test)]
    if targets.is_floating_point():
        rows = train.targets if train.targets is not None else targets
        if rows.dim() == 2 and rows.shape[1] > 1 and bool(((rows.sum(1) - 1).abs() < 1e-3).all() and (rows >= 0).all()):
            what = "rows of targets that sum to one are soft labels, or real values"
            raise UsageError(what, where=name, fix=f"{fix} with targets='soft' or targets='real'")
        return TaskSpec(name, shape, max(1, targets[0].numel()), "real", output_shape=tuple(targets.shape[1:]) or (1,))
    if targets.dim() != 1 or any(found is None for found in known):
        raise UsageError(f"the targets have shape (N, {', '.join(map(str, targets.shape[1:]))}): which kind are they?", where=name, fix=fix)
    return TaskSpec(name, shape, max(2, 1 + max(int(found.max()) for found in known if found is not None and len(found))))


def split_validation(train: Examples, share: float, seed: int) -> tuple[Examples, Examples | None]:
    """Cut a validation split from the training examples: stratified by class, shuffled by ``seed``; of examples in groups, whole groups.

    Args:
        train: all training examples.
        share: of the examples, 0 <= share < 1; 0 keeps the whole training set and returns no validation split.
        seed: of the cut; independent of a run's seed.

    Returns:
        The kept examples and the held-out ones, both in the original order.

    Raises:
        UsageError: a share that leaves one of them empty, or inputs and targets of different length.
    """
    check_lengths(train, "the training split")
    if share == 0:
        return train, None
    held = stratified_indices(train, share, seed)
    if not 0 < len(held) < len(train):
        raise UsageError(
            f"a validation share of {share} of {len(train)} examples leaves an empty split",
            where="task.validation",
            fix="task.validation=0, or another share",
        )
    mask = torch.zeros(len(train), dtype=torch.bool)
    mask[held] = True
    return train.subset((~mask).nonzero().flatten()), train.subset(mask.nonzero().flatten())


Cut = TypeVar("Cut", bound=Examples)


def fixed_test(everything: Cut) -> tuple[Cut, Cut]:
    """Cut the test split of data without one: a stratified fifth, the same for every seed and every user.

    Returns:
        Training and test examples, both in the original order.
    """
    mask = torch.zeros(len(everything), dtype=torch.bool)
    mask[stratified_indices(everything, TEST_SHARE, TEST_SEED)] = True
    first, second = (everything.subset(part.nonzero().flatten()) for part in (~mask, mask))
    return cast(Cut, first), cast(Cut, second)


def folds(split: Examples, count: int, seed: int) -> list[Tensor]:
    """Divide examples into ``count`` parts of equal size, as far as possible: positions (M,) of each.

    Classes are divided evenly; groups (``Split.groups``) stay whole.

    Raises:
        UsageError: fewer than two parts, or more than there are examples, or groups.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = split.groups if isinstance(split, Split) else None
    units = torch.arange(len(split)) if groups is None else groups.unique()
    if not 2 <= count <= len(units):
        what = f"{len(units)} examples{'' if groups is None else ' (groups)'} cannot be divided into {count} parts"
        raise UsageError(what, where="calibration.folds", fix="give 2 or more, 5 say")
    order = units[torch.randperm(len(units), generator=generator)]
    targets = split.targets
    if groups is None and targets is not None and targets.dim() == 1 and not targets.is_floating_point():
        order = order[targets[order].argsort(stable=True)]
    parts = [order[first::count] for first in range(count)]
    return [(part if groups is None else torch.isin(groups, part).nonzero().flatten()).sort().values for part in parts]


def stratified_indices(split: Examples, share: float, seed: int) -> Tensor:
    """Draw indices (M,) of a random ``share`` of the examples of each class (of all, where there are no classes).

    Of examples in groups (``Split.groups``) whole groups are drawn, that share of all groups.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(split)
    if isinstance(split, Split) and split.groups is not None:
        groups = split.groups.unique()
        drawn = groups[torch.randperm(len(groups), generator=generator)[: round(share * len(groups))]]
        return torch.isin(split.groups, drawn).nonzero().flatten()
    if split.targets is None or split.targets.dim() != 1 or split.targets.is_floating_point():
        return torch.randperm(count, generator=generator)[: round(share * count)]
    order = torch.randperm(count, generator=generator)
    chosen = []
    for label in split.targets.unique().tolist():
        members = order[split.targets[order] == label]
        chosen.append(members[: round(share * len(members))])
    return torch.cat(chosen)
