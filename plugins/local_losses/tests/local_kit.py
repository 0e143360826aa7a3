"""What the tests of this plugin share: small networks and batches in double precision, and the gradients that a rule leaves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bpfree import Batch, Network, Rule, TaskSpec, new_step
from bpfree.network import MLPConfig, VGGConfig, mlp, vgg

FLAT = TaskSpec("flat", (12,), 5)
IMAGE = TaskSpec("image", (2, 8, 8), 5)


def dense(**options: Any) -> Network:
    """Three hidden layers with layer norms."""
    torch.manual_seed(0)
    return mlp(FLAT, MLPConfig(**{"widths": [9, 8, 7], "activation": "leaky-relu", "norm": "layer", **options})).double()


def convolutional(**options: Any) -> Network:
    """Three convolutions, two of them in front of a pooling, with norms over each example."""
    torch.manual_seed(0)
    settings = {"channels": [4, 6, 6], "pool_after": [1, 3], "activation": "leaky-relu", "norm": "layer", **options}
    return vgg(IMAGE, VGGConfig(**settings)).double()


def spec_of(network: Network) -> TaskSpec:
    return FLAT if len(network.input_shape) == 1 else IMAGE


def batch_for(network: Network, count: int = 11, seed: int = 1) -> Batch:
    """Examples of classes with different counts, of which one is missing."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, *network.input_shape, generator=generator, dtype=network.dtype)
    return Batch(inputs, torch.randint(0, 4, (count,), generator=generator))


def build(kind: type[Rule], network: Network, **options: Any) -> Any:
    """Make a rule with drawn parameters of its own."""
    torch.manual_seed(1)
    return kind(network, spec_of(network), kind.Config(**options)).double().train()


def gradients(rule: Rule, batch: Batch) -> dict[str, Tensor]:
    """Return what ``credit`` leaves in ``.grad``, by parameter."""
    rule.zero_grad()
    rule.credit(batch, new_step(rule))
    return {name: p.grad.clone() for name, p in rule.named_parameters() if p.grad is not None}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Assert that two sets of gradients are equal up to rounding."""
    assert set(ours) == set(theirs)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-8, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
