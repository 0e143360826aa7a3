"""Batches of a split on the run's device, in an order that is a pure function of (seed, epoch).

Small sets live on the device as one tensor: a batch is then one ``index_select`` (*resident*). Larger ones travel
batch by batch, raw, gathered by worker processes (*streamed*). Both give bit-identical batches, with any number of
workers, because order and augmentation depend on (seed, epoch, sample index) alone and both normalise on the device.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bpfree.errors import BpfreeError, DiskError, UsageError
from bpfree.seeds import derive
from bpfree.step import Batch
from bpfree.tasks.augment import Augmentation, Draws
from bpfree.tasks.spec import TaskSpec, working_dtype
from bpfree.tasks.splits import Examples, Split, StreamedSplit
from bpfree.tasks.trees import bytes_of, cat, leaves, move, select, tree_map

__all__ = ["Loader", "Loading", "Resident"]

GIB = 2**30
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FLOAT_LIMIT, HOST_LIMIT, SHARE_OF_FREE = 1 * GIB, 2 * GIB, 0.25
CHUNK = 4096


class Normaliser:
    """``spec.normalise`` with its constants kept on the device, so that no batch waits for a copy from the host."""

    def __init__(self, spec: TaskSpec, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        shape = (1, -1) + (1,) * (len(spec.input_shape) - 1)
        self.spec, self.dtype, work = spec, dtype, working_dtype(dtype)
        self.is_own = not spec.takes_real_tensors or type(spec).normalise is not TaskSpec.normalise
        self.mean = torch.tensor(spec.mean, device=device, dtype=work).view(shape)
        self.std = torch.tensor(spec.std, device=device, dtype=work).view(shape)

    def __call__(self, raw: Any) -> Any:
        if self.is_own:
            return self.spec.normalise(raw, self.dtype)
        return (self.spec.scaled(raw, self.mean.dtype) - self.mean).div_(self.std).to(self.dtype)


@dataclass(frozen=True)
class Resident:
    """A split's tensors on a device, which several loaders may share.

    Attributes:
        inputs: (N, ...) or a tree of such tensors, normalised or raw.
        targets: (N, ...) int64, float32 or (beside inputs in float64) float64, or ``None``.
        normalised: which of the two ``inputs`` is.
    """

    inputs: Any
    targets: Tensor | None
    normalised: bool

    @classmethod
    def of(cls, split: Split, spec: TaskSpec, device: torch.device, *, raw: bool = False, dtype: torch.dtype = torch.float32) -> Resident:
        """Put a split on a device: normalised to ``dtype`` unless ``raw`` is asked for or float32 would take more than 1 GiB."""
        targets = None if split.targets is None else typed(split.targets, dtype).to(device)
        if raw or float_bytes(split) > FLOAT_LIMIT:
            return cls(move(split.inputs, device), targets, normalised=False)
        normalise = Normaliser(spec, device, dtype)
        if isinstance(split.inputs, Tensor) and spec.takes_real_tensors and not normalise.is_own:
            inputs = torch.empty(split.inputs.shape, dtype=dtype, device=device)
            for first in range(0, len(split), CHUNK):  # in pieces: no further float copies of the whole
                inputs[first : first + CHUNK] = normalise(split.inputs[first : first + CHUNK].to(device))
            return cls(inputs, targets, normalised=True)
        pieces = torch.arange(len(split)).split(CHUNK)
        return cls(cat(normalise(move(select(split.inputs, piece), device)) for piece in pieces), targets, normalised=True)


@dataclass(frozen=True)
class Loading:
    """Options of a run's batches: ``resident`` and ``workers`` of its loaders, and the order of training."""

    resident: bool | None = None
    workers: int = 0
    sampling: Literal["uniform", "balanced"] = "uniform"


