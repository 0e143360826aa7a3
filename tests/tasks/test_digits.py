"""Handwritten digits. Oracle: scikit-learn's own arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from bpfree.config import resolve
from bpfree.tasks.task import Task


def digits_of(size: int) -> Task:
    return resolve({"task": {"name": "digits", "size": size}}).build_task()


def pictures(task: Task) -> torch.Tensor:
    assert task.validation is not None
    return torch.cat([task.train.inputs, task.validation.inputs, task.test.inputs])


@pytest.mark.parametrize("size", [8, 16, 32])
def test_larger_images_repeat_each_pixel(size: int) -> None:
    task, times = digits_of(size), size // 8
    assert task.spec.input_shape == (1, size, size)
    found = pictures(task)
    assert found.shape == (1797, 1, size, size)
    # every picture of the set, each pixel a square
    expected = np.kron(load_digits().images / 16, np.ones((times, times)))
    as_rows = [
        np.sort(each.reshape(1797, -1) @ np.random.default_rng(0).random(size * size)) for each in (found.double().numpy(), expected)
    ]
    np.testing.assert_allclose(*as_rows, rtol=1e-6)


def test_the_splits_are_the_same_at_every_size() -> None:
    small, large = digits_of(8), digits_of(16)
    for a, b in ((small.train, large.train), (small.test, large.test)):
        assert a.targets is not None
        assert b.targets is not None
        assert torch.equal(a.targets, b.targets)
        assert torch.equal(a.inputs, b.inputs[:, :, ::2, ::2])
        assert torch.equal(a.inputs, b.inputs[:, :, 1::2, 1::2])
