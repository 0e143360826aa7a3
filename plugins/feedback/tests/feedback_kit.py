"""What the tests of this plugin share: networks, batches, gradients, and another implementation of credit through other weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from bpfree_feedback.networks import ResNetConfig, resnet
from torch import Tensor, nn

from bpfree import Batch, Network, Rule, Stepper, TaskSpec

VECTORS = TaskSpec("vectors", (6,), 5)
IMAGES = TaskSpec("images", (3, 9, 9), 5)


def dense() -> Network:
    """Two hidden blocks, the second of two layers."""
    torch.manual_seed(0)
    blocks = {
        "b1": nn.Sequential(nn.Linear(6, 9), nn.Tanh()),
        "b2": nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 7), nn.ReLU()),
        "readout": nn.Linear(7, 5),
    }
    return Network(blocks, input_shape=(6,), readout="readout").double()


def convolutional() -> Network:
    """Convolutions with stride, groups, dilation and all kinds of padding."""
    torch.manual_seed(0)
    blocks = {
        "b1": nn.Sequential(nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        "b2": nn.Sequential(
            nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3, padding=2, dilation=2)
        ),
        "b3": nn.Sequential(nn.Conv2d(6, 6, (1, 3), padding="same", bias=False), nn.ReLU(), nn.Flatten(2)),
        "b4": nn.Sequential(nn.Conv1d(6, 5, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(125, 8), nn.ReLU()),
        "readout": nn.Linear(8, 5),
    }
    return Network(blocks, input_shape=(3, 9, 9), readout="readout").double()


def residual() -> Network:
    """A residual network of eight layers."""
    torch.manual_seed(0)
    return resnet(IMAGES, ResNetConfig(depth=8, width=4)).double()


def spec_of(network: Network) -> TaskSpec:
    return VECTORS if len(network.input_shape) == 1 else IMAGES


def batch_for(network: Network, count: int = 7, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, *network.input_shape, generator=generator, dtype=network.dtype)
    return Batch(inputs, torch.arange(count) % 5)


def gradients(rule: Rule, batch: Batch, stepper: Stepper | None = None) -> dict[str, Tensor]:
    """Return what ``credit`` leaves in the network's ``.grad``."""
    rule.zero_grad()
    rule.train()
    rule.credit(batch, (stepper or Stepper(rule)).step)
    return {name: p.grad.clone() for name, p in rule.network.named_parameters() if p.grad is not None}


def back_propagation(network: Network, batch: Batch) -> dict[str, Tensor]:
    network.zero_grad()
    network.train()
    F.cross_entropy(network(batch.inputs), batch.targets).backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@contextmanager
def by_identity(network: nn.Module, feedback: Mapping[str, Tensor]) -> Iterator[None]:
    """Execute layers as layer(x.detach(); W) + layer(x; B) - layer(x; B).detach(): autograd does the rest."""

    def forward(layer: Any, matrix: Tensor) -> Any:
        def execute(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return F.linear(x, weight, bias) if isinstance(layer, nn.Linear) else layer._conv_forward(x, weight, bias)

        return lambda x: execute(x.detach(), layer.weight, layer.bias) + execute(x, matrix, None) - execute(x, matrix, None).detach()

    with ExitStack() as stack:
        for name, matrix in feedback.items():
            layer = network.get_submodule(name.rpartition(".")[0])
            layer.forward = forward(layer, matrix)  # type: ignore[method-assign]
            stack.callback(vars(layer).pop, "forward")
        yield
