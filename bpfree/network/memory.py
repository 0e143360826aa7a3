"""Refusal of networks that cannot fit the memory, before they are made and end the process."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bpfree.errors import UsageError
from bpfree.network.network import Network

__all__ = ["built"]

SMALL = 2**28
"""Bytes of new tensors above which a network's size is determined before it is made."""


class _Large(Exception):
    """The network is larger than a small one."""


class _Counting(TorchDispatchMode):
    """Counts the elements of new tensors, before they are made."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], (list, tuple)) and all(isinstance(size, int) for size in args[0]):  # a new tensor's shape
            self.count += math.prod(args[0])
            if self.count > SMALL / 4:
                raise _Large
        return function(*args, **(kwargs or {}))


def built(build: Callable[[], Network], *, copies: int, free: Callable[[], Mapping[str, int]]) -> Network:
    """Make a network if its memory suffices.

    Args:
        build: makes it; called again, with the same state of torch's global generator, where the network is large.
        copies: of each parameter that training will hold on its device, such as 2 for weights and gradients.
        free: bytes of the memory that it is made in, and of its device's, which is the first, by their names.

    Raises:
        UsageError: the parameters would take more than that, or no tensor can have such a size.
    """
    random = torch.get_rng_state()
    try:
        with _Counting():
            return build()
    except _Large:
        needed = _bytes_of(build)
        for place, available in free().items():
            if needed * copies > available:
                what = f"the network's parameters{' and their gradients' if copies > 1 else ''} take {_gib(needed * copies)}"
                found = f"{what}, and {_gib(available)} of {place} are free"
                raise UsageError(found, where="network", fix="choose smaller sizes") from None
            copies = 1
    torch.set_rng_state(random)
    return build()


def _bytes_of(build: Callable[[], Network]) -> int:
    """Count the bytes of the parameters, without making them; 0 where that is not possible."""
    try:
        with torch.device("meta"):
            return sum(p.numel() * p.element_size() for p in build().parameters())
    except UsageError:
        return 0  # the builder will raise it again
    except Exception as error:
        if "overflow" in str(error):
            raise UsageError(
                "the network would have tensors larger than any memory", where="network", fix="choose smaller sizes"
            ) from error
        return 0  # its builder needs values


def _gib(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"
