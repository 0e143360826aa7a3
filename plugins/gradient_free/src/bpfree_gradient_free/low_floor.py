"""Small tasks on which linear readouts, of inputs or of a few untrained features, are near chance: ``two-spirals`` and ``parity``.

On digits a converged readout of random features is above most swarms. Here it has little to offer, so that a rule shows what it learned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from bpfree import DataSource, Split, TaskSpec, option

__all__ = ["PARITY", "TWO_SPIRALS", "ParityConfig", "SpiralsConfig"]

TRAIN, TEST = 1440, 720


@dataclass
class SpiralsConfig:
    """The spirals."""

    turns: float = option(2.0, "turns of each spiral", gt=0)
    noise: float = option(0.03, "deviation of the points from their spiral, whose radius grows from 0 to 1", ge=0)


def spirals_spec(config: SpiralsConfig, root: Path | None) -> TaskSpec:
    """Describe points in the plane; their deviation is about one half."""
    return TaskSpec("two-spirals", (2,), 2, scale=1.0, std=(0.5,))


def spirals(config: SpiralsConfig, count: int, seed: int) -> Split:
    """Draw points of two spirals that are rotated by half a turn against each other, evenly along the turn."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % 2
    place = 0.05 + 0.95 * torch.rand(count, generator=generator)
    angle = 2 * math.pi * config.turns * place + math.pi * targets
    points = place[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return Split(points + config.noise * torch.randn(count, 2, generator=generator), targets)


@dataclass
class ParityConfig:
    """The bits."""

    bits: int = option(3, "bits whose parity is the class", ge=2, le=16)
    noise: float = option(0.2, "deviation of the inputs from -1 and 1", ge=0)


def parity_spec(config: ParityConfig, root: Path | None) -> TaskSpec:
    """Describe vectors of noisy bits."""
    return TaskSpec("parity", (config.bits,), 2, scale=1.0)


def parity(config: ParityConfig, count: int, seed: int) -> Split:
    """Draw bits, each -1 or 1 with noise; the class is whether the number of ones is odd."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(2, (count, config.bits), generator=generator)
    return Split(2.0 * bits - 1 + config.noise * torch.randn(count, config.bits, generator=generator), bits.sum(1) % 2)


def _load_spirals(config: SpiralsConfig, root: Path | None) -> tuple[Split, Split]:
    return spirals(config, TRAIN, 0), spirals(config, TEST, 1)


def _load_parity(config: ParityConfig, root: Path | None) -> tuple[Split, Split]:
    return parity(config, TRAIN, 0), parity(config, TEST, 1)


TWO_SPIRALS = DataSource(spirals_spec, _load_spirals, SpiralsConfig, "points of two spirals in the plane, made up (2 classes)")
PARITY = DataSource(parity_spec, _load_parity, ParityConfig, "parity of a few noisy bits, made up (2 classes)")
