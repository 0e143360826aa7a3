"""Programs: other trainers, as rows of a study beside rules, on the same splits, in the same metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from bpfree.options import NoOptions
from bpfree.tasks.task import Task, TaskSpec

__all__ = ["Program", "ProgramContext"]


class ProgramContext(Protocol):
    """The methods of a run that a program may use.

    Attributes:
        task: with its splits, raw.
        options: an instance of the program's ``Config``.
        settings: of the run, such as ``batch_size``, where the program says that it reads them (:attr:`Program.reads`).
        seed: of the repetition. Torch's global generator is seeded from it and put back afterwards.
        threads: that it may compute with; ``None``: it chooses.
        device: that the run is to be on, for programs that have a choice.
        folder: of the run, for what else it keeps; ``None``: nothing is written.
    """

    task: Task
    options: Any
    settings: Any
    seed: int
    threads: int | None
    device: torch.device
    folder: Path | None

    @property
    def spec(self) -> TaskSpec:
        """The task's spec."""

    def arrays(self, split: Literal["train", "val"]) -> tuple[Any, Any]:
        """Return a split's inputs (N, ...) as a network would see them, normalised, and its targets, both as NumPy arrays.

        Nothing of it counts as training time.

        Raises:
            UsageError: there is no such split, or its inputs are no single tensors.
        """

    def score(self, split: Literal["train", "val", "test"], predict: Callable[[Any], Any]) -> dict[str, float]:
        """Score predictions by the metrics of the run: ``{"val/accuracy": ...}``; it does not count as training time.

        Of the training split the sample is scored that rules are scored on. Nothing where there is no such split, or the test split is
        not to be seen; of the test split what became of each example is kept, so that rows can be compared in pairs.

        Args:
            split: which.
            predict: from normalised inputs (M, ...) to outputs (M, ...) as a network would give them: scores of classes whose softmax is
                their probability, or real numbers of the targets' shape.

        Raises:
            UsageError: the test split was scored before.
        """

    def log(self, metrics: Mapping[str, float]) -> None:
        """Record the end of an epoch (of a fit, where there are no epochs) with its metrics; trials are chosen by ``val/...``."""


@dataclass(frozen=True)
class Program:
    """A registered trainer: from a configuration to metrics.

    Attributes:
        train: called once with the run's context; returns the metrics of the end, such as ``test/accuracy``. What it takes is timed, but
            for what its context does. It cannot be resumed: an interrupted run starts again from the beginning.
        Config: dataclass of its own options, ``program.KEY`` in a configuration.
        summary: one line for listings.
        check: ``(options, spec) -> problems``, each a sentence, before any data are loaded; by default none.
        reads: settings beside ``task``, ``seed``, ``threads``, ``device`` and what is scored: sections or keys such as ``batch_size``.
            Others are refused, or listed as unused where rows share them.
        packages: distributions whose versions its numbers depend on.
    """

    train: Callable[[ProgramContext], Mapping[str, float]]
    Config: type = NoOptions
    summary: str = ""
    check: Callable[[Any, TaskSpec], Sequence[str]] = lambda options, spec: ()
    reads: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
