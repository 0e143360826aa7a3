"""The description of a task: its inputs, targets, loss and metrics, without data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from bpfree.errors import BpfreeError, UsageError
from bpfree.metric import Metric
from bpfree.step import Batch
from bpfree.tasks import metrics
from bpfree.tasks.splits import Split
from bpfree.tasks.trees import tree_map

__all__ = ["IGNORED", "InputPart", "Split", "TargetKind", "TaskSpec", "has_own_loss", "is_image", "working_dtype"]

TargetKind = Literal["classes", "multilabel", "soft", "real", "tokens", "none"]
IGNORED = -100
"""The target of a token that does not count, as in ``torch.nn.functional.cross_entropy``."""


def is_image(input_shape: Sequence[int]) -> bool:
    """Tell whether inputs of this shape are (channels, height, width) images of at least 16x16 pixels."""
    return len(input_shape) == 3 and min(input_shape[1:]) >= 16


@dataclass(frozen=True)
class InputPart:
    """Describe one tensor of an example, where an example has several.

    Attributes:
        shape: without the axis of examples; ``-1`` for an axis of varying length.
        dtype: ``real`` (the network's floating dtype), ``integer`` (int64) or ``bool``.
        vocabulary: how many values integers take, 0 to ``vocabulary - 1``; ``None``: any.
    """

    shape: tuple[int, ...] = ()
    dtype: Literal["real", "integer", "bool"] = "real"
    vocabulary: int | None = None

    def normalise(self, raw: Tensor, dtype: torch.dtype) -> Tensor:
        """Convert to what networks see: real numbers in ``dtype``, integers as int64."""
        return raw.to(dtype) if self.dtype == "real" else raw.long() if self.dtype == "integer" else raw.bool()

    def example(self, count: int, generator: torch.Generator | None, dtype: torch.dtype) -> Tensor:
        """Make up ``count`` examples: normal numbers, or uniform integers."""
        shape = (count, *(max(1, size) for size in self.shape))
        if self.dtype == "real":
            return torch.randn(shape, generator=generator).to(dtype)
        made = torch.randint(0, (self.vocabulary or 2) if self.dtype == "integer" else 2, shape, generator=generator)
        return made if self.dtype == "integer" else made.bool()


@dataclass(frozen=True)
class TaskSpec:
    """Describe a task to rules and networks: its inputs, outputs, targets, loss and metrics; no data.

    Attributes:
        name: the task's name.
        input_shape: of one input, without the batch axis; ``()`` where ``structure`` describes several tensors.
        outputs: number of classes, of labels, of real outputs, or of tokens in the vocabulary that is predicted.
        targets: ``classes`` (N,) integers, ``multilabel`` (N, C) of 0 and 1, ``soft`` (N, C) distributions, ``real`` numbers of the
            outputs' shape, ``tokens`` (N, ...) integers of which ``IGNORED`` (-100) do not count, or ``none``.
        mean, std: per channel (the first axis of an input): ``(raw / scale - mean) / std`` is what networks see.
        scale: what raw inputs are divided by, whatever their dtype: 255 for pictures of 0 to 255, 1 for inputs that are taken as they
            are. ``None``: 255 for uint8 and 1 for all else. A task finds out from its training inputs, and refuses what is ambiguous.
        limits: between which raw inputs lie; inputs far outside are refused. ``None``: anywhere. A task takes them from its training
            inputs where these are images or have a scale.
        vocabulary: inputs are integers from 0 to ``vocabulary - 1``, which networks get as int64; ``None``: inputs are real numbers.
        structure: a tree (dictionaries, lists, tuples) of :class:`InputPart`, for inputs of several tensors; its inputs are taken as they
            are.
        output_shape: of one example's outputs; ``None``: ``(outputs,)``, or ``(*input_shape, outputs)`` for tokens.
        class_names: of the classes or labels, shown in place of their numbers; empty: none.
        input_names: of the entries of vector inputs, such as the columns of a table; empty: none.

    A subclass may bring its own ``loss`` (with targets and outputs of any shape), ``error``, ``metrics``, ``normalise`` and ``example``.
    What it does not bring follows from what it does: without an ``error`` of its own it is the derivative of its loss.

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
    vocabulary: int | None = None
    structure: Any = None
    output_shape: tuple[int, ...] | None = None
    class_names: tuple[str, ...] = ()
    input_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        where = f"TaskSpec {self.name!r}"
        if self.targets not in get_args(TargetKind):
            raise UsageError(
                f"targets={self.targets!r} is no kind of targets", where=where, fix=f"known: {', '.join(get_args(TargetKind))}"
            )
        if self.outputs < 1 or any(size < 1 for size in (*self.input_shape, *(self.output_shape or ()))):
            raise UsageError(
                f"{self.outputs} outputs for inputs of shape {tuple(self.input_shape)}", where=where, fix="sizes are 1 or more"
            )
        if self.vocabulary is not None and (self.vocabulary < 1 or self.structure is not None):
            fix = "give 1 or more" if self.structure is None else "set it in the parts of the structure"
            raise UsageError(f"vocabulary={self.vocabulary}", where=where, fix=fix)
        if self.class_names and len(self.class_names) != self.outputs:
            what = f"{len(self.class_names)} names of classes for {self.outputs} outputs"
            raise UsageError(what, where=where, fix="give a name for each class, or none")
        if self.input_names and (len(self.input_names),) != tuple(self.input_shape):
            what = f"{len(self.input_names)} names for inputs of shape {tuple(self.input_shape)}"
            raise UsageError(what, where=where, fix="give a name for each entry of a vector, or none")
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

    @property
    def output_size(self) -> tuple[int, ...]:
        """Shape of one example's outputs."""
        if self.output_shape is not None:
            return tuple(self.output_shape)
        return (*self.input_shape, self.outputs) if self.targets == "tokens" else (self.outputs,)

    def label(self, place: int) -> str:
        """Name a class or label: by its name, or by its number where there are no names."""
        return self.class_names[place] if self.class_names else str(place)

    @property
    def is_scored(self) -> bool:
        """Whether there is a loss: targets, or a loss that needs none."""
        return self.targets != "none" or has_own_loss(self)

    # --- loss and error -----------------------------------------------------------------------------------------------------

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Compute the mean loss over a batch, a scalar.

        Cross-entropy in nats for classes, soft labels and tokens (mean over tokens that count), binary cross-entropy for several labels
        (mean over labels), and half the squared error summed over outputs for real targets.

        Raises:
            BpfreeError: for a task without targets, or outputs of another shape than the targets need.
        """
        if batch.targets is None:
            raise BpfreeError(
                f"task {self.name!r} has no targets, so no loss", fix="use a rule that learns without, or a TaskSpec with a loss"
            )
        targets = batch.targets
        if self.targets == "real":
            return 0.5 * (outputs - self.beside(outputs, targets)).pow(2).flatten(1).sum(1).mean()
        if self.targets == "multilabel":
            return F.binary_cross_entropy_with_logits(outputs, self.beside(outputs, targets).to(outputs.dtype))
        if self.targets == "tokens":
            scores, classes = self._tokens(outputs, targets)
            # of a batch in which no token counts the loss is 0, not NaN
            return F.cross_entropy(scores, classes, ignore_index=IGNORED, reduction="sum") / (classes != IGNORED).sum().clamp_min(1)
        return F.cross_entropy(outputs, targets.to(outputs.dtype) if outputs.dtype == torch.float64 and targets.dim() > 1 else targets)

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Compute the loss of each example (N,), or of each token that counts (M,); :meth:`loss` is their mean."""
        if has_own_loss(self):
            pick = [slice(place, place + 1) for place in range(len(batch))]
            return torch.stack([self.loss(outputs[each], _part(batch, each)) for each in pick]).detach().float()
        assert batch.targets is not None
        targets = batch.targets
        if self.targets == "real":
            return 0.5 * (outputs - self.beside(outputs, targets)).pow(2).flatten(1).sum(1)
        if self.targets == "multilabel":
            rows = self.beside(outputs, targets).to(outputs.dtype)
            return F.binary_cross_entropy_with_logits(outputs, rows, reduction="none").flatten(1).mean(1)
        if self.targets == "tokens":
            scores, classes = self._tokens(outputs, targets)
            return F.cross_entropy(scores, classes, ignore_index=IGNORED, reduction="none")[classes != IGNORED]
        return F.cross_entropy(outputs, targets, reduction="none")

    def counted(self, batch: Batch) -> int | Tensor:
        """Count the terms of the mean that is the loss of a batch: its examples, or the tokens that count."""
        if self.targets == "tokens" and batch.targets is not None and not has_own_loss(self):
            return (batch.targets != IGNORED).sum()
        return len(batch)

    def error(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Compute dLoss/dOutputs, of the outputs' shape: in closed form for the losses above, by autograd for a subclass's own loss."""
        if has_own_loss(self):
            return self._differentiated(outputs, batch)[1]
        with torch.no_grad():
            if self.targets == "real":
                return (outputs - self.beside(outputs, self.target_rows(batch, outputs.dtype))) / len(outputs)
            if self.targets == "multilabel":
                rows = self.beside(outputs, self.target_rows(batch, outputs.dtype))
                return (outputs.sigmoid() - rows) / outputs.numel()
            if self.targets == "tokens":
                return self._token_error(outputs, batch)
            made = outputs.softmax(1)
            if batch.targets is not None and _are_classes(batch.targets):  # without one-hot rows, which take longer than the softmax
                made.scatter_add_(1, batch.targets[:, None], made.new_full((len(made), 1), -1.0))
            else:
                made = made - self.beside(made, self.target_rows(batch, made.dtype))
            return made / len(outputs)

    def loss_and_error(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compute :meth:`loss` and :meth:`error`, which share the softmax of scores and classes."""
        if has_own_loss(self):
            return self._differentiated(outputs, batch)
        if self.targets not in ("classes", "soft") or batch.targets is None or not _are_classes(batch.targets):
            return self.loss(outputs, batch), self.error(outputs, batch)
        with torch.no_grad():
            made = outputs.log_softmax(1)
            loss = F.nll_loss(made, batch.targets)
            return loss, made.exp_().scatter_(1, batch.targets[:, None], -1.0, reduce="add").mul_(1.0 / len(made))

    def _differentiated(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compute loss and error of a subclass that may define one of them, or both."""
        own_error = type(self).error is not TaskSpec.error
        with torch.enable_grad():
            leaf = outputs.detach().requires_grad_()
            loss = self.loss(leaf, batch)
            if own_error:
                return loss.detach(), self.error(outputs, batch)
            if not loss.requires_grad:
                raise BpfreeError(
                    f"the loss of task {self.name!r} does not depend on the outputs", fix="compute it from them, with autograd"
                )
            (error,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), error

    def _token_error(self, outputs: Tensor, batch: Batch) -> Tensor:
        assert batch.targets is not None
        scores, classes = self._tokens(outputs, batch.targets)
        counts = classes != IGNORED
        made = scores.softmax(1)
        made.scatter_add_(1, classes.clamp_min(0)[:, None], made.new_full((len(made), 1), -1.0))
        return (made * (counts / counts.sum().clamp_min(1))[:, None].to(made.dtype)).reshape(outputs.shape)

    def target_rows(self, batch: Batch, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the targets as rows (N, C): one-hot classes; labels, distributions or real values as they are."""
        if batch.targets is None:
            raise BpfreeError(f"task {self.name!r} has no targets")
        if self.targets == "tokens":
            return F.one_hot(batch.targets.clamp_min(0), self.outputs).to(dtype) * (batch.targets != IGNORED)[..., None]
        if _are_classes(batch.targets):
            return F.one_hot(batch.targets, self.outputs).to(dtype)
        return batch.targets.to(dtype)

    # --- scores -------------------------------------------------------------------------------------------------------------

    def metrics(self) -> Sequence[Metric]:
        """Return the metrics of a run besides the loss; the first one, or the loss where there is none, is used to compare runs."""
        if has_own_loss(self) and self.targets != "classes":
            return ()
        return {
            "classes": (metrics.ACCURACY,),
            "soft": (metrics.ACCURACY,),
            "multilabel": (metrics.LABEL_ACCURACY, metrics.EXACT),
            "tokens": (metrics.ACCURACY,),
        }.get(self.targets, ())

    @property
    def primary(self) -> Metric:
        """Return the metric by which runs, trials and tables are compared."""
        found = tuple(self.metrics())
        return found[0] if found else metrics.LOSS

    def correct(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Tell for each example (N,), or token that counts, whether the best score is at its class; never where a score is NaN.

        The class of soft labels is their largest entry.

        Raises:
            BpfreeError: targets of another shape than (N,) classes, (N, C) soft labels, or tokens beside (N, ..., C) scores.
        """
        rows, classes = self.scored_classes(scores, targets)
        return (rows.argmax(1) == classes) & ~rows.isnan().any(1)

    def scored_classes(self, scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Lay out scores (M, C) beside their classes (M,): of examples, or of the tokens that count."""
        if self.targets == "tokens":
            rows, classes = self._tokens(scores, targets)
            counts = classes != IGNORED
            return (rows, classes) if bool(counts.all()) else (rows[counts], classes[counts])
        if targets.dim() == 1:
            return scores, targets
        return scores, self.beside(scores, targets).argmax(1)

    def _tokens(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores (M, C) and tokens (M,) of outputs (N, ..., C) and targets (N, ...)."""
        if outputs.shape[:-1] != targets.shape:
            raise BpfreeError(
                f"outputs have shape {tuple(outputs.shape)}, but targets {tuple(targets.shape)}",
                where=f"task {self.name!r}, targets='tokens'",
                fix="give scores of shape (*targets.shape, vocabulary)",
            )
        return outputs.reshape(-1, outputs.shape[-1]), targets.reshape(-1)

    def beside(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the targets if they have the outputs' shape, and refuse others: these would be broadcast to a meaningless number.

        Raises:
            BpfreeError: the shapes differ.
        """
        if outputs.shape != targets.shape:
            raise BpfreeError(
                f"outputs have shape {tuple(outputs.shape)}, but targets {tuple(targets.shape)}",
                where=f"task {self.name!r}",
                fix="give targets of the outputs' shape, or a TaskSpec of your own with loss, error and correct",
            )
        return targets

    # --- inputs -------------------------------------------------------------------------------------------------------------

    @property
    def parts(self) -> Any:
        """A tree of :class:`InputPart` that describes one example's inputs."""
        if self.structure is not None:
            return self.structure
        return InputPart(tuple(self.input_shape), "real" if self.vocabulary is None else "integer", self.vocabulary)

    @property
    def takes_real_tensors(self) -> bool:
        """Whether an input is one tensor of real numbers, which can be scaled, perturbed and read by a linear map."""
        return self.structure is None and self.vocabulary is None

    def example(self, count: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32) -> Any:
        """Make up inputs of ``count`` examples as networks see them, on the CPU.

        A subclass whose inputs must fit together (the edges of a graph, say) makes its own.
        """
        return tree_map(lambda part: part.example(count, generator, dtype), self.parts)

    def normalise(self, raw: Any, dtype: torch.dtype = torch.float32) -> Any:
        """Convert raw inputs to what networks see: ``(raw / scale - mean) / std``; integers to int64, parts of a structure as they are.

        Args:
            raw: (N, ...) numbers of any dtype, or a tree of them.
            dtype: of real numbers in the result.
        """
        if not self.takes_real_tensors:
            return tree_map(lambda part, leaf: part.normalise(leaf, dtype), self.parts, raw)
        x = self.scaled(raw, working_dtype(dtype))
        shape = (1, -1) + (1,) * (x.dim() - 2)
        mean = torch.tensor(self.mean, device=x.device, dtype=x.dtype).view(shape)
        std = torch.tensor(self.std, device=x.device, dtype=x.dtype).view(shape)
        return ((x - mean) / std).to(dtype)

    def scaled(self, raw: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``raw / scale`` in a floating dtype; the raw inputs are not overwritten."""
        scale = self.scale if self.scale is not None else 255.0 if raw.dtype == torch.uint8 else 1.0
        x = raw.to(dtype)
        if scale == 1:
            return x
        return x / scale if x is raw else x.div_(scale)

    def plain(self) -> Self:
        """Describe the same task for inputs that are taken as they are, such as normalised ones."""
        return replace(self, mean=(0.0,), std=(1.0,), scale=1.0, limits=None)

    def example_targets(self, count: int, generator: torch.Generator | None = None) -> Tensor | None:
        """Make up targets of ``count`` examples, of the kind and shape that the spec describes; ``None`` where there are none."""
        if self.targets == "none":
            return None
        if self.targets in ("classes", "tokens"):
            shape = (count,) if self.targets == "classes" else (count, *self.output_size[:-1])
            return torch.randint(self.outputs, shape, generator=generator)
        rows = torch.randn(count, *self.output_size, generator=generator)
        return (rows > 0).float() if self.targets == "multilabel" else rows.softmax(1) if self.targets == "soft" else rows

    # --- in a checkpoint ----------------------------------------------------------------------------------------------------

    def recorded(self) -> dict[str, Any]:
        """Return the spec as plain values: its fields, and the class of a subclass."""
        content = {item.name: getattr(self, item.name) for item in fields(self)}
        content["structure"] = None if self.structure is None else tree_map(_recorded_part, self.structure)
        return content if type(self) is TaskSpec else {**content, CLASS: f"{type(self).__module__}:{type(self).__qualname__}"}


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which inputs are normalised: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _are_classes(targets: Tensor) -> bool:
    return targets.dim() == 1 and not targets.is_floating_point()


def has_own_loss(spec: TaskSpec) -> bool:
    """Tell whether a subclass defines its own loss, and thereby what targets and outputs are."""
    return type(spec).loss is not TaskSpec.loss


def _part(batch: Batch, place: slice) -> Batch:
    return Batch(tree_map(lambda leaf: leaf[place], batch.inputs), None if batch.targets is None else batch.targets[place])


CLASS = "class"
"""Key of a subclass's address in a record."""


def _recorded_part(part: InputPart) -> dict[str, Any]:
    return {"shape": list(part.shape), "dtype": part.dtype, "vocabulary": part.vocabulary, PART: True}


PART = "input part"


def structure_from(content: Any) -> Any:
    """Read a structure that ``TaskSpec.recorded`` wrote."""
    if isinstance(content, Mapping):
        if content.get(PART):
            return InputPart(tuple(content["shape"]), content["dtype"], content["vocabulary"])
        return {key: structure_from(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(structure_from(value) for value in content)
    return content
