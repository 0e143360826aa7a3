"""What the tests of forward-forward, mono-forward and channel competition share."""

from __future__ import annotations

import torch
from torch import Tensor

from bpfree import Batch, Rule, TaskSpec, new_step

VECTORS = TaskSpec("vectors", (6,), 4)
PIXELS = TaskSpec("pixels", (1, 5, 5), 4)
IMAGES = TaskSpec("images", (2, 8, 8), 4)


def batch_of(spec: TaskSpec, count: int = 9, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, *spec.input_shape, generator=generator, dtype=torch.float64)
    return Batch(inputs, torch.randint(spec.outputs, (count,), generator=generator))


def gradients(rule: Rule, batch: Batch) -> dict[str, Tensor]:
    """Return what one call of ``credit`` leaves in ``.grad``, by name."""
    rule.train()
    rule.zero_grad()
    rule.credit(batch, new_step(rule))
    return {name: p.grad.clone() for name, p in rule.named_parameters() if p.grad is not None}


def of_block(found: dict[str, Tensor], name: str) -> list[Tensor]:
    return [value for key, value in found.items() if f".{name}." in key]
