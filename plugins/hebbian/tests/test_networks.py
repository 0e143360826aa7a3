"""What the first layer of the networks sees. Oracles: formulas on the raw pixels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bpfree_hebbian.classes import ClassesConfig, classes
from bpfree_hebbian.networks import MLPConfig, mlp
from torch import Tensor

from bpfree import TaskSpec

SPEC = TaskSpec("image", (3, 4, 5), 2, mean=(0.2, 0.5, 0.3), std=(0.1, 0.3, 0.2))


def expected_of(inputs: str, pixels: Tensor) -> Tensor:
    rows = pixels.flatten(1)
    centred = rows - rows.mean(1, keepdim=True)
    return {
        "normalised": SPEC.normalise(pixels).flatten(1),
        "pixels": rows,
        "unit": rows / rows.norm(dim=1, keepdim=True),
        "contrast": centred / centred.norm(dim=1, keepdim=True),
    }[inputs]


@pytest.mark.parametrize("inputs", ["normalised", "pixels", "unit", "contrast"])
def test_inputs_of_the_dense_network(inputs: Any) -> None:
    pixels = torch.rand(6, 3, 4, 5)
    block = mlp(SPEC, MLPConfig(inputs=inputs)).blocks["b1"]
    torch.testing.assert_close(block[:-2](SPEC.normalise(pixels)), expected_of(inputs, pixels))


@pytest.mark.parametrize("inputs", ["normalised", "pixels", "unit"])
def test_inputs_of_the_networks_per_class(inputs: Any) -> None:
    pixels = torch.rand(6, 3, 4, 5)
    block = classes(SPEC, ClassesConfig(inputs=inputs)).blocks["c1"]
    torch.testing.assert_close(block.inputs(SPEC.normalise(pixels)), expected_of(inputs, pixels))
