"""The network ``hnn``: an energy of tanh units, whose outputs are the energy and its Hamiltonian field.

Greydanus, Dzamba, Yosinski: Hamiltonian neural networks, NeurIPS 2019, arXiv 1906.01563. Blocks hand on values and derivatives together
(:mod:`bpfree_sampled.layers`), so that the network is a chain which any rule can train, without second derivatives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bpfree import Network, TaskSpec, UsageError, option
from bpfree.network.builders import NetworkBuilder
from bpfree_sampled import layers
from bpfree_sampled.systems import turned

__all__ = ["HNN", "DualLayer", "EnergyReadout", "HNNConfig", "hnn"]

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass
class HNNConfig:
    """Layers of units whose weighted sum is the energy."""

    depth: int = option(1, "number of hidden layers", ge=1, le=1000, needs={"widths": ([],)})
    width: int = option(500, "units in each hidden layer", ge=1, needs={"widths": ([],)})
    widths: list[int] = option(factory=list, help="units of each hidden layer, in place of depth and width", ge=1)
    activation: Literal["tanh", "relu"] = option("tanh", "of the units; fields of ReLU units are piecewise constant")
    dtype: Literal["float64", "float32"] = option("float64", "of weights, inputs and outputs")


class DualLayer(nn.Module):
    """A layer of units on values and derivatives.

    Args:
        inputs, units: sizes.
        activation: name of the activation.
        first: whether it takes points (N, D); else duals (N, 1 + D, inputs) of the layer below.
        dtype: of its parameters.
    """

    def __init__(self, inputs: int, units: int, activation: str, *, first: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, units, dtype=dtype)
        self.activation, self.first = activation, first

    def forward(self, x: Tensor) -> Tensor:
        """Return duals (N, 1 + D, units)."""
        made = layers.first_duals if self.first else layers.dual_layer
        return made(x, self.linear.weight, self.linear.bias, self.activation)

    def extra_repr(self) -> str:
        """Name the activation."""
        return self.activation


class EnergyReadout(nn.Module):
    """The weighted sum of units, an energy: duals (N, 1 + D, M) to (N, 1 + D), energies and fields (dH/dp, -dH/dq)."""

    def __init__(self, units: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(units, 1, dtype=dtype)

    def forward(self, duals: Tensor) -> Tensor:
        """Return energies and fields (N, 1 + D)."""
        sums = F.linear(duals, self.linear.weight)[..., 0]
        return torch.cat([sums[:, :1] + self.linear.bias, turned(sums[:, 1:])], dim=1)


def hnn(spec: TaskSpec, config: HNNConfig | None = None) -> Network:
    """Build hidden blocks ``b1``, ``b2``, ... of units with their derivatives, and the block ``readout``, which gives energy and field.

    Raises:
        UsageError: inputs are no states (q, p), or outputs not their energies and fields.
    """
    config = config or HNNConfig()
    shape = tuple(spec.input_shape)
    if len(shape) != 1 or shape[0] % 2 or tuple(spec.output_size) != (1 + shape[0],):
        what = f"hnn maps states (q, p) to energy and field, not inputs of shape {shape} to outputs of shape {tuple(spec.output_size)}"
        raise UsageError(what, where=f"task {spec.name}", fix="use task=hamiltonian, or network=mlp")
    blocks: dict[str, nn.Module] = {}
    size, dtype = shape[0], DTYPES[config.dtype]
    for index, units in enumerate(config.widths or [config.width] * config.depth, start=1):
        blocks[f"b{index}"] = DualLayer(size, units, config.activation, first=index == 1, dtype=dtype)
        size = units
    blocks["readout"] = EnergyReadout(size, dtype)
    return Network(blocks, input_shape=spec.input_shape, readout="readout")


HNN = NetworkBuilder(hnn, HNNConfig, "an energy of tanh units with its Hamiltonian field, for task=hamiltonian")
