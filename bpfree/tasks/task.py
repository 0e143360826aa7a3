"""Tasks: what is learned. Splits, targets, loss and evaluation protocol; rules see only the spec."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from bpfree.errors import UsageError
from bpfree.options import NoOptions
from bpfree.step import Stage
from bpfree.tasks.check import check_lengths, check_task
from bpfree.tasks.spec import TaskSpec
from bpfree.tasks.splits import DatasetSplit, Examples, Split, fingerprint_of
from bpfree.tasks.stages import Memory
from bpfree.tasks.trees import tree_map

__all__ = ["DataSource", "Examples", "Split", "Task", "TaskSpec", "split_validation"]


@dataclass(frozen=True)
class DataSource:
    """A registered data set: how to know its spec cheaply, and how to load its training and test examples.

    Attributes:
        spec: ``(config, root) -> TaskSpec`` without reading the data.
        load: ``(config, root) -> (train, test)``, of which the validation split is cut; or ``(train, validation, test)`` where the data
            come with a validation split, or can have none (``None``).
        Config: dataclass of its own options.
        summary: one line for listings.
        files: ``(config, root) -> paths`` of the files that ``load`` would read, whether they are there or not; empty for data that
            come with a package. With it a study knows the data's fingerprint without reading them again.
    """

    spec: Callable[[Any, Path | None], TaskSpec]
    load: Callable[[Any, Path | None], tuple[Examples, Examples] | tuple[Examples, Examples | None, Examples]]
    Config: type = NoOptions
    summary: str = ""
    files: Callable[[Any, Path | None], Sequence[Path]] | None = None


@dataclass(frozen=True)
class Task:
    """A task with its three disjoint splits, which are checked against its spec when it is made.

    Attributes:
        spec: the part that rules see; its ``scale`` and ``limits`` are filled in from the training inputs where they were not given.
        train, validation, test: ``validation`` is ``None`` when the whole training set is used.
        parts: (M,) positions in the training split by name, for phases that are on a part of it (``Phase.part``).
        stages: of a stream, which are learned one after the other; none: all examples are learned together.
        memory: how many examples of earlier stages are trained on again; ``None``: none.

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
    _fingerprint: list[str] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", check_task(self.spec, self.train, self.validation, self.test))

    @classmethod
    def from_source(
        cls, source: DataSource, config: Any = None, *, root: Path | None = None, validation: float = 0.1, split_seed: int = 0
    ) -> Task:
        """Load a data set; cut the validation split from its training examples, unless it comes with one."""
        config = source.Config() if config is None else config
        spec = source.spec(config, root)
        loaded = source.load(config, root)
        if len(loaded) == 3:
            return cls(spec, *loaded)
        kept, held = split_validation(loaded[0], validation, split_seed)
        return cls(spec, kept, held, loaded[1])

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
    ) -> Task:
        """Make a task of data in memory.

        Args:
            train, test: each a split (:class:`Split` and its relatives), a pair of arrays or tensors ``(inputs, targets)``, a tree of
                tensors without targets, or a data set of torch, whose items are ``(inputs, target)``.
            validation: likewise, or the share of the training examples that is held out; 0 or ``None``: none.
            name: of the task, where ``spec`` does not say it.
            spec: what the data are; ``None``: found from the training examples, where they are one tensor each with integer classes
                (N,) or real targets (N, ...).
            split_seed: of the validation cut.

        Raises:
            UsageError: data that are none of these, or a spec that cannot be found from them.
        """
        kept, tested = as_split(train, "train"), as_split(test, "test")
        held: Examples | None
        if isinstance(validation, (int, float)) or validation is None:
            kept, held = split_validation(kept, float(validation or 0), split_seed)
        else:
            held = as_split(validation, "validation")
        return cls(spec or guessed_spec(name, kept, tested), kept, held, tested)

    def fingerprint(self) -> str:
        """SHA-256 over all three splits' shapes and contents, 16 hex digits; computed once."""
        if not self._fingerprint:
            self._fingerprint.append(fingerprint_of((self.train, self.validation, self.test)))
        return self._fingerprint[0]


def as_split(data: Any, name: str) -> Examples:
    """Make a split of what ``Task.of`` takes.

    Raises:
        UsageError: it is nothing of the kind.
    """
    if isinstance(data, (torch.utils.data.Dataset, Subset)) and not isinstance(data, torch.utils.data.TensorDataset):
        if isinstance(data, torch.utils.data.IterableDataset):
            fix = "wrap it: bpfree.StreamedSplit(dataset, count)"
            raise UsageError("the number of examples of an iterable data set is not known", where=name, fix=fix)
        return DatasetSplit(data)
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


def _tensors(inputs: Any, name: str) -> Any:
    if not isinstance(inputs, (Mapping, list, tuple)):
        return _numbers(inputs, name)
    return tree_map(lambda values: _numbers(values, name), inputs)


def _numbers(values: Any, name: str) -> Tensor:
    """A tensor, of float32 and int64 where it is of other widths."""
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
    fix = "say it: Task.of(..., spec=bpfree.TaskSpec(...))"
    if not isinstance(inputs, Tensor):
        raise UsageError("the inputs are no single tensor, so what they are cannot be told from them", where=name, fix=fix)
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
    """Cut a validation split from the training examples: stratified by class, shuffled by ``seed``.

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


def stratified_indices(split: Examples, share: float, seed: int) -> Tensor:
    """Indices (M,) of a random ``share`` of the examples of each class (of all, where there are no classes)."""
    generator = torch.Generator().manual_seed(seed)
    count = len(split)
    if split.targets is None or split.targets.dim() != 1 or split.targets.is_floating_point():
        return torch.randperm(count, generator=generator)[: round(share * count)]
    order = torch.randperm(count, generator=generator)
    chosen = []
    for label in split.targets.unique().tolist():
        members = order[split.targets[order] == label]
        chosen.append(members[: round(share * len(members))])
    return torch.cat(chosen)
