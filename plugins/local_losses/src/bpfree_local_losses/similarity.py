"""Losses between the data's similarities to rows of a signal and the rows that should be most similar.

A batch of N examples has rows of the signal: one for each example, or one for each class that stands for all examples of the class. A row
that stands for ``counts`` equal ones counts as that number of rows in sums: with S the similarities of data and rows, and P_j the number of
positives that row j stands for,

    loss_i = sum_j P_ij (lse_i - S_ij),    lse_i = log sum_j counts_j exp(S_ij)

which is the loss over all N rows, whatever the loss's choice of positives, as long as the rows of a class are equal.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["Positives", "loss_of_rows", "positives"]

ROUNDING = 100
"""Similarities count as equal to the largest within this number of roundings, since those of equal rows may differ by a few."""
Positives = Literal["label-direct", "max-all", "max-rand", "top-k"]


def positives(kind: Positives, likeness: Tensor, counts: Tensor, k: int) -> Tensor:
    """Count the positives that each row of the signal has among all rows.

    Args:
        kind: ``max-all``: every row that is most similar; ``max-rand``: the first of these; ``top-k``: the k most similar ones.
            ``label-direct``: the row itself.
        likeness: (R, R) similarities of the rows in the layer below; that of a row with itself is on the diagonal.
        counts: (R,) how many equal rows each stands for; one that stands for none is never a positive.
        k: of ``top-k``; rows that are left over where there are fewer are not counted.

    Returns:
        (R, R), the positives of row i in column j.
    """
    if kind == "label-direct":
        return torch.eye(len(counts), dtype=counts.dtype, device=counts.device)
    likeness = likeness.masked_fill(counts == 0, -torch.inf)
    if kind == "max-all":
        most = likeness.amax(1, keepdim=True)
        return (likeness >= most - ROUNDING * torch.finfo(likeness.dtype).eps * most.abs()) * counts
    if kind == "max-rand":
        return torch.zeros_like(likeness).scatter_(1, likeness.argmax(1, keepdim=True), 1.0)
    order = likeness.argsort(dim=1, descending=True, stable=True)
    sorted_counts = counts[order]
    before = sorted_counts.cumsum(1) - sorted_counts
    return torch.zeros_like(likeness).scatter_(1, order, (k - before).clamp(min=0).minimum(sorted_counts))


def loss_of_rows(similarity: Tensor, wanted: Tensor, counts: Tensor, *, normalise: bool) -> Tensor:
    """Return the mean loss of data that should be similar to their positives.

    Args:
        similarity: (N, R) of data and rows of the signal.
        wanted: (N, R) how many positives each row stands for.
        counts: (R,) how many rows each stands for.
        normalise: divide each example's loss by the number of its positives.
    """
    loss = (wanted * (torch.logsumexp(similarity + counts.log(), 1, keepdim=True) - similarity)).sum(1)
    return (loss / wanted.sum(1) if normalise else loss).mean()
