"""Real targets that ship, and examples in groups. Oracles: scikit-learn's own arrays, torchvision's rotation, the sets of groups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as transforms
from sklearn.datasets import load_diabetes
from torch import Tensor

import bpfree
from bpfree import Split, Task, TaskSpec, UsageError
from bpfree.config import resolve
from bpfree.tasks.angles import inside, rotated
from bpfree.tasks.task import folds, split_validation


def made(**options: Any) -> Task:
    return resolve({"task": options}).build_task()


def joined(task: Task) -> tuple[Tensor, Tensor]:
    splits = [split for split in (task.train, task.validation, task.test) if isinstance(split, Split)]
    return torch.cat([split.inputs for split in splits]), torch.cat([split.targets for split in splits if split.targets is not None])


@pytest.mark.parametrize("units", ["standard", "measured"])
def test_diabetes_is_that_of_scikit_learn(units: str) -> None:
    task = made(name="diabetes", units=units)
    found, targets = joined(task)
    x, y = load_diabetes(return_X_y=True, scaled=False)
    truth = (y - 152) / 77 if units == "standard" else y
    rows = [np.sort(np.column_stack([a, b]) @ np.arange(1, 12)) for a, b in ((found.double(), targets.double()), (x, truth))]
    np.testing.assert_allclose(*rows, rtol=1e-5)
    assert task.spec.input_names[2] == "bmi"
    seen = task.spec.normalise(task.train.inputs)  # type: ignore[attr-defined]
    torch.testing.assert_close(seen.mean(0), torch.zeros(10), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen.std(0, correction=0), torch.ones(10), atol=1e-4, rtol=0)


def test_rotations_are_those_of_torchvision() -> None:
    pictures = torch.rand(4, 2, 28, 28, generator=torch.Generator().manual_seed(0))
    angles = torch.tensor([-45.0, 0.0, 13.7, 90.0])
    expected = [
        transforms.rotate(picture, float(angle), interpolation=transforms.InterpolationMode.BILINEAR)
        for picture, angle in zip(pictures, angles, strict=True)
    ]
    torch.testing.assert_close(rotated(pictures, angles), torch.stack(expected), rtol=0, atol=1e-4)
    bytes_ = (255 * pictures).byte()
    assert torch.equal(rotated(bytes_, torch.zeros(4)), bytes_)


def test_the_disc_hides_the_frame() -> None:
    # Oracle: of a white picture nothing depends on the angle, as everything inside the disc comes from inside the frame.
    white = torch.ones(5, 1, 8, 8)
    found = rotated(white, torch.tensor([-45.0, -20.0, 0.0, 7.0, 45.0])) * inside(8, 8)
    torch.testing.assert_close(found, found[2:3].expand_as(found))
    assert 0 < int(inside(8, 8).sum()) < 64


def test_rotations_of_a_picture_are_in_one_split() -> None:
    task = made(name="digits-angle", rotations=3, size=16)
    splits = [task.train, task.validation, task.test]
    groups = [set(split.groups.tolist()) for split in splits if isinstance(split, Split) and split.groups is not None]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 1797
    assert [len(split) for split in splits if split is not None] == [3 * 1294, 3 * 144, 359]
    assert task.spec.input_shape == (1, 16, 16)
    _, angles = joined(task)
    assert 44 < float(angles.max()) <= 45
    assert -45 <= float(angles.min()) < -44
    upright = bpfree.load_task("digits")
    assert len(upright.test) == 359  # the same pictures are tested


def test_angles_are_drawn_from_their_own_seed() -> None:
    few, more, other = (made(name="digits-angle", **options) for options in ({"rotations": 1}, {"rotations": 2}, {"angle_seed": 1}))
    assert torch.equal(few.test.targets, more.test.targets)  # type: ignore[arg-type]
    assert torch.equal(few.train.targets, more.train.targets[::2])  # type: ignore[arg-type,index]
    assert not torch.equal(few.test.targets, other.test.targets)  # type: ignore[arg-type]


# --- examples in groups -------------------------------------------------------------------------------------------------


def grouped(count: int = 60, size: int = 3) -> Split:
    groups = torch.arange(count // size).repeat_interleave(size)[torch.randperm(count, generator=torch.Generator().manual_seed(1))]
    return Split(torch.arange(count).float()[:, None], torch.rand(count, 1), groups)


@pytest.mark.parametrize("seed", range(3))
def test_groups_are_not_cut(seed: int) -> None:
    split = grouped()
    kept, held = split_validation(split, 0.25, seed)
    assert isinstance(kept, Split)
    assert isinstance(held, Split)
    assert len(held) == 15
    assert kept.groups is not None
    assert held.groups is not None
    assert not set(kept.groups.tolist()) & set(held.groups.tolist())
    parts = folds(split, 4, seed)
    assert sorted(torch.cat(parts).tolist()) == list(range(60))
    assert [len(part) for part in parts] == [15] * 4
    assert all(split.groups is not None and len(split.groups[part].unique()) == 5 for part in parts)


def test_folds_have_their_share_of_every_class() -> None:
    labels = torch.tensor([0] * 20 + [1] * 10 + [2] * 5)
    parts = folds(Split(torch.rand(35, 2), labels), 5, 0)
    assert all(torch.bincount(labels[part]).tolist() == [4, 2, 1] for part in parts)
    assert parts[0].tolist() != folds(Split(torch.rand(35, 2), labels), 5, 1)[0].tolist()
    with pytest.raises(UsageError, match="35 examples cannot be divided into 36 parts"):
        folds(Split(torch.rand(35, 2), labels), 36, 0)


def test_splits_that_share_a_group_are_refused() -> None:
    split, spec = grouped(), TaskSpec("groups", (1,), 1, "real", scale=1.0)
    kept, held = split_validation(split, 0.25, 0)
    assert held is not None
    assert len(Task(spec, kept, held, replace(grouped(), groups=torch.arange(60) + 100)).train) == 45
    with pytest.raises(UsageError, match="the train and the test split share 15 groups"):
        Task(spec, kept, held, split)
