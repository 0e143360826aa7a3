"""muPC: initial weights and multipliers under which a relaxation's energies do not depend on width and depth (Innocenti et al. 2025)."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.fx import GraphModule, Tracer

from bpfree import Network, UsageError
from bpfree_predictive_coding.layers import Residual, Scaled

__all__ = ["mupc"]

MAPS = (nn.Linear, nn.Conv1d, nn.Conv2d)
SUMS = {"add", "add_", "iadd", "__add__"}


def mupc(network: Network) -> dict[str, float]:
    """Rescale a network in place: every linear layer and convolution gets weights N(0, 1), no bias, and a multiplier.

    For a map with D inputs per output (fan-in) in a network of L blocks: 1/sqrt(D L) inside a residual sum, 1/D for the last map, 1/sqrt(D)
    for the others, the first one among them. The paper's are residual MLPs; convolutions are our reading.

    Returns:
        The multipliers, by the maps' paths.

    Raises:
        UsageError: a network without linear maps.
    """
    found = [(block, path, part) for block in network.names for path, part in network.blocks[block].named_modules() if type(part) in MAPS]
    if not found:
        raise UsageError("the network has no linear layer to scale", where="rule.scaling")
    factors = {}
    for position, (block, path, part) in enumerate(found):
        fan_in = part.weight[0].numel()
        if position == len(found) - 1:
            factor = 1 / fan_in
        elif position > 0 and _is_summed(network.blocks[block], path):
            factor = 1 / math.sqrt(fan_in * len(network.names))
        else:
            factor = 1 / math.sqrt(fan_in)
        nn.init.normal_(part.weight)
        part.register_parameter("bias", None)
        _replace(network.blocks, f"{block}.{path}".rstrip("."), Scaled(part, factor))
        factors[f"{block}.{path}".rstrip(".")] = factor
    return factors


def _is_summed(block: nn.Module, path: str) -> bool:
    """Tell whether the map at ``path`` is in a residual sum: in one of ours, or in a block that adds two tensors anywhere."""
    if any(isinstance(part, Residual) for part in block.modules()):
        parts = path.split(".")
        return any(isinstance(block.get_submodule(".".join(parts[:depth])), Residual) for depth in range(len(parts)))
    return _adds(block)


def _adds(block: Any) -> bool:
    """Tell whether the block's traced graph adds two tensors; a block that cannot be traced counts as one that does not."""
    try:
        graph = block.graph if isinstance(block, GraphModule) else Tracer().trace(block)
    except Exception:
        return False
    names = ((node.target if isinstance(node.target, str) else getattr(node.target, "__name__", ""), node) for node in graph.nodes)
    return any(name in SUMS and len(node.all_input_nodes) > 1 for name, node in names)


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
