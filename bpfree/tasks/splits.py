"""Splits: examples with their targets, as tensors, as items of different length, or from a data set of torch.

Whatever has a length, gives batches by indices, parts by indices and a digest is a split (:class:`Examples`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate

from bpfree.errors import UsageError
from bpfree.tasks.trees import length, named_leaves, select

__all__ = ["DatasetSplit", "Examples", "ItemSplit", "Split", "StreamedSplit", "padded"]

Collate = Callable[[list[Any]], Any]


@runtime_checkable
class Examples(Protocol):
    """The interface of a split for the trainer."""

    @property
    def targets(self) -> Tensor | None:
        """All targets (N, ...); ``None`` where there are none, or they are read with the inputs."""

    def __len__(self) -> int:
        """Count the examples."""

    def batch(self, indices: Tensor) -> tuple[Any, Tensor | None]:
        """Return the raw inputs and targets of the examples at ``indices`` (M,), on the CPU."""

    def subset(self, indices: Tensor) -> Examples:
        """Return the examples at ``indices`` (M,) as a split."""

    def digest(self, found: Any) -> None:
        """Feed everything that is learned from to a hash of :mod:`hashlib`."""


@dataclass(frozen=True)
class Split:
    """Hold examples as tensors on the CPU: raw inputs (N, *input_shape) of any dtype, or a tree of them, and their targets.

    Attributes:
        inputs, targets: of the examples.
        groups: (N,) integers, for examples that belong together, such as several pictures of one thing: no two splits of a task may hold
            examples of one group, and none is cut (:func:`bpfree.tasks.task.stratified_indices`). ``None``: each example is by itself.
    """

    inputs: Any
    targets: Tensor | None
    groups: Tensor | None = None

    def __len__(self) -> int:
        return length(self.inputs)

    def __repr__(self) -> str:
        parts = [f"{f'inputs{place}'} {_form(leaf)}" for place, leaf in named_leaves(self.inputs)]
        return (
            f"Split({len(self)} examples: {', '.join(parts)}, {'no targets' if self.targets is None else f'targets {_form(self.targets)}'})"
        )

    def batch(self, indices: Tensor) -> tuple[Any, Tensor | None]:
        """Return the raw inputs and targets of the examples at ``indices`` (M,)."""
        part = self.subset(indices)
        return part.inputs, part.targets

    def subset(self, indices: Tensor) -> Split:
        """Return the examples at ``indices`` (M,) as a split."""
        targets, groups = (None if each is None else each[indices] for each in (self.targets, self.groups))
        return Split(select(self.inputs, indices), targets, groups)

    def digest(self, found: Any) -> None:
        """Feed inputs and targets to a hash."""
        for place, leaf in named_leaves(self.inputs):
            found.update(place.encode())
            _digest(found, leaf)
        if self.targets is not None:
            _digest(found, self.targets)


def _form(values: Any) -> str:
    """Describe a tensor without its values: ``1x8x8 uint8``, a number of each example is ``int64`` alone."""
    shape = "x".join(map(str, values.shape[1:]))
    return f"{shape} {values.dtype}".replace("torch.", "").strip()


def padded(items: list[Tensor]) -> dict[str, Tensor]:
    """Join tensors of different length along their first axis: ``values`` (N, L, ...), zero beyond an item's end, and ``lengths`` (N,)."""
    values = torch.nn.utils.rnn.pad_sequence(list(items), batch_first=True)
    return {"values": values, "lengths": torch.tensor([len(item) for item in items])}


@dataclass(frozen=True)
class ItemSplit:
    """Hold examples of different length, which are joined batch by batch.

    Attributes:
        items: a tensor for each example.
        targets: (N, ...), or ``None``.
        collate: makes the inputs of a batch of a list of items; by default :func:`padded`.
    """

    items: Sequence[Tensor]
    targets: Tensor | None = None
    collate: Collate = padded

    def __len__(self) -> int:
        return len(self.items)

    def batch(self, indices: Tensor) -> tuple[Any, Tensor | None]:
        """Return the joined items and the targets of the examples at ``indices`` (M,)."""
        return self.collate([self.items[place] for place in indices.tolist()]), None if self.targets is None else self.targets[indices]

    def subset(self, indices: Tensor) -> ItemSplit:
        """Return the examples at ``indices`` (M,) as a split."""
        chosen = [self.items[place] for place in indices.tolist()]
        return ItemSplit(chosen, None if self.targets is None else self.targets[indices], self.collate)

    def digest(self, found: Any) -> None:
        """Feed items and targets to a hash."""
        for item in self.items:
            _digest(found, item)
        if self.targets is not None:
            _digest(found, self.targets)


