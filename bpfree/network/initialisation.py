"""Initial weights of linear layers and convolutions by name, for networks whose papers say which."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["INITIALISATIONS", "Initialisation", "initialise"]

Initialisation = Literal["torch", "xavier-normal", "xavier-uniform", "he-normal", "he-uniform", "lecun-normal", "orthogonal"]
INITIALISATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "xavier-normal": nn.init.xavier_normal_,
    "xavier-uniform": nn.init.xavier_uniform_,
    "he-normal": lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"),
    "he-uniform": lambda weight: nn.init.kaiming_uniform_(weight, nonlinearity="relu"),
    "lecun-normal": lambda weight: nn.init.normal_(weight, std=1 / math.sqrt(weight[0].numel())),
    "orthogonal": nn.init.orthogonal_,
}
"""Initialisations by name, each with gain 1, except for He's, whose gain is the square root of two."""


@torch.no_grad()
def initialise(module: nn.Module, name: Initialisation, gain: float = 1.0) -> None:
    """Draw new weights for all linear layers and convolutions, times ``gain``, and set their biases to zero.

    Args:
        module: a network or a block.
        name: ``torch`` leaves everything as torch's layers have made it.
        gain: a factor on the weights.
    """
    if name == "torch":
        return
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            INITIALISATIONS[name](layer.weight).mul_(gain)
            if layer.bias is not None:
                layer.bias.zero_()
