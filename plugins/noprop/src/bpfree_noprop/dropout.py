"""Dropout whose masks can be drawn from a given generator, so that they do not depend on what else draws in the process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["KeyedDropout", "keyed", "masks_from"]


class KeyedDropout(nn.Dropout):
    """``nn.Dropout`` that draws from ``generator`` while it has one (:func:`masks_from`), and from torch's global one otherwise.

    A mask is drawn in the order in which its input lies in memory: equal layouts get equal masks.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p)
        self.generator: torch.Generator | None = None

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0 or self.generator is None:
            return super().forward(input)
        return input * mask(input, self.p, self.generator)


def keyed(module: nn.Module) -> nn.Module:
    """Replace the ``nn.Dropout`` in a module by :class:`KeyedDropout`, which has no state either; returns the module.

    Other kinds (functional dropout, whole channels, dropped paths) keep drawing from torch's global generator.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Dropout:
                setattr(parent, name, KeyedDropout(child.p))
    return KeyedDropout(module.p) if type(module) is nn.Dropout else module


def mask(like: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """Draw ``1 / (1-p)`` with probability ``1-p``, else 0, in the shape, type, device and layout of ``like``."""
    # a comparison with uniform numbers takes a third of the time of torch's bernoulli_ on a CPU
    drawn = torch.empty_like(like, dtype=torch.float32, requires_grad=False).uniform_(generator=generator)
    return drawn.ge_(p).div_(1 - p).to(like.dtype)


# Generators cannot be compiled: a compiled block is cut here. As torch.compiler.disable does, which would load the compiler now.
mask._torchdynamo_disable = True  # type: ignore[attr-defined]


@contextmanager
def masks_from(generator: torch.Generator, dropouts: Sequence[KeyedDropout]) -> Iterator[None]:
    """Draw the masks of these modules from ``generator`` inside, one after the other."""
    for dropout in dropouts:
        dropout.generator = generator
    try:
        yield
    finally:
        for dropout in dropouts:
            dropout.generator = None
