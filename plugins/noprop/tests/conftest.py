"""Small tasks and rules for the tests of NoProp."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bpfree_noprop.blocks import NETWORKS
from bpfree_noprop.dt import NoPropDT, NoPropDTConfig

from bpfree.step import Batch
from bpfree.tasks.task import TaskSpec

MakeRule = Callable[..., NoPropDT]


@pytest.fixture
def device() -> torch.device:
    return torch.device(os.environ.get("BPFREE_TEST_DEVICE", "cpu"))


@pytest.fixture
def spec() -> TaskSpec:
    return TaskSpec("tiny", input_shape=(1, 6, 6), outputs=4)


@pytest.fixture
def make_rule(device: torch.device, spec: TaskSpec) -> MakeRule:
    """The paper's blocks and chain with T=3 on ``spec`` with the network that they ask for; keywords are the rule's options."""

    def make(spec: TaskSpec = spec, seed: int = 0, network: dict[str, Any] | None = None, **options: Any) -> NoPropDT:
        torch.manual_seed(seed)
        config = NoPropDTConfig(**{"T": 3, "state": "noised", **options})
        wanted = {**NoPropDT.network_options(spec, config), **(network or {})}
        builder = NETWORKS[wanted.pop("name")]
        return NoPropDT(builder.build(spec, builder.Config(**wanted)), spec, config).to(device)

    return make


@pytest.fixture
def batch(device: torch.device, spec: TaskSpec) -> Batch:
    """16 random inputs with each class four times."""
    inputs = torch.randn(16, *spec.input_shape, generator=torch.Generator().manual_seed(1))
    return Batch(inputs.to(device), (torch.arange(16) % spec.outputs).to(device))
