"""Augmentations that mix the examples of a batch, with a partner that is drawn for each by hash: mixup and cutmix.

What an example draws is a function of (seed, epoch, sample index), and its partner a place in the batch: who that is depends on the
order and the batch size, as it does in every implementation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bpfree.options import option
from bpfree.tasks.augment import Augmentation, Draws, options_of

__all__ = ["CUTMIX", "MIXUP"]


@dataclass
class MixConfig:
    """The strength of the mixing."""

    alpha: float = option(1.0, "of the Beta(alpha, alpha) distribution of an example's own share; 1: uniform", gt=0, le=100)


def mixup(images: Tensor, targets: Tensor | None, draws: Draws) -> tuple[Tensor, Tensor | None]:
    """Average each image with a partner's, and their labels likewise (Zhang et al. 2018, "mixup: beyond empirical risk minimization").

    Integer pixels are rounded to the nearest.
    """
    share, partners = _shares(draws, "mixup"), draws.partners("mixup partner")
    weight = share.view(-1, *(1,) * (images.dim() - 1))
    whole = not images.is_floating_point()
    working = images.float() if whole else images
    mixed = weight.to(working.dtype) * working + (1 - weight).to(working.dtype) * working[partners]
    return mixed.round().to(images.dtype) if whole else mixed, _mixed_labels(targets, share, partners, draws)


def cutmix(images: Tensor, targets: Tensor | None, draws: Draws) -> tuple[Tensor, Tensor | None]:
    """Paste a rectangle of a partner's image into each, and mix the labels by area (Yun et al. 2019, "CutMix", equation 1).

    The rectangle has the image's proportions and a uniform centre; what lies beyond the edge is cut off, and does not count.
    """
    height, width = images.shape[-2:]
    share, partners = _shares(draws, "cutmix"), draws.partners("cutmix partner")
    side, centre = (1 - share).sqrt(), draws.uniform("cutmix centre", 2)
    inside = _within(height, centre[:, 0], side)[:, :, None] & _within(width, centre[:, 1], side)[:, None, :]
    kept = 1 - inside.flatten(1).float().mean(1)
    return torch.where(inside[:, None], images[partners], images), _mixed_labels(targets, kept, partners, draws)


def _within(size: int, centre: Tensor, side: Tensor) -> Tensor:
    """Return (N, size), true for rows or columns in an interval of length ``side * size`` around ``centre * size``, in whole pixels."""
    middle, half = (centre * size).floor(), ((side * size).floor() / 2).floor()
    places = torch.arange(size, device=centre.device)
    return (places >= (middle - half)[:, None]) & (places < (middle + half)[:, None])


def _mixed_labels(targets: Tensor | None, share: Tensor, partners: Tensor, draws: Draws) -> Tensor | None:
    """Return soft labels (N, classes): ``share`` of an example's own, the rest of its partner's."""
    if targets is None:
        return None
    assert draws.spec is not None
    rows = F.one_hot(targets, draws.spec.outputs).float() if targets.dim() == 1 else targets.float()
    return share[:, None] * rows + (1 - share)[:, None] * rows[partners]


def _shares(draws: Draws, name: str) -> Tensor:
    """Draw (N,) numbers from Beta(alpha, alpha): the quantile function at a uniform number of each example."""
    uniform, alpha = draws.uniform(name)[:, 0], draws.options.alpha
    if alpha == 1:
        return uniform
    from scipy.special import betaincinv

    return torch.from_numpy(betaincinv(alpha, alpha, uniform.cpu().double().numpy())).float().to(draws.device)


MIXUP = Augmentation(mixup, "averages of two images and their labels; alpha", options_of(MixConfig), mixes=True, images=True)
CUTMIX = Augmentation(cutmix, "a rectangle of another image, labels by area; alpha", options_of(MixConfig), mixes=True, images=True)
