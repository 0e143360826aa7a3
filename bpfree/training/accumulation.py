"""Accumulation: one step from several micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bpfree.rule import Metrics, Rule
from bpfree.step import Batch, Step

__all__ = ["accumulate", "gather", "slices"]


def accumulate(rule: Rule, batch: Batch, step: Step, parts: int, *, rank: int = 0, size: int = 1) -> Metrics:
    """Return the metrics of one step from ``parts`` micro-batches.

    The step equals the large batch's for rules whose credit is a mean over examples.
    """
    metrics = gather(rule.credit, rule, batch, step, parts, rank=rank, size=size)
    step.apply()
    return metrics


def gather(
    credit: Callable[[Batch, Step], Metrics], rule: Rule, batch: Batch, step: Step, parts: int, *, rank: int = 0, size: int = 1
) -> Metrics:
    """Fill ``.grad`` from ``parts`` micro-batches: each contribution scaled by its share of the batch.

    Args:
        credit: adds to ``.grad`` of the rule's parameters.
        rule: whose parameters these are.
        batch: the whole.
        step: handed to ``credit``, with its ``part`` set.
        parts: as many micro-batches in each process, if the batch has two examples for each.
        rank, size: of this process, which takes only its own micro-batches.

    Returns:
        Means of the metrics over the batch; of several processes, the sum of what they return.
    """
    if parts * size == 1:
        return credit(batch, step)
    total = len(batch)
    sums: Metrics = {}
    parameters = list(rule.parameters())
    for part, (start, end) in slices(total, parts, rank=rank, size=size).items():
        step.part = part
        micro = _part(batch, start, end)
        share = len(micro) / total
        before = [p.grad for p in parameters if p.grad is not None]
        if before:  # so that scaling the sum afterwards leaves what was there
            torch._foreach_mul_(before, 1 / share)
        for name, value in credit(micro, step).items():
            sums[name] = sums[name] + value * share if name in sums else value * share
        after = [p.grad for p in parameters if p.grad is not None]
        if after:
            torch._foreach_mul_(after, share)
    step.part = 0
    return sums


def _part(batch: Batch, start: int, end: int) -> Batch:
    """Cut some consecutive examples out of a batch."""

    def cut(tree: Any) -> Any:
        return None if tree is None else torch.utils._pytree.tree_map(lambda leaf: leaf[start:end], tree)

    views = tuple(map(cut, batch.views))
    inputs = views[0] if views else cut(batch.inputs)
    return Batch(inputs, cut(batch.targets), views, cut(batch.indices))


def slices(total: int, parts: int, *, rank: int = 0, size: int = 1) -> dict[int, tuple[int, int]]:
    """Return the first and last (exclusive) example of each micro-batch of one of several processes, by the micro-batch's number.

    There are ``parts`` for each process, but none of a single example, which batch norm cannot normalise; so there may be none.
    """
    count = min(parts * size, max(1, total // 2))
    bounds = [round(part * total / count) for part in range(count + 1)]
    return {part: (bounds[part], bounds[part + 1]) for part in range(rank * count // size, (rank + 1) * count // size)}
