"""Forward-mode differentiation without torch's own warning."""

from __future__ import annotations

import functools
import warnings

import torch
from torch.autograd import forward_ad

__all__ = ["prepare"]


@functools.cache
def prepare() -> None:
    """Have torch load its decompositions for forward mode, which warns of a deprecated function of torch's own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        with forward_ad.dual_level():
            forward_ad.make_dual(torch.zeros(()), torch.zeros(()))
