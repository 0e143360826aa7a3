"""Small networks, and gradients by a rule and by autograd, for the tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from bpfree_forward_gradient.rules import LocalForwardGradient
from torch import Tensor, nn

from bpfree import Batch, Network, Rule, TaskSpec, new_step

__all__ = ["EXAMPLES", "Basis", "batch_for", "credit_of", "exact_credit", "gradient_of", "mlp", "random_heads", "task_loss"]


EXAMPLES = 7
"""In a batch; no layer of the tests has as many units or patches, so that :class:`Basis` can tell the axes apart."""


def batch_for(spec: TaskSpec, count: int = EXAMPLES, seed: int = 0, dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, *spec.input_shape, generator=generator, dtype=dtype)
    return Batch(inputs, torch.randint(0, spec.outputs, (count,), generator=generator))


def mlp(spec: TaskSpec, *widths: int, norm: Callable[[int], nn.Module] | None = None, seed: int = 0) -> Network:
    """Linear, perhaps a norm, ReLU; in float64."""
    torch.manual_seed(seed)
    blocks: dict[str, nn.Module] = {}
    entry = spec.input_shape[0]
    for index, width in enumerate(widths, start=1):
        blocks[f"b{index}"] = nn.Sequential(nn.Linear(entry, width), *([norm(width)] if norm else []), nn.ReLU())
        entry = width
    blocks["readout"] = nn.Linear(entry, spec.outputs)
    return Network(blocks, input_shape=spec.input_shape, readout="readout").double()


def random_heads(rule: Rule) -> None:
    """Heads are zero at first, and then give no credit."""
    torch.manual_seed(9)
    for name, parameter in rule.named_parameters():
        if name.startswith(("heads.", "network.blocks.readout")):
            nn.init.normal_(parameter, std=0.5)


def credit_of(rule: Rule, batch: Batch, step: object) -> dict[str, Tensor]:
    """The gradients that one call of ``credit`` leaves, by parameter name."""
    rule.zero_grad(set_to_none=True)
    rule.credit(batch, step)  # type: ignore[arg-type]
    return {name: parameter.grad.clone() for name, parameter in rule.named_parameters() if parameter.grad is not None}


def gradient_of(rule: Rule, loss: Tensor) -> dict[str, Tensor]:
    """The gradients by autograd, by parameter name."""
    names, members = zip(*((n, p) for n, p in rule.named_parameters() if p.requires_grad), strict=True)
    gradients = torch.autograd.grad(loss, members, allow_unused=True)
    return {name: value for name, value in zip(names, gradients, strict=True) if value is not None}


def task_loss(rule: Rule, batch: Batch) -> Tensor:
    """What the rule's estimates converge to, by autograd."""
    if isinstance(rule, LocalForwardGradient):
        return rule.objective(batch, new_step(rule))
    return rule.spec.loss(rule.network(batch.inputs), batch)


class Basis:
    """In place of random noise: K orthonormal directions times sqrt(K), of which each place takes coordinates of its own.

    With directions that span all perturbed numbers, the mean of derivative times direction is the gradient itself:
    sum_k (g . v_k) v_k / K = g where sum_k v_k v_k^T = K I.

    Args:
        directions: K, at least the number of perturbed numbers.
        joint: whether the examples' noises are coordinates of one space (one derivative per batch), or each example has its own
            space, which may then be the same for all.
    """

    def __init__(self, directions: int, *, joint: bool = False) -> None:
        torch.manual_seed(3)
        self.vectors = torch.linalg.qr(torch.randn(directions, directions, dtype=torch.float64)).Q * directions**0.5
        self.used, self._joint = 0, joint

    def draw(self, shape: Sequence[int], place: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        own = shape[0] == EXAMPLES and not self._joint
        size = math.prod(shape[1:] if own else shape)
        assert self.used + size <= len(self.vectors), "more numbers than directions"
        part = self.vectors[:, self.used : self.used + size]
        self.used += size
        return part.unflatten(1, (1, *shape[1:])).expand(-1, *shape) if own else part.unflatten(1, tuple(shape))


def exact_credit(rule: Any, batch: Batch, monkeypatch: Any, *, joint: bool = False) -> dict[str, Tensor]:
    """The rule's credit with directions that span everything that it perturbs."""
    bases: dict[str, Basis] = {}
    scope_of = {name: index for index, scope in enumerate(rule.scopes) for name in scope.module._modules}

    def noise(step: Any) -> Any:
        return lambda block: bases.setdefault(scope_of[block], Basis(rule.config.tangents, joint=joint))

    monkeypatch.setattr(rule, "_noise", noise)
    return credit_of(rule, batch, new_step(rule))
