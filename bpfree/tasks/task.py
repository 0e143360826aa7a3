"""Tasks: what is learned. Splits, targets, loss and evaluation protocol; rules see only the spec."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

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
        mean, std: per channel (the first axis of an input): ``(raw / scale - mean) / std`` is what networks see.
        scale: what raw inputs are divided by, whatever their dtype: 255 for pictures of 0 to 255, 1 for inputs that are taken as they
            are. ``None``: 255 for uint8 and 1 for all else. A task finds out from its training inputs, and refuses what is ambiguous.
        limits: between which raw inputs lie; inputs far outside are refused. ``None``: anywhere. A task takes them from its training
            inputs where these are images or have a scale.

    A subclass may bring a ``loss`` of its own, and with it targets and outputs of other shapes.

    Raises:
        UsageError: an unknown kind of targets, or sizes or constants that cannot be.
    """

    name: str
    input_shape: tuple[int, ...]
    outputs: int
    targets: TargetKind = "classes"
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float | None = None
    limits: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        where = f"TaskSpec {self.name!r}"
        if self.targets not in get_args(TargetKind):
            raise UsageError(
                f"targets={self.targets!r} is no kind of targets", where=where, fix=f"known: {', '.join(get_args(TargetKind))}"
            )
        if self.outputs < 1 or any(size < 1 for size in self.input_shape):
            raise UsageError(
                f"{self.outputs} outputs for inputs of shape {tuple(self.input_shape)}", where=where, fix="sizes are 1 or more"
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, *self.input_shape[:1]) or not all(map(math.isfinite, values)):
                raise UsageError(
                    f"{name}={tuple(values)} for inputs of shape {tuple(self.input_shape)}",
                    where=where,
                    fix="give one finite number, or one for each entry of the first axis",
                )
        for name, value in (("std", min(self.std)), ("scale", 1.0 if self.scale is None else self.scale)):
            if not 0 < value < math.inf:
                raise UsageError(f"{name}={value} divides the inputs", where=where, fix="it must be finite and above 0")

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
            return 0.5 * (outputs - self._beside(outputs, batch.targets)).pow(2).flatten(1).sum(1).mean()
        targets = batch.targets
        return F.cross_entropy(outputs, targets.to(outputs.dtype) if outputs.dtype == torch.float64 and targets.dim() > 1 else targets)

    def error(self, outputs: Tensor, batch: Batch) -> Tensor:
        """dLoss/dOutputs, (N, C), in closed form: ``(softmax(scores) - target) / N``, or ``(outputs - target) / N``."""
        with torch.no_grad():
            if self.targets == "real":
                return (outputs - self._beside(outputs, self.target_rows(batch, outputs.dtype))) / len(outputs)
            made = outputs.softmax(1)
            if batch.targets is not None and _are_classes(batch.targets):  # without one-hot rows, which take longer than the softmax
                made.scatter_add_(1, batch.targets[:, None], made.new_full((len(made), 1), -1.0))
            else:
                made = made - self._beside(made, self.target_rows(batch, made.dtype))
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
        """(N,) whether the best score is at the target's class (its largest entry for soft labels); never where a score is NaN.

        Raises:
            BpfreeError: targets of another shape than (N,) classes or (N, C) soft labels.
        """
        best = targets if targets.dim() == 1 else self._beside(scores, targets).argmax(1)
        return (scores.argmax(1) == best) & ~scores.isnan().any(1)

    def _beside(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The targets, if they have the outputs' shape: others would be broadcast, to a number that means nothing."""
        if outputs.shape != targets.shape:
            raise BpfreeError(
                f"outputs have shape {tuple(outputs.shape)}, but targets {tuple(targets.shape)}",
                where=f"task {self.name!r}",
                fix="give targets of the outputs' shape, or a TaskSpec of your own with loss, error and correct",
            )
        return targets

    def normalise(self, raw: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Raw inputs to what networks see: ``(raw / scale - mean) / std``.

        Args:
            raw: (N, ...) numbers of any dtype.
            dtype: of the result.
        """
        x = self.scaled(raw, working_dtype(dtype))
        shape = (1, -1) + (1,) * (x.dim() - 2)
        mean = torch.tensor(self.mean, device=x.device, dtype=x.dtype).view(shape)
        std = torch.tensor(self.std, device=x.device, dtype=x.dtype).view(shape)
        return ((x - mean) / std).to(dtype)

    def scaled(self, raw: Tensor, dtype: torch.dtype) -> Tensor:
        """``raw / scale`` in a floating dtype; the raw inputs are not overwritten."""
        scale = self.scale if self.scale is not None else 255.0 if raw.dtype == torch.uint8 else 1.0
        x = raw.to(dtype)
        if scale == 1:
            return x
        return x / scale if x is raw else x.div_(scale)

    def plain(self) -> Self:
        """The same task for inputs that are taken as they are, such as normalised ones or features."""
        return replace(self, mean=(0.0,), std=(1.0,), scale=1.0, limits=None)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """What inputs are normalised in: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _are_classes(targets: Tensor) -> bool:
    return targets.dim() == 1 and not targets.is_floating_point()


@dataclass(frozen=True)
class Split:
    """Examples: raw inputs (N, *input_shape), numbers of any dtype, and their targets; on the CPU."""

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
        from bpfree.tasks.check import check_task

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
    from bpfree.tasks.check import check_lengths

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
