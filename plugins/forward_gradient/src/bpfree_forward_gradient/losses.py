"""Local heads, and local losses that are computed once for all patches and groups.

The loss of patch p and group g sees all features of its block, but passes credit to its own alone (Ren et al. 2022, section 3.3:
the others, and other patches, are behind stop-gradients). So all these losses have one value, that of an ordinary linear head on
the pooled features, and one cotangent; the derivative of loss (p, g) is the part of ``<cotangent, tangent>`` from its own features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bpfree.errors import UsageError
from bpfree.network import add_gradients
from bpfree.network.closed_form import parameter_gradients
from bpfree.network.reach import Reach, channel_axis
from bpfree_forward_gradient.options import Losses

__all__ = ["Head", "group_count", "own_derivatives", "refuse_patches", "spread"]


class Head(nn.Module):
    """A linear classifier on a block's pooled output, with closed forms; zero at first.

    Args:
        shape: of the block's output without the batch axis: (C,), (tokens, C) or (C, height, width).
        outputs: number of scores.
        pool: positions per side that are left of a feature map.
    """

    def __init__(self, shape: torch.Size, outputs: int, pool: int = 1) -> None:
        super().__init__()
        self.shape = shape
        if len(shape) == 3:
            self.register_buffer("rows", _averaging(shape[1], min(pool, shape[1])), persistent=False)
            self.register_buffer("columns", _averaging(shape[2], min(pool, shape[2])), persistent=False)
            features = shape[0] * self.get_buffer("rows").shape[0] * self.get_buffer("columns").shape[0]
        else:
            features = shape[-1] if len(shape) <= 2 else shape.numel()
        self.linear = nn.Linear(features, outputs)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def pooled(self, output: Tensor) -> Tensor:
        """Return (N, F): what the linear map receives of a block's output."""
        if len(self.shape) == 3:
            rows, columns = self._averages(output.dtype)
            pooled: Tensor = torch.einsum("nchw,ph,qw->ncpq", output, rows, columns)
            return pooled.flatten(1)
        return output.mean(1) if len(self.shape) == 2 else output.flatten(1)

    def _averages(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.get_buffer("rows").to(dtype), self.get_buffer("columns").to(dtype)

    def forward(self, output: Tensor) -> Tensor:
        """Return (N, outputs) scores."""
        scores: Tensor = self.linear(self.pooled(output))
        return scores

    def credit(self, pooled: Tensor, error: Tensor) -> None:
        """Add the exact gradient of the linear map to ``.grad``, from :meth:`pooled` and dLoss/dScores."""
        add_gradients(self.linear, parameter_gradients(self.linear, pooled, error))

    def cotangent(self, error: Tensor) -> Tensor:
        """Return dLoss/dOutput of the block, (N, *shape), from dLoss/dScores (N, outputs)."""
        pooled: Tensor = error @ self.linear.weight.to(error.dtype)
        if len(self.shape) == 3:
            rows, columns = self._averages(error.dtype)
            cotangent: Tensor = torch.einsum("ncpq,ph,qw->nchw", pooled.unflatten(1, (-1, len(rows), len(columns))), rows, columns)
            return cotangent
        if len(self.shape) == 2:
            return (pooled / self.shape[0]).unsqueeze(1).expand(-1, self.shape[0], -1)
        return pooled.reshape(-1, *self.shape)


def _averaging(length: int, parts: int) -> Tensor:
    """Return the matrix (parts, length) of adaptive average pooling along one side."""
    matrix = torch.zeros(parts, length)
    for part in range(parts):
        start, end = part * length // parts, -(-(part + 1) * length // parts)
        matrix[part, start:end] = 1 / (end - start)
    return matrix


def group_count(channels: int, losses: Losses, size: int | None, own: int | None) -> int:
    """Return the number of channel groups with a loss of their own.

    Args:
        channels: of the block's output.
        losses: which local losses are asked for.
        size: channels per group, if given.
        own: groups that the block itself is made of, if any.

    Returns:
        1 unless losses are groupwise; else the number of equal groups whose size is nearest to the one asked for.
    """
    if losses not in ("groupwise", "all"):
        return 1
    if size is None and own is not None:
        return own
    divisors = [count for count in range(1, channels + 1) if channels % count == 0]
    return min(divisors, key=lambda count: abs(channels / count - (size or 8)))


def own_derivatives(products: Tensor, reach: Reach, groups: int) -> Tensor:
    """Return the derivatives of the losses that a site reaches, one for each part that has losses of its own.

    Args:
        products: (K, N, *output shape) cotangent times tangent.
        reach: of the site.
        groups: with losses of their own.

    Returns:
        (K, N or 1, tokens or 1, groups or 1).
    """
    shape = products.shape[2:]
    positions = [2 + axis for axis in range(len(shape)) if axis != channel_axis(shape)]
    if len(shape) != 2:
        products = (products.sum(positions) if positions else products).unsqueeze(2)
    divided = reach.groups and groups > 1
    result = products.unflatten(3, (groups, -1)).sum(4) if divided else products.sum(3, keepdim=True)
    if not reach.tokens and result.shape[2] > 1:
        result = result.sum(2, keepdim=True)
    return result if reach.examples else result.sum(1, keepdim=True)


def spread(derivatives: Tensor, shape: torch.Size) -> Tensor:
    """Spread each unit's derivative for the product with its noise: (K, N or 1, *shape with 1 where all are equal)."""
    groups, channels = derivatives.shape[3], shape[channel_axis(shape)]
    if groups > 1:
        derivatives = derivatives.repeat_interleave(channels // groups, 3)
    if len(shape) == 2:
        return derivatives
    view = [1] * len(shape)
    view[channel_axis(shape)] = derivatives.shape[3]
    return derivatives.reshape(*derivatives.shape[:2], *view)


def refuse_patches(losses: Losses, shapes: dict[str, torch.Size]) -> None:
    """Refuse patchwise losses on a network without tokens.

    Raises:
        UsageError: a block's output has none.
    """
    without = [name for name, shape in shapes.items() if len(shape) != 2]
    if losses == "patchwise" and without:
        raise UsageError(
            "patchwise losses need blocks whose outputs are tokens (N, tokens, channels)",
            where=f"rule.losses, blocks {', '.join(without)}",
            fix="use network=local-mixer, or rule.losses=groupwise",
        )
