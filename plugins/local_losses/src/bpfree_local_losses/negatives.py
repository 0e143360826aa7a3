"""Negative examples of forward-forward: wrong labels, wrong labels that the network finds likely, and mixtures of two images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["hard_labels", "hybrids", "mixing_masks", "wrong_labels"]


def wrong_labels(targets: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    """Draw for each example (N,) one of the classes that it does not have, all alike."""
    shift = torch.randint(1, max(classes, 2), targets.shape, generator=generator, device=generator.device)
    return (targets + shift.to(targets.device)) % classes


def hard_labels(targets: Tensor, scores: Tensor, generator: torch.Generator) -> Tensor:
    """Draw for each example (N,) one of the classes that it does not have, with the probabilities that a classifier gives them.

    Args:
        targets: (N,) classes.
        scores: (N, C) logits.
        generator: of the draws.
    """
    uniform = torch.rand(scores.shape, generator=generator, device=generator.device).to(scores.device)
    gumbel = -(-uniform.clamp_min(1e-20).log()).log()  # the largest of logits with this noise is a draw, and NaN needs no care
    noisy = scores.float() + gumbel
    return noisy.scatter(1, targets[:, None], -torch.inf).argmax(1)


def mixing_masks(count: int, shape: Sequence[int], blurs: int, generator: torch.Generator) -> Tensor:
    """Draw masks of zeros and ones with large regions of each: random bits, blurred again and again, then cut at one half.

    Args:
        count: of masks.
        shape: of an input. All channels of an image share a mask; inputs that are no images get random bits.
        blurs: how often the filter (1/4, 1/2, 1/4) is applied along both axes.
        generator: of the bits.

    Returns:
        (count, *shape), or (count, 1, H, W) for images.
    """
    if len(shape) != 3:
        return torch.randint(0, 2, (count, *shape), generator=generator, device=generator.device).float()
    bits = torch.randint(0, 2, (count, 1, *shape[1:]), generator=generator, device=generator.device).float()
    row = torch.tensor([0.25, 0.5, 0.25], device=bits.device)
    for _ in range(blurs):
        for kernel, sides in ((row.view(1, 1, 1, 3), (1, 1, 0, 0)), (row.view(1, 1, 3, 1), (0, 0, 1, 1))):
            bits = F.conv2d(F.pad(bits, sides, mode="replicate"), kernel)
    return (bits > 0.5).float()


def hybrids(inputs: Tensor, blurs: int, generator: torch.Generator) -> Tensor:
    """Mix each input (N, ...) with another one of the batch, region by region; a batch of one is returned as it is."""
    if len(inputs) == 1:
        return inputs
    shift = torch.randint(1, len(inputs), (1,), generator=generator, device=generator.device).to(inputs.device)
    others = inputs[(torch.arange(len(inputs), device=inputs.device) + shift) % len(inputs)]
    mask = mixing_masks(len(inputs), inputs.shape[1:], blurs, generator).to(inputs)
    return mask * inputs + (1 - mask) * others
