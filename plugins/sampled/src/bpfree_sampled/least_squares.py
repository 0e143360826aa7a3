"""Linear least squares over batches of rows, by sequential QR: one pass, memory that does not grow with the rows.

Normal equations would square the condition number, and lose half of the digits. Golub, Van Loan: Matrix Computations, 4th ed., 2013,
section 5.3; Golub, Heath, Wahba: Generalized cross-validation as a method for choosing a good ridge parameter, Technometrics 21, 1979.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from bpfree import BpfreeError

__all__ = ["Decomposition", "QRSums"]

LEAST_ROWS = 4096


class QRSums(nn.Module):
    """Hold the triangular factor of a least-squares problem ``[1 | A | Y]``, to which rows are added.

    Args:
        features: F, columns of A.
        outputs: C, columns of Y.
        constant: whether there is the column of ones, which takes the mean out of all others.
        dtype: of the factor.

    Attributes:
        factor: (K, K) upper triangular, K = constant + F + C.
        count: rows so far.
    """

    factor: Tensor
    count: Tensor

    def __init__(self, features: int, outputs: int, *, constant: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.features, self.outputs, self.constant = features, outputs, constant
        size = constant + features + outputs
        self.register_buffer("factor", torch.zeros(size, size, dtype=dtype))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @property
    def rows_at_once(self) -> int:
        """Rows that are best added together: enough for the factor, which is decomposed with them each time, to weigh little."""
        return max(LEAST_ROWS, 4 * len(self.factor))

    @torch.no_grad()
    def add(self, rows: Tensor, targets: Tensor) -> None:
        """Add rows (N, F) and their targets (N, C)."""
        factor, size = self.factor, len(self.factor)
        start = min(int(self.count), size)  # the factor has no more rows than there were
        stacked = torch.empty(start + len(rows), size, dtype=factor.dtype, device=factor.device)
        stacked[:start] = factor[:start]
        new, first = stacked[start:], int(self.constant)
        new[:, :first] = 1
        new[:, first : first + self.features] = rows
        new[:, first + self.features :] = targets
        made = torch.linalg.qr(stacked, mode="r").R
        factor.zero_()
        factor[: len(made)] = made
        self.count += len(rows)

    def clear(self) -> None:
        """Forget all rows."""
        self.factor.zero_()
        self.count.zero_()

    @torch.no_grad()
    def decompose(self) -> Decomposition:
        """Decompose the centred problem by singular values.

        Raises:
            BpfreeError: there are no rows, or one of their numbers is not finite.
        """
        if not bool(self.factor.isfinite().all()):
            fix = "look for NaN in the data, and for units that overflow"
            raise BpfreeError("a row of the least-squares problem is not finite", where="QRSums", fix=fix)
        if not int(self.count):
            raise BpfreeError("a least-squares problem without rows has no solution", where="QRSums", fix="add rows first")
        first, last = int(self.constant), int(self.constant) + self.features
        left, sizes, right = torch.linalg.svd(self.factor[first:last, first:last])
        means = torch.zeros(self.features + self.outputs, dtype=self.factor.dtype, device=self.factor.device)
        if self.constant:
            means = self.factor[0, 1:] / self.factor[0, 0]
        rest = self.factor[last:, last:].square().sum(0)
        turned = left.T @ self.factor[first:last, last:]
        return Decomposition(right, sizes, turned, rest, means[: self.features], means[self.features :], int(self.count), self.constant)


class Decomposition:
    """One decomposition of a least-squares problem, which solves it for all penalties.

    ``min sum |W a + b - y|^2 + n penalty |W|^2`` over n rows. Singular values below ``cutoff`` of the largest are left out.
    """

    def __init__(
        self, right: Tensor, sizes: Tensor, turned: Tensor, rest: Tensor, mean: Tensor, target_mean: Tensor, count: int, constant: bool
    ) -> None:
        self._right, self._sizes, self._turned, self._rest = right, sizes, turned, rest
        self._mean, self._target_mean, self._count, self._constant = mean, target_mean, count, constant

    def _kept(self, cutoff: float) -> Tensor:
        return (self._sizes > cutoff * self._sizes[0]) & (self._sizes > 0)

    def _shrink(self, penalty: float, cutoff: float) -> Tensor:
        """Return by how much each singular direction of the targets is kept: s^2 / (s^2 + n penalty)."""
        squares = self._sizes.square()
        share = squares / (squares + self._count * penalty).clamp_min(torch.finfo(squares.dtype).tiny)
        return torch.where(self._kept(cutoff), share, 0.0)

    def solve(self, penalty: float, cutoff: float) -> tuple[Tensor, Tensor]:
        """Return weight (C, F) and bias (C,); the bias is 0 where there is no column of ones."""
        factors = self._shrink(penalty, cutoff) / self._sizes.clamp_min(torch.finfo(self._sizes.dtype).tiny)
        weight = (self._right.T @ (factors[:, None] * self._turned)).T.contiguous()
        return weight, self._target_mean - weight @ self._mean

    def generalised(self, penalties: Sequence[float], cutoff: float) -> list[float]:
        """Return the generalised cross-validation error of each penalty: ``n sum r^2 / (n - degrees of freedom)^2``, from sums alone."""
        found = []
        for penalty in penalties:
            share = self._shrink(penalty, cutoff)
            squares = float(self._rest.sum() + ((1 - share)[:, None] * self._turned).square().sum())
            free = self._count - int(self._constant) - float(share.sum())
            found.append(self._count * squares / free**2 if free > 0 else float("inf"))
        return found

    def left_out(self, parts: Iterator[tuple[Tensor, Tensor]], penalties: Sequence[float], cutoff: float) -> list[float]:
        """Return the mean squared error of each row, by the solution of all others, for each penalty: exactly, without solving again.

        The residual of a row that is left out is r_i / (1 - h_i), with its leverage h_i (Allen's PRESS).

        Args:
            parts: the rows (N, F) and targets (N, C) that were added, once more, in parts.
            penalties: to try.
            cutoff: of singular values.
        """
        shares = torch.stack([self._shrink(penalty, cutoff) for penalty in penalties], 1)  # (F, P)
        below = torch.where(self._kept(cutoff), self._sizes, 1.0)[:, None]  # what is left out has no share
        sums = torch.zeros(len(penalties), dtype=self._sizes.dtype, device=self._sizes.device)
        for rows, targets in parts:
            turned = (rows.to(below) - self._mean) @ self._right.T / below.T  # rows of the left singular vectors
            leverage = turned.square() @ shares + int(self._constant) / self._count
            for place in range(len(penalties)):
                residual = targets.to(below) - self._target_mean - (turned * shares[:, place]) @ self._turned
                sums[place] += (residual / (1 - leverage[:, place]).clamp_min(CLOSE_TO_ONE)[:, None]).square().sum()
        return (sums / self._count).tolist()  # type: ignore[no-any-return]


CLOSE_TO_ONE = 1e-10
"""A row whose leverage is 1 decides its own prediction; without it, there is none."""
