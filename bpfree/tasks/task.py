"""Tasks: what is learned. Splits, targets, loss and evaluation protocol; rules see only the spec."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bpfree.errors import UsageError
from bpfree.options import NoOptions
from bpfree.tasks.check import check_lengths, check_task
from bpfree.tasks.spec import Split, TaskSpec

__all__ = ["DataSource", "Split", "Task", "TaskSpec", "split_validation"]


@dataclass(frozen=True)
class DataSource:
    """A registered data set: how to know its spec cheaply, and how to load its training and test examples.

    Attributes:
        spec: ``(config, root) -> TaskSpec`` without reading the data.
        load: ``(config, root) -> (train, test)``.
        Config: dataclass of its own options.
        summary: one line for listings.
        files: ``(config, root) -> paths`` of the files that ``load`` would read, whether they are there or not; empty for data that
            come with a package. With it a study knows the data's fingerprint without reading them again.
    """

    spec: Callable[[Any, Path | None], TaskSpec]
    load: Callable[[Any, Path | None], tuple[Split, Split]]
    Config: type = NoOptions
    summary: str = ""
    files: Callable[[Any, Path | None], Sequence[Path]] | None = None


@dataclass(frozen=True)
class Task:
    """A task with its three disjoint splits, which are checked against its spec when it is made.

    Attributes:
        spec: the part that rules see; its ``scale`` and ``limits`` are filled in from the training inputs where they were not given.
        train, validation, test: ``validation`` is ``None`` when the whole training set is used.

    Raises:
        UsageError: a split that is empty, does not fit the spec, holds numbers that are not finite, or whose meaning is ambiguous.
    """

    spec: TaskSpec
    train: Split
    validation: Split | None
    test: Split
    _fingerprint: list[str] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", check_task(self.spec, self.train, self.validation, self.test))

    @classmethod
    def from_source(
        cls, source: DataSource, config: Any = None, *, root: Path | None = None, validation: float = 0.1, split_seed: int = 0
    ) -> Task:
        """Load a data set and cut the validation split from its training examples."""
        config = source.Config() if config is None else config
        spec = source.spec(config, root)
        train, test = source.load(config, root)
        kept, held = split_validation(train, validation, split_seed)
        return cls(spec, kept, held, test)

    def fingerprint(self) -> str:
        """SHA-256 over all three splits' shapes and contents, 16 hex digits; computed once."""
        if not self._fingerprint:
            digest = hashlib.sha256()
            for split in (self.train, self.validation, self.test):
                for tensor in (split.inputs, split.targets) if split is not None else ():
                    if tensor is not None:
                        digest.update(str((tuple(tensor.shape), str(tensor.dtype))).encode())
                        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)  # numpy knows no bfloat16
            self._fingerprint.append(digest.hexdigest()[:16])
        return self._fingerprint[0]


def split_validation(train: Split, share: float, seed: int) -> tuple[Split, Split | None]:
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


def stratified_indices(split: Split, share: float, seed: int) -> Tensor:
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
