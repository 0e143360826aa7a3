"""Where in a block a local loss looks: a block may end with poolings and dropout, in front of which papers measure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from bpfree import Network, Trace
from bpfree.network import evaluating, kept_buffers, recorded_calls
from bpfree.network.builders import ACTIVATIONS

__all__ = ["activation", "batch_norms", "before_pooling", "flat_rows", "has_dropout", "place_shapes", "rest", "stream"]

NONLINEARITIES = tuple({type(make()) for name, make in ACTIVATIONS.items() if name != "identity"})
POOLINGS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def activation(block: nn.Module) -> nn.Module:
    """Return the block's last nonlinearity, before any pooling and dropout; the block itself where none is a child of it."""
    if type(block) is not nn.Sequential:
        return block
    return next((part for part in reversed(block) if isinstance(part, NONLINEARITIES)), block)


def before_pooling(block: nn.Module) -> nn.Module:
    """Return the last part of a block before the poolings that end it; the block itself where it ends otherwise."""
    if type(block) is not nn.Sequential or not isinstance(block[-1], POOLINGS):
        return block
    return next((part for part in reversed(block) if not isinstance(part, POOLINGS)), block)


def rest(block: nn.Module, place: nn.Module) -> list[nn.Module]:
    """Return the parts of a block behind a place in it; none where the place is the block itself."""
    if place is block or type(block) is not nn.Sequential:
        return []
    parts = list(block)
    return parts[parts.index(place) + 1 :]


def has_dropout(module: nn.Module) -> bool:
    """Tell whether the module drops anything in training."""
    return any(isinstance(part, DROPOUTS) and part.p > 0 for part in module.modules())


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """Return the parts of a module that normalise over a batch."""
    return [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]


@torch.no_grad()
def place_shapes(network: Network, places: Mapping[str, nn.Module]) -> dict[str, torch.Size]:
    """Return the shapes at places in hidden blocks, without the batch axis, by block, from a dry run in eval mode."""
    where = next((p for p in network.parameters()), torch.empty(0))
    with recorded_calls(*places.values()) as calls, kept_buffers(network), evaluating(network):
        x = torch.zeros(1, *network.input_shape, device=where.device, dtype=network.dtype)
        for name in network.hidden:
            x = network.blocks[name](x)
    return {name: calls[place][-1].output.shape[1:] for name, place in places.items()}


def stream(network: Network, x: Tensor, places: Mapping[str, nn.Module]) -> Iterator[tuple[Trace, Tensor]]:
    """Yield a trace of each block with what is at its place, block by block, so that one graph at a time is alive.

    Of a block without a place it is the output.

    Args:
        network: a chain.
        x: (N, *input_shape).
        places: a part of a block, or the block, by the block's name.
    """
    traces = network.stream(x)
    for name in network.names:
        with recorded_calls(*([places[name]] if name in places else [])) as calls:
            trace = next(traces)
        yield trace, calls[places[name]][-1].output if name in places else trace.output
        del trace, calls


def flat_rows(*tensors: Tensor) -> list[Tensor]:
    """Flatten tensors (N, ...) to (N, d), all in the order in which the first one lies in memory, so that large ones are not copied."""
    first = tensors[0]
    last = first.dim() == 4 and first.is_contiguous(memory_format=torch.channels_last) and not first.is_contiguous()
    return [(x.permute(0, 2, 3, 1) if last else x).reshape(len(x), -1) for x in tensors]
