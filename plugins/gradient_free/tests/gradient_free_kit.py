"""What the tests of this plugin share: small networks, batches, and a task whose loss is a function of the weights alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bpfree import Batch, Network, Rule, TaskSpec
from bpfree.network import MLPConfig, VGGConfig, mlp, vgg

VECTORS = TaskSpec("vectors", (6,), 5)
IMAGES = TaskSpec("images", (2, 16, 16), 4)
NUMBERS = TaskSpec("numbers", (5,), 1, targets="real")


def dense(**options: Any) -> Network:
    torch.manual_seed(0)
    return mlp(VECTORS, MLPConfig(**{"widths": [7, 6], "activation": "tanh", **options})).double()


def convolutional(**options: Any) -> Network:
    torch.manual_seed(0)
    network = vgg(IMAGES, VGGConfig(**{"channels": [3, 4], "pool_after": [1, 2], "norm": "none", **options})).double()
    return network.to(memory_format=torch.contiguous_format)


def tokens() -> Network:
    """Linear layers on (N, tokens, features)."""
    torch.manual_seed(0)
    blocks = {
        "b1": nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Linear(3, 4), nn.GELU()),
        "b2": nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Flatten()),
        "readout": nn.Linear(8, 5),
    }
    return Network(blocks, input_shape=(6,), readout="readout").double()


NETWORKS = {"dense": dense, "convolutional": convolutional, "tokens": tokens}


def spec_of(network: Network) -> TaskSpec:
    return VECTORS if len(network.input_shape) == 1 else IMAGES


def batch_for(network: Network, count: int = 12, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, *network.input_shape, generator=generator, dtype=network.dtype)
    return Batch(inputs, torch.arange(count) % spec_of(network).outputs)


def weights_of(rule: Rule) -> Tensor:
    """All weights of the network as one vector, copied."""
    return torch.cat([p.detach().flatten() for p in rule.network.parameters()])


class Point(nn.Module):
    """A point of d numbers, which it hands on whatever it is given."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(start.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.expand(len(x), -1)


@dataclass(frozen=True)
class Function(TaskSpec):
    """A task whose loss is a function of the network's one output."""

    kind: str = "linear"
    slope: Any = None

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        point = outputs[0]
        if self.kind == "linear":
            return point @ self.slope
        if self.kind == "sphere":
            return point.square().sum()
        return (100 * (point[1:] - point[:-1].square()).square() + (1 - point[:-1]).square()).sum()


def function(kind: str, start: Tensor, slope: Tensor | None = None) -> tuple[Network, Function, Batch]:
    """A network that is a point, the task of minimising a function of it, and the batch that such a task needs."""
    network = Network({"point": Point(start)}, input_shape=(1,), readout="point")
    spec = Function("function", (1,), len(start), targets="none", kind=kind, slope=slope)
    return network, spec, Batch(torch.zeros(1, 1, dtype=start.dtype))
