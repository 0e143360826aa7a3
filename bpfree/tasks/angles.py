"""The angle by which a picture of a digit was rotated, a real target: ``digits-angle`` and ``mnist-angle``.

Each picture is rotated about its centre by angles that are drawn uniformly. Pictures are divided into splits before they are rotated, and
the rotations of one picture are a group (``Split.groups``), so that no two splits have rotations of one picture.

Pixels outside of the largest disc in the frame are zero: the edges of a frame that turns with its picture give the angle away. A lattice
that turns does so too: on digits of 8x8 back-propagation has an error of 5.7 degrees, of 2.6 with the frame's edges, and of 2.9 where the
pixels are interpolated to 16x16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bpfree.options import option
from bpfree.tasks import vision
from bpfree.tasks.digits import DIGITS
from bpfree.tasks.task import DataSource, Split, TaskSpec

__all__ = ["DIGITS_ANGLE", "MNIST_ANGLE", "rotated"]

ROTATED_AT_ONCE = 4096


@dataclass
class AngleConfig:
    """The angles, and how often a training picture is rotated."""

    degrees: float = option(45.0, "largest angle, in both directions, in degrees", gt=0, le=180)
    rotations: int = option(1, "of each training picture, by angles of its own; of a test picture there is one", ge=1)
    angle_seed: int = option(0, "of the angles; independent of seed", ge=0)


@dataclass
class DigitsAngleConfig(AngleConfig):
    """Small pictures: four rotations of each."""

    rotations: int = option(4, "of each training picture, by angles of its own; of a test picture there is one", ge=1)
    size: Literal[8, 16, 32] = option(
        8, "pixels to a side; more than 8 are interpolated, for networks that need larger images, and show the lattice of the 8"
    )


def rotated(pictures: Tensor, angles: Tensor, size: int | None = None) -> Tensor:
    """Rotate pictures about their centres, with bilinear interpolation and zeros from outside.

    Args:
        pictures: (N, C, H, W), of any dtype; whole numbers are rounded.
        angles: (N,) in degrees, counter-clockwise.
        size: pixels to a side of what is returned, interpolated in the same step; ``None``: as large as they are.
    """
    if len(pictures) > ROTATED_AT_ONCE:
        parts = zip(pictures.split(ROTATED_AT_ONCE), angles.split(ROTATED_AT_ONCE), strict=True)
        return torch.cat([rotated(part, turned, size) for part, turned in parts])
    radians = angles.double() * (math.pi / 180)
    cosine, sine, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    # From where in the picture each pixel comes; rows count downwards.
    back = torch.stack([torch.stack([cosine, -sine, zero], 1), torch.stack([sine, cosine, zero], 1)], 1).float()
    height, width = pictures.shape[2:] if size is None else (size, size)
    grid = F.affine_grid(back, [len(pictures), 1, height, width], align_corners=False)
    made = F.grid_sample(pictures.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return made if pictures.is_floating_point() else made.round().to(pictures.dtype)


def inside(size: int, pixels: int) -> Tensor:
    """Tell which pixels (size, size) of a picture lie in the disc that touches the outermost of its original ``pixels`` to a side."""
    places = (torch.arange(size) + 0.5) * (pixels / size) - pixels / 2
    return places[:, None].square() + places.square() <= ((pixels - 1) / 2) ** 2


def spec(pictures: DataSource, name: str, config: AngleConfig, root: Path | None) -> TaskSpec:
    """Describe the rotated pictures; they are normalised as the upright ones are."""
    upright = pictures.spec(pictures.Config(), root)
    channels, height, width = upright.input_shape
    size = getattr(config, "size", None)
    shape = (channels, height, width) if size is None else (channels, size, size)
    return replace(upright, name=name, input_shape=shape, outputs=1, targets="real", class_names=())


def load(pictures: DataSource, config: AngleConfig, root: Path | None) -> tuple[Split, Split]:
    """Load pictures (N, C, H, W) and their angles (N, 1) in degrees; the test pictures are those of the upright set."""
    generator = torch.Generator().manual_seed(config.angle_seed)
    train, *_, test = (cast(Split, split).inputs for split in pictures.load(pictures.Config(), root))
    tested = _turned(test, 1, config, generator)
    learned = _turned(train, config.rotations, config, generator)
    return replace(learned, groups=cast(Tensor, learned.groups) + len(tested)), tested


def _turned(pictures: Tensor, times: int, config: AngleConfig, generator: torch.Generator) -> Split:
    count = len(pictures)
    angles = config.degrees * (2 * torch.rand(times, count, generator=generator, dtype=torch.float64) - 1)
    angles = angles.T.flatten()  # the first rotations are the same, however many there are
    made = rotated(pictures.repeat_interleave(times, 0), angles, getattr(config, "size", None))
    disc = inside(made.shape[2], pictures.shape[2]).to(made.dtype)
    return Split(made * disc, angles.float()[:, None], torch.arange(count).repeat_interleave(times))


def _source(pictures: DataSource, name: str, options: type[AngleConfig], summary: str) -> DataSource:
    def files(config: Any, root: Path | None) -> Sequence[Path]:
        return [] if pictures.files is None else pictures.files(pictures.Config(), root)

    return DataSource(partial(spec, pictures, name), partial(load, pictures), options, summary, files)


DIGITS_ANGLE = _source(
    DIGITS, "digits-angle", DigitsAngleConfig, "the angle within 45 degrees by which scikit-learn's digits were rotated, a real target"
)
MNIST_ANGLE = _source(
    vision.MNIST, "mnist-angle", AngleConfig, "the angle within 45 degrees by which MNIST's digits were rotated, a real target"
)
