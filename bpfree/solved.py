"""Rules that solve for parameters in closed form, instead of descending towards them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bpfree.errors import BpfreeError
from bpfree.rule import Metrics, Rule, Traits, always
from bpfree.step import Batch, Budget, Phase, Step

__all__ = ["RidgeSums", "Solved"]


class Solved(Rule):
    """A rule that accumulates over the batches of a phase, and solves at its end.

    A subclass accumulates in :meth:`accumulate` into buffers, and writes parameters (under ``no_grad``) in :meth:`solve`, which is called
    at the end of each phase; in a stream that is the end of each stage, with what earlier stages have accumulated still there. By default
    a run is one pass over the training split. Both are timed, and their operations and memory counted, like the steps of any rule.
    """

    traits_of = always(Traits("upstream", downstream_weights=0, reverse_span=0, update="in-place"))

    @classmethod
    def optimizer_keys_of(cls, config: Any, network: Any = None) -> tuple[str, ...]:
        """Read no key of the optimiser: its settings, and a schedule, are refused."""
        return ()

    def phases(self, budget: Budget) -> Iterable[Phase]:
        """Return one phase of one pass."""
        return [Phase("accumulate", epochs=1)]

    @abstractmethod
    def accumulate(self, batch: Batch, step: Step) -> Metrics:
        """Add a batch's contribution to buffers; called under ``no_grad``. Returns detached scalars as metrics."""

    @abstractmethod
    def solve(self, step: Step) -> None:
        """Write the parameters that follow from what was accumulated; called under ``no_grad``."""

    @torch.no_grad()
    def learn(self, batch: Batch, step: Step) -> Metrics:
        """Accumulate the batch's sums."""
        return self.accumulate(batch, step)

    @torch.no_grad()
    def end_phase(self, phase: Phase, step: Step) -> None:
        """Solve for the parameters."""
        self.solve(step)

    def credit(self, batch: Batch, step: Step) -> Metrics:
        """Refuse credit: there are no gradients.

        Raises:
            BpfreeError: always.
        """
        raise BpfreeError(f"{type(self).__name__} solves in closed form, so it gives no gradients", fix="call learn, then end_phase")


class RidgeSums(nn.Module):
    """Hold the sums of a linear least-squares problem with a ridge penalty, over batches, in float64.

    Args:
        features: F, of a row.
        outputs: C, of a target.

    Attributes:
        gram: (F + 1, F + 1) sum of x x^T, with a one appended to x.
        cross: (F + 1, C) sum of x y^T.
        count: rows so far.
    """

    gram: Tensor
    cross: Tensor
    count: Tensor

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("gram", torch.zeros(features + 1, features + 1, dtype=torch.float64))
        self.register_buffer("cross", torch.zeros(features + 1, outputs, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def add(self, rows: Tensor, targets: Tensor) -> None:
        """Add rows (N, F) and their targets (N, C)."""
        x = torch.cat([rows.double(), rows.new_ones(len(rows), 1, dtype=torch.float64)], dim=1)
        self.gram.addmm_(x.T, x)
        self.cross.addmm_(x.T, targets.double())
        self.count += len(rows)

    @torch.no_grad()
    def solve(self, penalty: float) -> tuple[Tensor, Tensor]:
        """Return weight (C, F) and bias (C,) of the minimum of ``mean |W x + b - y|^2 + penalty |W|^2``, which leaves the bias free.

        Raises:
            BpfreeError: the sums are singular: no rows yet, or a penalty of 0 with features that depend on each other.
        """
        ridge = torch.eye(len(self.gram), dtype=torch.float64, device=self.gram.device) * penalty * self.count
        ridge[-1, -1] = 0
        factor, failed = torch.linalg.cholesky_ex(self.gram + ridge)
        if int(failed) or not int(self.count):
            what = "the least-squares problem has no single solution"
            raise BpfreeError(what, where=f"{int(self.count)} rows, penalty {penalty:g}", fix="give a penalty above 0, and rows")
        solution = torch.cholesky_solve(self.cross, factor)
        return solution[:-1].T.contiguous(), solution[-1]
