"""Fixtures of the plugin's tests."""

from __future__ import annotations

import os

import pytest
import torch

from bpfree import TaskSpec

torch.set_num_threads(1)


@pytest.fixture
def device() -> torch.device:
    return torch.device(os.environ.get("BPFREE_TEST_DEVICE", "cpu"))


@pytest.fixture
def spec() -> TaskSpec:
    """Twelve real inputs, five classes."""
    return TaskSpec(name="toy", input_shape=(12,), outputs=5)


@pytest.fixture
def images() -> TaskSpec:
    """Images of 8 by 8 pixels and three channels, five classes."""
    return TaskSpec(name="toy-images", input_shape=(3, 8, 8), outputs=5)
