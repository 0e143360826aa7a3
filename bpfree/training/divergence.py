"""Divergence: losses or weights that are not finite end a run with the status ``diverged``."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from bpfree.metric import LOSS, metric_of

__all__ = ["Diverged", "check_losses", "check_weights"]


class Diverged(Exception):
    """A loss or a weight is not finite; the message says which, and when."""


def check_losses(means: Mapping[str, float], step: int) -> None:
    """Check the means of metrics by key; losses (``loss``, ``rule/b1/loss``, ``val/loss``) must be finite.

    Raises:
        Diverged: one is not.
    """
    for name, value in means.items():
        if metric_of(name).name == LOSS.name and not math.isfinite(value):
            raise Diverged(f"{name} is {value} at step {step}")


def check_weights(rule: nn.Module, epoch: int) -> None:
    """Check all floating-point parameters; waits for the device once.

    Raises:
        Diverged: one is not finite.
    """
    weights = [p.detach() for p in rule.parameters() if p.is_floating_point()]
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(weights, math.inf)])
    if not bool(torch.isfinite(norms).all()):
        name = next(name for name, p in rule.named_parameters() if not bool(torch.isfinite(p).all()))
        raise Diverged(f"the weights {name} are not finite after epoch {epoch}")
