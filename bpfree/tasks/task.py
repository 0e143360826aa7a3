"""Tasks: what is learned. Splits, targets, loss and evaluation protocol; rules see only the spec."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bpfree.errors import BpfreeError, UsageError
from bpfree.options import NoOptions
from bpfree.step import Batch

__all__ = ["DataSource", "Split", "Task", "TaskSpec", "split_validation"]

TargetKind = Literal["classes", "soft", "real", "none"]


@dataclass(frozen=True)
class TaskSpec:
    """What a rule may know of a task: shapes, number of outputs and the loss; no data.

    Attributes:
        name: the task's name.
        input_shape: of one input, without the batch axis.
        outputs: number of classes, or of real outputs.
        targets: ``classes`` (N,) integers, ``soft`` (N, C) distributions, ``real`` (N, outputs), or ``none``.
        mean, std: per channel (the first axis of an input): ``(raw - mean) / std`` is what networks see, where raw
            images are scaled to [0, 1].
    """

    name: str
    input_shape: tuple[int, ...]
    outputs: int
    targets: TargetKind = "classes"
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @property
    def input_size(self) -> int:
        """Number of scalars in one input."""
        return math.prod(self.input_shape)

    @property
    def is_image(self) -> bool:
        """Whether inputs are (channels, height, width) images of at least 16x16 pixels."""
        return len(self.input_shape) == 3 and min(self.input_shape[1:]) >= 16

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Mean loss over the batch: cross-entropy of scores (N, C), or half the squared error summed over outputs.

        Raises:
            BpfreeError: for a task without targets.
        """
        if batch.targets is None:
            raise BpfreeError(f"task {self.name!r} has no targets, so no loss", fix="use a rule that learns without")
        if self.targets == "real":
            return 0.5 * (outputs - batch.targets).pow(2).flatten(1).sum(1).mean()
        return F.cross_entropy(outputs, batch.targets)

    def error(self, outputs: Tensor, batch: Batch) -> Tensor:
        """dLoss/dOutputs, (N, C), in closed form: ``(softmax(scores) - target) / N``, or ``(outputs - target) / N``."""
        with torch.no_grad():
            if self.targets == "real":
                return (outputs - self.target_rows(batch, outputs.dtype)) / len(outputs)
            made = outputs.softmax(1)
            if batch.targets is not None and _are_classes(batch.targets):  # without one-hot rows, which take longer than the softmax
                made.scatter_add_(1, batch.targets[:, None], made.new_full((len(made), 1), -1.0))
            else:
                made = made - self.target_rows(batch, made.dtype)
            return made / len(outputs)

    def loss_and_error(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """:meth:`loss` and :meth:`error`, which share the softmax of scores and classes."""
        if self.targets == "real" or batch.targets is None or not _are_classes(batch.targets):
            return self.loss(outputs, batch), self.error(outputs, batch)
        with torch.no_grad():
            made = outputs.log_softmax(1)
            loss = F.nll_loss(made, batch.targets)
            return loss, made.exp_().scatter_(1, batch.targets[:, None], -1.0, reduce="add").mul_(1.0 / len(made))

    def target_rows(self, batch: Batch, dtype: torch.dtype = torch.float32) -> Tensor:
        """The targets as rows (N, C): one-hot classes, soft labels or real values as they are."""
        if batch.targets is None:
            raise BpfreeError(f"task {self.name!r} has no targets")
        if _are_classes(batch.targets):
            return F.one_hot(batch.targets, self.outputs).to(dtype)
        return batch.targets.to(dtype)

    def correct(self, scores: Tensor, targets: Tensor) -> Tensor:
        """(N,) whether the best score is at the target's class (its largest entry for soft labels)."""
        return scores.argmax(1) == (targets if targets.dim() == 1 else targets.argmax(1))

    def normalise(self, raw: Tensor) -> Tensor:
        """Raw inputs (uint8 is scaled to [0, 1] first) to what networks see: float32, ``(raw - mean) / std``."""
        x = raw.float().div_(255) if raw.dtype == torch.uint8 else raw.float()
        shape = (1, -1) + (1,) * (x.dim() - 2)
        mean = torch.tensor(self.mean, device=x.device).view(shape)
        std = torch.tensor(self.std, device=x.device).view(shape)
        return (x - mean) / std


def _are_classes(targets: Tensor) -> bool:
    return targets.dim() == 1 and not targets.is_floating_point()


@dataclass(frozen=True)
class Split:
    """Examples: raw inputs (N, *input_shape), uint8 or float, and their targets; on the CPU."""

    inputs: Tensor
    targets: Tensor | None

    def __len__(self) -> int:
        return len(self.inputs)

    def subset(self, indices: Tensor) -> Split:
        """The examples at ``indices`` (M,)."""
        return Split(self.inputs[indices], None if self.targets is None else self.targets[indices])


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
    """A task with its three disjoint splits.

    Attributes:
        spec: the part that rules see.
        train, validation, test: ``validation`` is ``None`` when the whole training set is used.
    """

    spec: TaskSpec
    train: Split
    validation: Split | None
    test: Split
    _fingerprint: list[str] = field(default_factory=list, repr=False, compare=False)

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
                        digest.update(tensor.contiguous().numpy().data)
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
    """
    if share == 0:
        return train, None
    held = stratified_indices(train, share, seed)
    if not 0 < len(held) < len(train):
        raise UsageError(f"a validation share of {share} of {len(train)} examples leaves an empty split", where="task.validation")
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
