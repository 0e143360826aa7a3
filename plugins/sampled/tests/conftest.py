"""Settings of the plugin's tests."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

from bpfree import Task, load_task

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits() -> Task:
    """The bundled digits with their default splits."""
    return load_task("digits")
