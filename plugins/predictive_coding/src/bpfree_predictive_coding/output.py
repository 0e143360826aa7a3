"""The energy at the clamped output: squared or cross-entropy, with a precision, perhaps nudged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from bpfree.errors import BpfreeError
from bpfree.step import Batch
from bpfree.tasks.task import TaskSpec

__all__ = ["Output"]


@dataclass(frozen=True)
class Output:
    """Energy of the last prediction u, per example.

    ``squared``: pi/2 |h - u|^2.  ``cross-entropy``: -pi sum h log softmax(u). The clamped h is the target, or, nudged with
    strength beta, p - beta (p - target), with p the initial prediction: u, or softmax(u).

    Attributes:
        kind: of energy.
        target: (N, C) what the output is clamped to.
        precision: pi.
        label: (N, C) the target before it was nudged; ``None``: it was not.
    """

    kind: Literal["squared", "cross-entropy"]
    target: Tensor
    precision: float = 1.0
    label: Tensor | None = None

    def nudged(self, scores: Tensor, beta: float) -> Output:
        """Return an output whose target is moved towards the initial prediction (beta < 1), or beyond it (beta < 0)."""
        made = self._prediction(scores)
        return replace(self, target=made.lerp(self.target.to(made.dtype), beta), label=self.target)

    def _prediction(self, scores: Tensor) -> Tensor:
        scores = scores.float() if scores.dtype.itemsize < 4 else scores
        return scores if self.kind == "squared" else scores.softmax(1)

    def error(self, scores: Tensor) -> Tensor:
        """Return (N, C) minus the energy's derivative by the scores, of each example."""
        made = self._prediction(scores)
        if self.kind == "cross-entropy":  # rows of soft or real targets need not sum to one
            made = made * self.target.sum(1, keepdim=True)
        error = self.target - made
        return error if self.precision == 1.0 else error * self.precision

    def energy(self, scores: Tensor) -> Tensor:
        """Return the energy, a mean over the examples, as a scalar."""
        return self._distance(scores, self.target) * self.precision

    def loss(self, scores: Tensor) -> Tensor:
        """Return the energy with precision one and without nudging: what back-propagation would descend."""
        return self._distance(scores, self.target if self.label is None else self.label)

    def _distance(self, scores: Tensor, target: Tensor) -> Tensor:
        scores = scores.float() if scores.dtype.itemsize < 4 else scores
        if self.kind == "squared":
            return 0.5 * (target - scores).square().sum() / len(scores)
        return -(target * F.log_softmax(scores, 1)).sum() / len(scores)


@dataclass(frozen=True)
class TaskOutput:
    """Energy of the last prediction by the task's own loss: pi times the loss of each example, for tasks whose loss is none of the above.

    Attributes:
        spec: whose ``loss`` and ``error`` are asked.
        batch: what is predicted.
        precision: pi.
    """

    spec: TaskSpec
    batch: Batch
    precision: float = 1.0

    def nudged(self, scores: Tensor, beta: float) -> TaskOutput:
        """Refuse to nudge: such a loss has no target that could be moved.

        Raises:
            BpfreeError: always.
        """
        raise BpfreeError(
            f"task {self.spec.name!r} has a loss of its own, whose target cannot be nudged", where="rule.nudge", fix="rule.nudge=none"
        )

    def error(self, scores: Tensor) -> Tensor:
        """Return minus the energy's derivative by the scores, of each example; of the scores' shape."""
        scores = scores.float() if scores.dtype.itemsize < 4 else scores
        return self.spec.error(scores, self.batch) * (-self.precision * len(scores))

    def energy(self, scores: Tensor) -> Tensor:
        """Return the energy, a mean over the examples, as a scalar."""
        return self.loss(scores) * self.precision

    def loss(self, scores: Tensor) -> Tensor:
        """Return the energy with precision one: what back-propagation would descend."""
        return self.spec.loss(scores.float() if scores.dtype.itemsize < 4 else scores, self.batch).detach()