class Loader:
    """Batches of a split, on the device, in an order that is a pure function of (seed, epoch).

    A batch belongs to its receiver, who may overwrite it. The last, partial batch of a pass is kept, except that a
    training pass drops a remainder of exactly one example when there are other batches: batch norm cannot normalise
    a single example.

    Args:
        split: the examples; kept on the device only where they are tensors.
        spec: whose ``normalise`` is applied.
        batch_size: examples per batch; ``"all"``: the split as one batch.
        device: where batches are made.
        seed: of the order and the augmentations; ``None``: the original order (evaluation).
        balanced: whether a pass shows all classes equally often, to one example: of a class with fewer examples some more than once, of
            one with more a part, another in each pass. Else each example once.
        augment: applied in turn to raw inputs, before normalisation; needs a seed.
        views: of each example in a batch (``Batch.views``), each with augmentations of its own.
        resident: whether the split is kept on the device; ``None``: if float32 takes at most 2 GiB on a CPU, or a
            quarter of the free memory of a GPU.
        workers: processes that gather batches when the split is not resident; 0: this one does.
        share: another loader's ``resident`` (of the same split, spec and dtype), used instead of a new copy.
        dtype: of the inputs in the batches: that of the network.

    Attributes:
        examples: drawn in one pass.
        resident: what is kept on the device; ``None``: batches are streamed.

    Raises:
        UsageError: a batch size below 1, augmentation without a seed or over shared tensors that are normalised, or a balanced order
            without classes.
        BpfreeError: an empty split.
    """

    def __init__(
        self,
        split: Examples,
        spec: TaskSpec,
        *,
        batch_size: int | Literal["all"],
        device: torch.device,
        seed: int | None = None,
        balanced: bool = False,
        augment: Sequence[Augmentation] = (),
        views: int = 1,
        resident: bool | None = None,
        workers: int = 0,
        share: Resident | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not len(split):
            raise BpfreeError("a split without examples has no batches", where=f"task {spec.name}")
        self.batch_size = len(split) if batch_size == "all" else batch_size
        if self.batch_size < 1:
            raise UsageError(f"a batch cannot have {batch_size} examples", where="batch_size", fix='choose 1 or more, or "all"')
        if augment and seed is None:
            raise UsageError("augmentations need a seed: evaluation sees the examples as they are", where="augment")
        if augment and share is not None and share.normalised:
            raise UsageError("augmentations act on raw inputs, but the shared ones are normalised", fix="share Resident.of(..., raw=True)")
        self.split, self.spec, self.device, self.seed = split, spec, device, seed
        self.augment, self.workers, self.balanced, self.views = tuple(augment), workers, balanced, views
        if balanced and (split.targets is None or split.targets.dim() != 1 or split.targets.is_floating_point()):
            raise UsageError(
                "a balanced order needs the class of each example, known beforehand", where="task.sampling", fix="task.sampling=uniform"
            )
        self.resident = share
        if isinstance(split, Split) and share is None and (fits(split, device, raw=bool(augment)) if resident is None else resident):
            self.resident = Resident.of(split, spec, device, raw=bool(augment), dtype=dtype)
        single = seed is not None and len(split) > self.batch_size and len(split) % self.batch_size == 1
        self.examples = len(split) - int(single)
        self._normalise = Normaliser(spec, device, dtype)

    @property
    def left_out(self) -> int:
        """Examples that a pass leaves out: 1 where they would be a last batch of one, else 0."""
        return len(self.split) - self.examples

    def __len__(self) -> int:
        """Count the batches per pass."""
        return -(-self.examples // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the first pass: for evaluation, where all passes are the same."""
        return self.batches(0)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of one pass over the split, from batch ``start`` on (to resume within a pass)."""
        keys = self._keys(epoch)[start * self.batch_size :]
        if not len(keys):
            return
        order = keys % len(self.split)
        chosen, keyed = order.to(self.device).split(self.batch_size), keys.to(self.device).split(self.batch_size)
        if isinstance(self.split, StreamedSplit):
            raws = self._follow(self.split, epoch, start)
        else:
            raws = self._stream(order.split(self.batch_size)) if self.resident is None else self._select(self.resident, chosen)
        ready = self.resident is not None and self.resident.normalised
        for indices, drawn, (inputs, targets) in zip(chosen, keyed, raws, strict=True):
            if self.views == 1 and not self.augment:
                yield Batch(inputs if ready else self._normalise(inputs), targets, (), indices)
                continue
            made = [self._view(inputs, targets, Draws(self.seed or 0, epoch, drawn, self.spec, view=view)) for view in range(self.views)]
            views = tuple(each if ready else self._normalise(each) for each, _ in made)
            yield Batch(views[0], made[0][1], views if self.views > 1 else (), indices)

    def _view(self, inputs: Any, targets: Tensor | None, draws: Draws) -> tuple[Any, Tensor | None]:
        """Return one view of a batch, as the augmentations draw it; it shares no memory with other views."""
        if draws.view and not self.augment:
            return tree_map(torch.clone, inputs), targets
        for augmentation in self.augment if self.seed is not None else ():
            inputs, targets = augmentation(inputs, targets, draws)
        return inputs, targets

    def order(self, epoch: int) -> Tensor:
        """Return (examples,) positions in the split in the order of a pass, on the CPU."""
        return self._keys(epoch) % len(self.split)

    def _keys(self, epoch: int) -> Tensor:
        """Return a pass's positions, plus a multiple of the split's length for a repeated example, so that augmentations differ."""
        if self.seed is None or isinstance(self.split, StreamedSplit):
            return torch.arange(self.examples)
        generator = torch.Generator().manual_seed(derive(self.seed, "order", epoch))
        if self.balanced:
            return self._balanced(generator)[: self.examples]
        return torch.randperm(len(self.split), generator=generator)[: self.examples]

    def _balanced(self, generator: torch.Generator) -> Tensor:
        """Return as many keys as there are examples, equally many of each class to within one; the classes with one more are drawn."""
        assert self.split.targets is not None
        targets, count = self.split.targets, len(self.split)
        labels = targets.unique()
        labels = labels[torch.randperm(len(labels), generator=generator)].tolist()
        keys = []
        for place, label in enumerate(labels):
            members = (targets == label).nonzero().flatten()
            wanted = count // len(labels) + int(place < count % len(labels))
            rounds = [
                members[torch.randperm(len(members), generator=generator)] + again * count for again in range(-(-wanted // len(members)))
            ]
            keys.append(torch.cat(rounds)[:wanted])
        return torch.cat(keys)[torch.randperm(count, generator=generator)]

    def _select(self, kept: Resident, chosen: Sequence[Tensor]) -> Iterator[tuple[Any, Tensor | None]]:
        for indices in chosen:
            yield select(kept.inputs, indices), None if kept.targets is None else kept.targets.index_select(0, indices)

    def _follow(self, split: StreamedSplit, epoch: int, start: int) -> Iterator[tuple[Any, Tensor | None]]:
        """Yield the batches of a data set that is read in its own order."""
        sizes = [len(part) for part in torch.arange(self.examples).split(self.batch_size)]
        for place, (inputs, targets) in enumerate(split.passes(epoch, sizes)):
            if place >= start:
                yield move(inputs, self.device), None if targets is None else typed(targets.to(self.device), self._normalise.dtype)

    def _stream(self, chosen: Sequence[Tensor]) -> Iterator[tuple[Any, Tensor | None]]:
        cuda = self.device.type == "cuda"
        # A generator of its own: without one, DataLoader would draw from torch's global generator at each pass.
        loader = DataLoader(
            Gathers(self.split, chosen), batch_size=None, num_workers=self.workers, pin_memory=cuda, generator=torch.Generator()
        )
        for inputs, targets in _begun(loader):
            moved = None if targets is None else typed(targets.to(self.device, non_blocking=True), self._normalise.dtype)
            yield move(inputs, self.device, non_blocking=True), moved


def _begun(loader: DataLoader[tuple[Any, Tensor | None]]) -> Iterator[tuple[Any, Tensor | None]]:
    """Start the loader's processes.

    Raises:
        DiskError: there is no room for what they share, which containers often limit.
    """
    try:
        return iter(loader)
    except OSError as error:
        if error.errno not in FULL:
            raise
        fix = "give more shared memory (in containers often 64 MB), or data.workers=0"
        raise DiskError(f"cannot start processes that load data: {error.strerror}", where="shared memory", fix=fix) from error


class Gathers(Dataset[tuple[Any, Tensor | None]]):
    """Whole batches as the items of a data set, so that a worker makes one gather per batch."""

    def __init__(self, split: Examples, chosen: Sequence[Tensor]) -> None:
        self.split, self.chosen = split, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> tuple[Any, Tensor | None]:
        return self.split.batch(self.chosen[index])


def typed(targets: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Convert targets to the types that losses take: int64 classes; otherwise float32, or float64 beside inputs in float64."""
    return targets.to(working_dtype(dtype)) if targets.is_floating_point() else targets.long()


def float_bytes(split: Split) -> int:
    """Count the bytes of a split's inputs as float32."""
    return bytes_of(split.inputs)


def fits(split: Split, device: torch.device, *, raw: bool) -> bool:
    """Tell whether a split is kept on the device by default."""
    if device.type != "cuda":
        return float_bytes(split) <= HOST_LIMIT
    stored = sum(leaf.nbytes for leaf in leaves(split.inputs)) if raw or float_bytes(split) > FLOAT_LIMIT else float_bytes(split)
    return stored <= SHARE_OF_FREE * torch.cuda.mem_get_info(device)[0]
