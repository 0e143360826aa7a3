"""Common parts of networks from libraries of image models: size and colours of the images, and the cuts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.errors import UsageError
from bpfree.network.network import Network, evaluating
from bpfree.network.split import split
from bpfree.tasks.task import TaskSpec

__all__ = ["Resize", "image_shape", "split_model", "take_grey"]

REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)
"""What models raise for images of a size that they do not take."""


class Resize(nn.Module):
    """Resizes images to squares of ``size`` pixels, by bilinear interpolation.

    Args:
        size: of the result's sides.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def extra_repr(self) -> str:
        return f"{self.size}"

    def forward(self, x: Tensor) -> Tensor:
        """Resize (N, C, H, W) to (N, C, size, size)."""
        return F.interpolate(x, size=(self.size, self.size), mode="bilinear", align_corners=False)


def image_shape(spec: TaskSpec, library: str, size: int) -> tuple[int, int, int]:
    """Return channels, height and width of the model's input.

    Args:
        spec: of the task.
        library: for messages.
        size: to which images are resized; 0: they stay as they are.

    Raises:
        UsageError: the task has no images of one or three channels.
    """
    if len(spec.input_shape) != 3 or spec.input_shape[0] not in (1, 3):
        raise UsageError(
            f"{library}'s models take images of 1 or 3 channels, not inputs of shape {spec.input_shape}", fix="use network=mlp"
        )
    channels, height, width = spec.input_shape
    return (channels, size, size) if size else (channels, height, width)


def split_model(model: nn.Module, name: str, spec: TaskSpec, *, at: list[str], size: int, usual: int, smallest: int = 0) -> Network:
    """Make the model a network on the task's images, resized in its first block if ``size`` asks for it.

    Args:
        model: with as many outputs as the task has.
        name: of the model, for messages.
        spec: of the task.
        at: submodules that begin a block; none: one block per layer or residual block.
        size: see :func:`image_shape`.
        usual: pixels of the images for which the model was made.
        smallest: pixels below which it is known not to work; 0: not known.

    Raises:
        UsageError: it does not take images of this size, or cannot be split.
    """
    shape = image_shape(spec, name, size)
    problem = _problem(model, shape)
    if problem:
        least = f" of at least {smallest}x{smallest}" if smallest > min(shape[1:]) else ""
        raise UsageError(
            f"{name} cannot take an input of shape {shape}{': it takes images' if least else ''}{least}",
            where=problem,
            fix=f"network.image_size={usual} resizes the images in front of the model",
        )
    network = split(model, shape, at=at or None)
    if not size or shape == tuple(spec.input_shape):
        return network
    blocks = dict(network.blocks.items())
    first = network.names[0]
    blocks[first] = nn.Sequential(Resize(size), blocks[first])
    return Network(blocks, input_shape=spec.input_shape, readout=network.readout)


def _problem(model: nn.Module, shape: tuple[int, int, int]) -> str:
    """Return the model's error for an image of this shape; the empty string if it takes the image."""
    weight: Any = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), torch.zeros(()))
    try:
        with torch.no_grad(), evaluating(model):
            model(torch.zeros(1, *shape, device=weight.device, dtype=weight.dtype))
    except REFUSALS as error:
        first = next((line for line in str(error).splitlines() if line.strip()), "no message")
        return f"{type(error).__name__}: {first}"
    return ""


def take_grey(model: nn.Module) -> None:
    """Make the first convolution over three channels one over a single channel, in place: its kernels are summed over the colours."""
    first = next((part for part in model.modules() if isinstance(part, nn.Conv2d) and part.in_channels == 3), None)
    if first is None:
        raise UsageError(f"{type(model).__name__} has no convolution over colours that grey images could enter", fix="use another model")
    with torch.no_grad():
        first.weight = nn.Parameter(first.weight.sum(1, keepdim=True))
    first.in_channels = 1
