"""The arguments of a rule: a batch, the step it belongs to, the phase of training and the budget of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bpfree.options import OptimizerConfig, ScheduleConfig

__all__ = ["Batch", "Budget", "Phase", "Stage", "Step"]


@dataclass(frozen=True, slots=True)
class Batch:
    """One mini-batch on the device.

    Attributes:
        inputs: a tensor (N, ...) or a pytree of tensors, normalised.
        targets: (N,) integer classes, (N, C) soft labels, (N, ...) real values, or ``None``.
        views: of each example, drawn by the augmentations independently, as many as the rule's trait ``views`` asks for; the first is
            ``inputs``. Empty where the rule asks for one.
        indices: (N,) positions of the examples in the split that the phase is on, from a run's loader; ``None``: not known.
    """

    inputs: Any
    targets: Tensor | None = None
    views: tuple[Any, ...] = ()
    indices: Tensor | None = None

    def __len__(self) -> int:
        first = self.inputs if isinstance(self.inputs, Tensor) else torch.utils._pytree.tree_leaves(self.inputs)[0]
        return int(first.shape[0])


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit of training, of which at least one kind is set.

    Attributes:
        epochs: passes over the training split, as the rule counts them (a rule may need several passes per epoch).
            When the budget is given in samples, the epochs that these amount to, rounded up.
        samples: examples drawn; every pass over an example counts.
        seconds: of training; evaluation, compilation and checkpoints are not counted.
        forwards: forward-pass equivalents of one example: operations of training over those of one forward pass.
        operations: floating-point operations of training: the same for every rule and network.
    """

    epochs: int | None = None
    samples: int | None = None
    seconds: float | None = None
    forwards: float | None = None
    operations: float | None = None


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of training: which groups learn, for how long, on which batches, with which optimiser.

    Attributes:
        name: shown in progress and metrics; need not be unique.
        epochs: passes over the training split; ``None``: until the run's budget ends.
        seconds, forwards, operations: of training, as an alternative end, perhaps in the middle of a pass; units as in :class:`Budget`.
        groups: names of the parameter groups that learn; ``None``: all. The others have ``requires_grad=False``,
            and blocks below the first learning one run in eval mode.
        batch_size: ``None``: the run's; ``"all"``: the training split as one batch.
        optimizer: over the run's; ``None``: the run's.
        schedule: over the phase's own progress; ``None``: the run's schedule, over the run's progress.
        reset: groups that ``Rule.start_phase`` initialises again; their optimiser state is dropped.
        evaluate: whether the epochs of this phase end with an evaluation.
        part: of the training split that the phase is on: a name in ``Task.parts``; ``None``: all, or in a stream the stage's examples with
            what is kept of earlier ones.
        on_features: whether batches hold ``Rule.features`` of the inputs in place of these, for a phase in which the
            readout alone learns. They are computed once, in eval mode, and kept (in memory, or else in a temporary file);
            again for each batch where augmentations change the inputs.
    """

    name: str = "train"
    epochs: int | None = None
    seconds: float | None = None
    forwards: float | None = None
    operations: float | None = None
    groups: tuple[str, ...] | None = None
    batch_size: int | Literal["all"] | None = None
    optimizer: OptimizerConfig | None = None
    schedule: ScheduleConfig | None = None
    reset: tuple[str, ...] = ()
    evaluate: bool = True
    on_features: bool = False
    part: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether the phase sets no end of its own, so that the run's budget ends it."""
        return self.epochs is self.seconds is self.forwards is self.operations is None


@dataclass(frozen=True)
class Stage:
    """Describe a stage of a stream.

    Attributes:
        name: shown in metrics and reports.
        index: its place, from 0.
        classes: that begin in it; empty for streams whose classes stay the same.
        train, test: (M,) positions of its examples in the task's splits.
        validation: likewise; ``None``: it has none.
    """

    name: str
    index: int
    classes: tuple[int, ...] = ()
    train: Tensor | None = None
    test: Tensor | None = None
    validation: Tensor | None = None

    def recorded(self) -> dict[str, Any]:
        """Return the stage as plain values without its examples, for a checkpoint."""
        return {"name": self.name, "index": self.index, "classes": list(self.classes)}


@dataclass(slots=True)
class Step:
    """The step in progress: its position, its randomness, and the way to apply updates.

    The same object is handed to every step of a run, with its fields moved on.

    Attributes:
        generator: the rule's own stream of random numbers, on the run's device; saved in checkpoints.
        generator_for: a generator keyed by (seed, name, step index, part): the same draws in whatever order, process or
            stack the names are visited. Asking again for the same name in the same step restarts the stream.
        phase: the current phase.
        epoch: passes over the training split begun before this one.
        index: steps taken before this one.
        part: which micro-batch of the step this is, where gradients are accumulated.
        progress: share of the run's budget that is used, 0 to 1.
        apply: ``apply()`` updates all groups, ``apply("b1", ...)`` some: optimiser step, then drop their ``.grad``.
        lr: the current learning rate of a group.
        stage: of a stream, that is learned now; ``None``: the task is no stream.
        local_groups: groups whose gradients this process is to fill, where the blocks of a network are dealt to several; ``None``: all.
    """

    generator: torch.Generator
    generator_for: Callable[[str], torch.Generator]
    apply: Callable[..., None]
    lr: Callable[[str], float]
    phase: Phase
    epoch: int = 0
    index: int = 0
    part: int = 0
    progress: float = 0.0
    stage: Stage | None = None
    local_groups: frozenset[str] | None = None

    def fills(self, name: str) -> bool:
        """Tell whether a group learns in this phase, and this process is to fill its gradients."""
        learns = self.phase.groups is None or name in self.phase.groups
        return learns and (self.local_groups is None or name in self.local_groups)
