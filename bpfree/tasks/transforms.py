"""The transforms of ``torchvision.transforms.v2`` as augmentations, by name, with torchvision's own options.

A transform draws from torch's global generators. Here it is called image by image, with the generators seeded for each from (seed,
epoch, sample index): what happens to an image depends neither on its batch nor on how it is loaded, and a run resumes exactly. That
costs a call for each image, some 20 to 200 microseconds; ``flip`` and ``crop`` work on whole batches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bpfree.devices import preserved_global_state, seed_global
from bpfree.errors import UsageError
from bpfree.tasks.augment import Augmentation, Draws

__all__ = ["TRANSFORMS"]

CLASSES = {
    "aug-mix": "AugMix",
    "auto-augment": "AutoAugment",
    "color-jitter": "ColorJitter",
    "elastic-transform": "ElasticTransform",
    "gaussian-blur": "GaussianBlur",
    "rand-augment": "RandAugment",
    "random-adjust-sharpness": "RandomAdjustSharpness",
    "random-affine": "RandomAffine",
    "random-autocontrast": "RandomAutocontrast",
    "random-channel-permutation": "RandomChannelPermutation",
    "random-crop": "RandomCrop",
    "random-equalize": "RandomEqualize",
    "random-erasing": "RandomErasing",
    "random-grayscale": "RandomGrayscale",
    "random-horizontal-flip": "RandomHorizontalFlip",
    "random-invert": "RandomInvert",
    "random-perspective": "RandomPerspective",
    "random-photometric-distort": "RandomPhotometricDistort",
    "random-posterize": "RandomPosterize",
    "random-resized-crop": "RandomResizedCrop",
    "random-rotation": "RandomRotation",
    "random-solarize": "RandomSolarize",
    "random-vertical-flip": "RandomVerticalFlip",
    "trivial-augment-wide": "TrivialAugmentWide",
}
"""Names, and torchvision's classes."""
WHITE = 255.0


def made(kind: str, given: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    """Make a transform of torchvision.

    Raises:
        UsageError: it takes other options, or other values.
    """
    from torchvision.transforms import v2

    found = getattr(v2, kind, None)
    if found is None:
        raise UsageError(f"this torchvision has no {kind}", where="task.augment", fix="install a newer torchvision")
    known = [name for name in inspect.signature(found).parameters if name != "self"]
    if unknown := [name for name in given if name not in known]:
        raise UsageError(f"unknown option {unknown[0]}: known here: {', '.join(known)}", where="task.augment")
    try:
        return found(**given)  # type: ignore[no-any-return]
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"torchvision refuses these options: {error}", where="task.augment", fix=f"see its {kind}") from error


def transformed(name: str, images: Tensor, targets: Tensor | None, draws: Draws) -> tuple[Tensor, Tensor | None]:
    """Apply the transform in ``draws.options`` to each image, with the generators seeded for it.

    torchvision takes pixels as uint8, or as floats from 0 to 1: others are brought there and back by the task's scale.
    """
    scale = (draws.spec.scale if draws.spec is not None else None) or 1.0
    pixels = images
    if not images.is_floating_point():
        pixels = images.to(torch.uint8) if scale == WHITE or images.dtype == torch.uint8 else images.float() / scale
    elif scale != 1:
        pixels = images / scale
    with preserved_global_state(draws.device):
        done = [_one(draws.options, image, seed) for image, seed in zip(pixels, draws.seeds(name), strict=True)]
    wrong = next((image for image in done if image.shape != images.shape[1:]), None)
    if wrong is not None:
        return wrong.expand(len(images), *wrong.shape), targets  # refused by the caller, with both shapes
    result = torch.stack(done)
    if result.dtype == torch.uint8:
        return result.to(images.dtype), targets
    result = result * scale if scale != 1 else result
    return (result if images.is_floating_point() else result.round()).to(images.dtype), targets


def _one(transform: Callable[[Tensor], Tensor], image: Tensor, seed: int) -> Tensor:
    seed_global(seed, image.device)
    return transform(image)


def _of(name: str, kind: str) -> Augmentation:
    return Augmentation(partial(transformed, name), f"torchvision.transforms.v2.{kind}, with its options", partial(made, kind), images=True)


TRANSFORMS = {name: _of(name, kind) for name, kind in CLASSES.items()}
