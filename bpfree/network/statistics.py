"""Running statistics of batch norms, filled without training: one pass over some inputs, each example counting the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from bpfree.network.closed_form import is_batch_norm

__all__ = ["cumulative_statistics"]


@contextmanager
def cumulative_statistics(module: nn.Module) -> Iterator[bool]:
    """Let the batch norms of a module take new running statistics: the plain mean over all batches that they see inside.

    Everything else stays in the mode that it is in; modes and momenta come back at the end.

    Yields:
        Whether there are any.
    """
    norms: list[Any] = [part for part in module.modules() if is_batch_norm(part) and getattr(part, "track_running_stats", False)]
    before = [(norm.momentum, norm.training) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    try:
        yield bool(norms)
    finally:
        for norm, (momentum, training) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.train(training)
