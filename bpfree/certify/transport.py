"""The positive control of whole runs: credit that is known to pass through the weights above must be seen to do so."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bpfree.certify.arms import Weights
from bpfree.certify.twice import Doubles, dirty, distance
from bpfree.network.network import Network

__all__ = ["chained_transport"]


def chained_transport(network: Network, weights: Weights, inputs: Any, draw: int) -> dict[str, dict[str, float]]:
    """Send a drawn cotangent of a chain's output down, through clean and through dirty parameters of one block after the other.

    Args:
        network: a chain; it is copied.
        weights: by block and name.
        inputs: normalised, (N, ...).
        draw: seed of the dirty parameters and of the cotangent.

    Returns:
        The relative difference of the gradients of each block's parameters, by that block and by the dirty block above it. A whole run
        that shows no difference where this is nothing has shown nothing.
    """
    clean = copy.deepcopy(network).train()
    _load(clean, weights)
    recording = Doubles(clean)
    plain = _gradients(clean, recording, inputs, draw)
    found: dict[str, dict[str, float]] = {}
    names = list(clean.blocks)
    for place, name in enumerate(names[1:], start=1):
        generator = torch.Generator().manual_seed(draw)
        soiled = copy.deepcopy(network).train()
        _load(soiled, {**weights, name: {key: dirty(value, generator) for key, value in weights[name].items()}})
        through = _gradients(soiled, Doubles(soiled, recording.record, doubled=(name,)), inputs, draw)
        for below in names[:place]:
            if below in plain and below in through:
                found.setdefault(below, {})[name] = distance(plain[below], through[below])
    return found


def _load(network: Network, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
    with torch.no_grad():
        for name, own in weights.items():
            for key, value in own.items():
                network.blocks[name].get_parameter(key).copy_(value)


def _gradients(network: Network, doubles: Doubles, inputs: Any, draw: int) -> dict[str, Tensor]:
    """Return the flat gradient of each block's parameters, for a drawn cotangent of the output."""
    named = {name: list(block.requires_grad_(True).parameters()) for name, block in network.blocks.items()}
    everything = [p for own in named.values() for p in own]
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), doubles.watching():
        torch.manual_seed(draw)
        doubles.begin_step()
        output = network(inputs)
        sent = torch.randn(output.shape, generator=torch.Generator().manual_seed(draw)).to(output)
        found = iter(torch.autograd.grad(output, everything, sent, allow_unused=True))
    rows = {name: [torch.zeros_like(p) if (gradient := next(found)) is None else gradient for p in own] for name, own in named.items()}
    return {name: torch.cat([row.flatten() for row in own]) for name, own in rows.items() if own}
