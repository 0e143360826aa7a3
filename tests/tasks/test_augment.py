"""Augmentations. Oracles: Kolmogorov-Smirnov and chi-squared tests, splitmix64 in Python integers, a loop over single images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from bpfree.plugins import installed_plugins
from bpfree.seeds import derive
from bpfree.tasks.augment import CROP, FLIP, Augmentation, Draws

MASK = 2**64 - 1


def draws(count: int, *, seed: int = 0, epoch: int = 0, device: torch.device | None = None) -> Draws:
    return Draws(seed, epoch, torch.arange(count, device=device))


def splitmix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_the_numbers_are_those_of_splitmix64_in_exact_integers(device: torch.device) -> None:
    made = draws(5, seed=9, epoch=3, device=device).uniform("name", 2).cpu()
    key, golden = derive(9, "augment", 3, "name"), 0x9E3779B97F4A7C15
    for index in range(5):
        row = splitmix(((index + 1) * golden + key) & MASK)
        for column in range(2):
            assert made[index, column].item() == (splitmix((row + (column + 1) * golden) & MASK) >> 40) / 2**24


def test_the_finaliser_is_the_published_splitmix64() -> None:
    """First outputs for seed 1234567, as in Vigna's reference implementation's test vectors (Rosetta Code, Splitmix64)."""
    state, outputs = 1234567, []
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        outputs.append(splitmix(state))
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_draws_are_uniform_and_independent() -> None:
    made = draws(50_000).uniform("a", 2).double().numpy()
    assert made.min() >= 0
    assert made.max() < 1
    for column in made.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
        assert stats.kstest(column[:-1] + column[1:], stats.triang(0.5, scale=2).cdf).pvalue > 1e-3  # consecutive examples
    others = [draws(50_000).uniform("b"), draws(50_000, epoch=1).uniform("a"), draws(50_000, seed=1).uniform("a")]
    for other in [made[:, 1], *(column.flatten().double().numpy() for column in others)]:
        assert abs(np.corrcoef(made[:, 0], other)[0, 1]) < 4 / 50_000**0.5
        table, *_ = np.histogram2d(made[:, 0], other, bins=8)
        assert stats.chi2_contingency(table).pvalue > 1e-3


def test_draws_depend_on_the_example_and_not_on_its_company() -> None:
    everything = draws(100).uniform("crop", 2)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(everything[order], Draws(0, 0, order).uniform("crop", 2))
    assert torch.equal(everything[40:43], Draws(0, 0, torch.arange(40, 43)).uniform("crop", 2))
    assert torch.equal(everything[:, :1], draws(100).uniform("crop", 1))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_flip_mirrors_single_images(dtype: torch.dtype, device: torch.device) -> None:
    images = (torch.rand(64, 3, 5, 6, device=device) * 255).to(dtype)
    made, targets = FLIP.apply(images, None, draws(64, device=device))
    chosen = (draws(64).uniform("flip")[:, 0] < 0.5).tolist()
    expected = torch.stack([image.flip(2) if mirrored else image for image, mirrored in zip(images, chosen, strict=True)])
    assert targets is None
    assert 16 < sum(chosen) < 48
    assert made.dtype == dtype
    assert torch.equal(made, expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crop_cuts_a_window_out_of_each_padded_image(dtype: torch.dtype, device: torch.device) -> None:
    images = (torch.rand(64, 3, 7, 6, device=device) * 255).to(dtype)
    before = images.clone()
    made, _ = CROP.apply(images, None, draws(64, device=device))
    corners = (draws(64).uniform("crop", 2).double() * 9).floor().long().tolist()
    expected = torch.stack(
        [F.pad(image, (4, 4, 4, 4))[:, top : top + 7, left : left + 6] for image, (top, left) in zip(images, corners, strict=True)]
    )
    assert torch.equal(made, expected)
    assert torch.equal(images, before)
    assert made.dtype == dtype


def test_crop_takes_each_of_the_81_windows_equally_often() -> None:
    places = torch.zeros(20_000, 1, 9, 9)
    places[:, 0, 4, 4] = 1  # the mark moves to (8 - top, 8 - left)
    made, _ = CROP.apply(places, None, draws(20_000))
    counts = made.sum((0, 1)).flatten().numpy()
    assert counts.sum() == 20_000
    assert stats.chisquare(counts).pvalue > 1e-3


def test_both_are_registered() -> None:
    assert {name: thing for name, thing, _ in installed_plugins().items("augmentations") if name in ("flip", "crop")} == {
        "flip": FLIP,
        "crop": CROP,
    }
    assert isinstance(installed_plugins().get("augmentations", "flip"), Augmentation)
