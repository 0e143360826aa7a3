"""Augmentations: batched tensor operations whose draws are a pure function of (seed, epoch, sample index).

No generator is advanced: each number is a hash of what it is for. Hence neither the order of the examples, nor the
batch size, nor the number of workers changes what happens to an image, and an interrupted pass resumes exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bpfree.seeds import derive

__all__ = ["CROP", "FLIP", "Augmentation", "Draws"]

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # the constants of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), as signed
FIRST, SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
PADDING = 4


@dataclass(frozen=True, slots=True)
class Draws:
    """Random numbers of one batch, each a pure function of (seed, epoch, sample index, name).

    Attributes:
        seed, epoch: of the run, and passes begun before this one.
        indices: (N,) int64 positions of the examples in their split, on the images' device.
    """

    seed: int
    epoch: int
    indices: Tensor

    def uniform(self, name: str, count: int = 1) -> Tensor:
        """(N, count) float32 numbers, uniform on the multiples of 2**-24 in [0, 1); the same on every device."""
        key = derive(self.seed, "augment", self.epoch, name)
        columns = torch.arange(count, device=self.indices.device)
        rows = _mix((self.indices + 1) * GOLDEN + key)
        bits = _mix(rows.unsqueeze(1) + (columns + 1) * GOLDEN)
        return _shift(bits, 40).float() * 2.0**-24


@dataclass(frozen=True)
class Augmentation:
    """A registered augmentation.

    Attributes:
        apply: ``(images, targets, draws)`` to images and targets of the same batch: raw images (N, C, H, W), before
            normalisation; targets may become soft (N, classes). It writes into neither.
        summary: one line for listings.
    """

    apply: Callable[[Tensor, Tensor | None, Draws], tuple[Tensor, Tensor | None]]
    summary: str = ""


def flip(images: Tensor, targets: Tensor | None, draws: Draws) -> tuple[Tensor, Tensor | None]:
    """Mirror each image left to right with probability 1/2."""
    mirrored = draws.uniform("flip").view(-1, 1, 1, 1) < 0.5
    return torch.where(mirrored, images.flip(3), images), targets


def crop(images: Tensor, targets: Tensor | None, draws: Draws) -> tuple[Tensor, Tensor | None]:
    """Pad each side by 4 zero pixels, then cut a window of the original size at a uniform place."""
    count, channels, height, width = images.shape
    corner = (draws.uniform("crop", 2) * (2 * PADDING + 1)).long()
    padded = F.pad(images, (PADDING,) * 4)
    rows = corner[:, :1] + torch.arange(height, device=images.device)
    columns = corner[:, 1:] + torch.arange(width, device=images.device)
    places = (rows.unsqueeze(2) * padded.shape[3] + columns.unsqueeze(1)).view(count, 1, height * width)
    return padded.flatten(2).gather(2, places.expand(-1, channels, -1)).view_as(images), targets


def _shift(bits: Tensor, by: int) -> Tensor:
    """Logical right shift of int64 (torch's keeps the sign)."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _mix(z: Tensor) -> Tensor:
    """The finaliser of splitmix64: a bijection of int64 that spreads consecutive numbers over all bits."""
    z = (z ^ _shift(z, 30)) * FIRST
    z = (z ^ _shift(z, 27)) * SECOND
    return z ^ _shift(z, 31)


FLIP = Augmentation(flip, "mirror left to right with probability 1/2")
CROP = Augmentation(crop, "pad by 4 zero pixels, then a random crop of the original size")
