"""Predictions of a run for each example of the test split: a byte or two each, in ``predictions.npz`` in the run's folder.

Arrays, in the order of the test split: ``predicted``, the class with the highest score (uint8; uint16 beyond 256 classes), of the first
draw of a stochastic predictor; ``target``, the class that is right (alike; files before version 0.2 are without it); ``correct``, whether
the prediction is right (uint8, 0 or 1), of several draws the share of them that are (float32).
Where targets are real numbers ``loss`` (float32), the mean over draws, is in the place of both. ``linear_probe_correct`` and so on: the
same of evaluation protocols that decide example by example.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bpfree.files import replacing
from bpfree.record.folder import RunFolder
from bpfree.step import Batch
from bpfree.tasks.task import TaskSpec

__all__ = ["Collector", "Predictions", "read_predictions", "write_predictions"]


Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Predictions:
    """Predictions of N examples, in the order of their split.

    Attributes:
        predicted: (N,) classes, of the first draw; ``None`` for real targets.
        correct: (N,) 0 or 1, of several draws the share that are right; ``None`` for real targets.
        loss: (N,) of real targets; else ``None``.
        protocols: ``correct`` of evaluation protocols, by the name that their results have (``linear_probe``).
        target: (N,) classes that are right; ``None`` for real targets, and where they were not kept.
    """

    predicted: Array | None = None
    correct: Array | None = None
    loss: Array | None = None
    protocols: Mapping[str, Array] = field(default_factory=dict)
    target: Array | None = None

    def arrays(self) -> dict[str, Array]:
        """Return the arrays as the file stores them."""
        own = {"predicted": self.predicted, "correct": self.correct, "loss": self.loss, "target": self.target}
        found = {name: array for name, array in own.items() if array is not None}
        return found | {f"{name}_correct": array for name, array in self.protocols.items()}

    def confusion(self, classes: int) -> Array | None:
        """Count the examples (C, C) of each class (row) that were predicted as each class (column); ``None`` without classes."""
        if self.predicted is None or self.target is None:
            return None
        places = self.target.astype(np.int64) * classes + self.predicted
        return np.bincount(places, minlength=classes**2).reshape(classes, classes)


class Collector:
    """Collects the scores of an evaluation, batch by batch; they stay on the device until they are read.

    Args:
        spec: of the task.
    """

    def __init__(self, spec: TaskSpec) -> None:
        self._spec = spec
        self._draws = 0
        self._predicted: list[Tensor] = []
        self._target: list[Tensor] = []
        self._values: list[list[Tensor]] = []

    def begin_draw(self) -> None:
        """Begin a pass over the split."""
        self._draws += 1
        self._values.append([])

    def add(self, scores: Tensor, batch: Batch) -> None:
        """Add the scores of a batch."""
        if self._spec.targets not in ("classes", "soft"):
            if self._spec.targets not in ("tokens", "none"):  # of which a loss is not of single examples
                self._values[-1].append(self._spec.losses(scores.float(), batch))
            return
        assert batch.targets is not None
        self._values[-1].append(self._spec.correct(scores, batch.targets).to(torch.uint8))
        if self._draws == 1:  # torch before 2.3 has no uint16
            kind = torch.uint8 if self._spec.outputs <= 256 else torch.int32
            self._predicted.append(scores.argmax(1).to(kind))
            self._target.append(self._spec.scored_classes(scores, batch.targets)[1].to(kind))

    def predictions(self) -> Predictions | None:
        """Return the collected predictions; ``None`` where they are not one value for each example, or there are none."""
        if not self._draws or not self._values[0]:
            return None
        draws = [torch.cat(values).cpu() for values in self._values]
        if draws[0].dim() != 1:
            return None
        if self._spec.targets not in ("classes", "soft"):
            return Predictions(loss=torch.stack(draws).double().mean(0).float().numpy())
        predicted, target = (torch.cat(classes).cpu().numpy() for classes in (self._predicted, self._target))
        if 256 < self._spec.outputs <= 65536:
            predicted, target = predicted.astype(np.uint16), target.astype(np.uint16)
        correct = draws[0] if self._draws == 1 else torch.stack(draws).double().mean(0).float()
        return Predictions(predicted, correct.numpy(), target=target)


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write or replace the file as a whole.

    Raises:
        OSError: the folder cannot be written.
    """
    arrays: dict[str, Any] = predictions.arrays()
    with replacing(path, durable=True) as file:
        np.savez_compressed(file, **arrays)


def read_predictions(path: Path) -> Predictions | None:
    """Read a run's predictions; ``None`` where there is no such file, or a damaged one.

    Args:
        path: of the file, or of the run's folder.
    """
    try:
        with np.load(RunFolder(path).predictions if path.is_dir() else path, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
    except Exception:  # a damaged archive may raise any exception
        return None
    protocols = {name.removesuffix("_correct"): array for name, array in arrays.items() if name.endswith("_correct")}
    found = Predictions(arrays.get("predicted"), arrays.get("correct"), arrays.get("loss"), protocols, arrays.get("target"))
    whole = (found.predicted is not None and found.correct is not None) or found.loss is not None
    same = len({array.shape for array in arrays.values()}) == 1 and all(array.ndim == 1 for array in arrays.values())
    return found if whole and same else None
