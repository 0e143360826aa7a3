"""Running statistics and other buffers: left alone by extra passes, or filled by one pass over some inputs without training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from bpfree.network.closed_form import is_batch_norm

__all__ = ["cumulative_statistics", "kept_buffers"]


@contextmanager
def kept_buffers(module: nn.Module) -> Iterator[None]:
    """Restore the module's buffers after the passes inside: running statistics, counters and states.

    The passes work on copies, so that graphs made before stay valid, as do those made inside. Outputs are those of an ordinary pass.

    Args:
        module: a network, a block or a layer.
    """
    copies: dict[int, Tensor] = {}
    before = [(part, name, buffer) for part in module.modules() for name, buffer in part._buffers.items() if buffer is not None]
    for part, name, buffer in before:
        if id(buffer) not in copies:
            copies[id(buffer)] = buffer.clone()
        part._buffers[name] = copies[id(buffer)]
    try:
        yield
    finally:
        for part, name, buffer in before:
            part._buffers[name] = buffer


@contextmanager
def cumulative_statistics(module: nn.Module) -> Iterator[bool]:
    """Let a module's batch norms compute new running statistics: the plain mean over all batches inside.

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