class DatasetSplit:
    """Take examples from a data set of torch (``__len__`` and ``__getitem__``), whose items are ``(inputs, target)`` or inputs alone.

    Args:
        dataset: the data set.
        targets: (N, ...) of all examples, where they are known; by them a validation split is stratified.
        collate: joins a list of items; by default :func:`torch.utils.data.default_collate`.
        places: (N,) which items belong to the split; ``None``: all.
        supervised: whether items are pairs with a target.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        targets: Tensor | None = None,
        collate: Collate = default_collate,
        places: Tensor | None = None,
        supervised: bool = True,
    ) -> None:
        self.dataset, self.targets, self.collate, self.supervised = dataset, targets, collate, supervised
        self.places = torch.arange(len(dataset)) if places is None else places  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.places)

    def batch(self, indices: Tensor) -> tuple[Any, Tensor | None]:
        """Read the items at ``indices`` (M,) and join them."""
        return _pair(self.collate([self.dataset[place] for place in self.places[indices].tolist()]), self.supervised)

    def subset(self, indices: Tensor) -> DatasetSplit:
        """Return the examples at ``indices`` (M,) as a split, without reading them."""
        targets = None if self.targets is None else self.targets[indices]
        return DatasetSplit(self.dataset, targets=targets, collate=self.collate, places=self.places[indices], supervised=self.supervised)

    def digest(self, found: Any) -> None:
        """Feed the data set's own ``digest()`` to a hash, or else all its items, which are read for it."""
        own = getattr(self.dataset, "digest", None)
        found.update(str(own()).encode() if callable(own) else b"")
        _digest(found, self.places)
        for place in self.places.tolist() if not callable(own) else ():
            for name, leaf in named_leaves(self.dataset[place]):
                found.update(name.encode())
                _digest(found, torch.as_tensor(leaf))


class StreamedSplit:
    """Take examples from an iterable data set of torch, in its own order, pass by pass.

    Its items are ``(inputs, target)`` or inputs alone. It cannot be cut or shuffled here: it shuffles itself, by the epoch that is
    passed to its ``set_epoch``, if it has one. Batches are read in this process.

    Args:
        dataset: the data set; each ``iter`` of it begins a pass.
        count: its examples.
        collate, supervised: as of :class:`DatasetSplit`.
    """

    targets: Tensor | None = None

    def __init__(self, dataset: IterableDataset[Any], count: int, *, collate: Collate = default_collate, supervised: bool = True) -> None:
        self.dataset, self.count, self.collate, self.supervised = dataset, count, collate, supervised

    def __len__(self) -> int:
        return self.count

    def passes(self, epoch: int, sizes: Sequence[int]) -> Iterator[tuple[Any, Tensor | None]]:
        """Read one pass in batches of the given sizes.

        Raises:
            UsageError: the data set ends before ``count`` examples.
        """
        if callable(tell := getattr(self.dataset, "set_epoch", None)):
            tell(epoch)
        items = iter(self.dataset)
        for size in sizes:
            taken = [item for _, item in zip(range(size), items, strict=False)]
            if len(taken) < size:
                raise UsageError(f"the data set ended before its {self.count} examples", where="StreamedSplit", fix="give the count it has")
            yield _pair(self.collate(taken), self.supervised)

    def batch(self, indices: Tensor) -> tuple[Any, Tensor | None]:
        """Read the examples at ``indices`` (M,), which must be the first ones, in order.

        Raises:
            UsageError: they are others.
        """
        if indices.tolist() != list(range(len(indices))):
            raise self._refused()
        return next(self.passes(0, [len(indices)]))

    def subset(self, indices: Tensor) -> StreamedSplit:
        """Return the first examples as a split.

        Raises:
            UsageError: the indices are not the first ones.
        """
        if indices.sort().values.tolist() != list(range(len(indices))):
            raise self._refused()
        return StreamedSplit(self.dataset, len(indices), collate=self.collate, supervised=self.supervised)

    def digest(self, found: Any) -> None:
        """Feed the data set's own ``digest()`` to a hash, or else all that a pass reads."""
        if callable(own := getattr(self.dataset, "digest", None)):
            found.update(str(own()).encode())
            return
        for pair in self.passes(0, [1] * self.count):
            for name, leaf in named_leaves(pair):
                found.update(name.encode())
                _digest(found, torch.as_tensor(leaf))

    def _refused(self) -> UsageError:
        fix = "give it splits of its own (task.validation=0, or a validation split from the source)"
        return UsageError("an iterable data set cannot be cut or shuffled", where="StreamedSplit", fix=fix)


def _pair(joined: Any, supervised: bool) -> tuple[Any, Tensor | None]:
    if not supervised:
        return joined, None
    if not isinstance(joined, (tuple, list)) or len(joined) != 2:
        raise UsageError(
            f"an item of the data set is {type(joined).__name__}, not a pair of inputs and target",
            fix="return (inputs, target) from it, or set supervised=False",
        )
    return joined[0], torch.as_tensor(joined[1])


def _digest(found: Any, tensor: Tensor) -> None:
    found.update(str((tuple(tensor.shape), str(tensor.dtype))).encode())
    found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)  # numpy knows no bfloat16


def fingerprint_of(splits: Sequence[Examples | None], described: str = "", indices: Sequence[Tensor] = ()) -> str:
    """Compute the SHA-256 over splits, and over how a task divides them, 16 hex digits.

    Args:
        splits: with all their examples.
        described: names and settings of stages, memory and parts.
        indices: of the examples in them.
    """
    found = hashlib.sha256(described.encode())
    for part in indices:
        _digest(found, part)
    for split in splits:
        if split is not None:
            split.digest(found)
    return found.hexdigest()[:16]
