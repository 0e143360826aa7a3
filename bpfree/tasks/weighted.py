"""Cross-entropy in which classes have weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bpfree.errors import BpfreeError, UsageError
from bpfree.metric import Metric
from bpfree.step import Batch
from bpfree.tasks import metrics
from bpfree.tasks.spec import TaskSpec

__all__ = ["WeightedSpec"]


@dataclass(frozen=True)
class WeightedSpec(TaskSpec):
    """Describe a task of classes or soft labels whose loss weighs its classes.

    The loss of an example is ``-sum_c w_c p_c log softmax(outputs)_c`` with its class or soft labels ``p``; that of a batch is the mean
    over its examples, so that an example counts the same in every batch. ``torch.nn.functional.cross_entropy(weight=w)`` of integer
    classes divides by the sum of the weights in the batch instead; of soft labels it is the same.

    Attributes:
        class_weights: one for each class.
    """

    class_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.class_weights) != self.outputs or not all(0 < weight < math.inf for weight in self.class_weights):
            what = f"class_weights={self.class_weights} for {self.outputs} classes"
            raise UsageError(what, where=f"TaskSpec {self.name!r}", fix="give a finite number above 0 for each class")
        if self.targets not in ("classes", "soft"):
            raise UsageError(f"class weights with targets={self.targets!r}", where=f"TaskSpec {self.name!r}", fix="they are for classes")

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Compute the mean of the weighted cross-entropies of a batch."""
        return self.losses(outputs, batch).mean()

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Compute the weighted cross-entropy of each example (N,)."""
        targets = self._targets(batch)
        if targets.dim() == 1:
            return F.cross_entropy(outputs, targets, reduction="none") * self._weights(outputs)[targets]
        rows = self.beside(outputs, targets).to(outputs.dtype)
        return F.cross_entropy(outputs, rows, weight=self._weights(outputs), reduction="none")

    def error(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Compute dLoss/dOutputs in closed form: ``(softmax * sum_c w_c p_c - w p) / N``."""
        self._targets(batch)
        with torch.no_grad():
            rows = self.beside(outputs, self.target_rows(batch, outputs.dtype)) * self._weights(outputs)
            return (outputs.softmax(1) * rows.sum(1, keepdim=True) - rows) / len(outputs)

    def metrics(self) -> Sequence[Metric]:
        """Return the accuracy, in which all examples count the same."""
        return (metrics.ACCURACY,)

    def _weights(self, outputs: Tensor) -> Tensor:
        return torch.tensor(self.class_weights, device=outputs.device, dtype=outputs.dtype)

    def _targets(self, batch: Batch) -> Tensor:
        if batch.targets is None:
            raise BpfreeError(f"task {self.name!r} has no targets, so no loss")
        return batch.targets
