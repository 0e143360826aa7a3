"""What is known of a task, and its examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from bpfree.errors import BpfreeError, UsageError
from bpfree.step import Batch

__all__ = ["Split", "TargetKind", "TaskSpec", "is_image", "working_dtype"]

TargetKind = Literal["classes", "soft", "real", "none"]


def is_image(input_shape: Sequence[int]) -> bool:
    """Tell whether inputs of this shape are (channels, height, width) images of at least 16x16 pixels."""
    return len(input_shape) == 3 and min(input_shape[1:]) >= 16


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
        return is_image(self.input_shape)

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
