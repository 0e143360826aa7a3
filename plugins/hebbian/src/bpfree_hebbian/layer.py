"""The linear map of a block, with what it saw and made: what a Hebbian rule needs of one execution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bpfree import Network, UsageError
from bpfree.network import recorded_calls
from bpfree.network.closed_form import is_linear, parameter_gradients

__all__ = ["Layer", "channel_sum", "fit", "largest_entry", "layers_of", "per_unit", "winners"]


class Layer:
    """A hidden block's only linear map.

    Args:
        name: of the block.
        block: executes it once.
        linear: a linear layer or convolution whose weight's rows are the units.

    Attributes:
        measured: (K,) the norms of the rows when they were last measured, which is in each credit.
    """

    def __init__(self, name: str, block: nn.Module, linear: nn.Module) -> None:
        self.name, self.block, self.linear = name, block, linear
        self.measured = torch.empty(0)

    @property
    def weight(self) -> nn.Parameter:
        """Weight (K, ...): a row per unit."""
        return self.linear.weight  # type: ignore[return-value]

    @property
    def units(self) -> int:
        """Number K of units."""
        return len(self.weight)

    @property
    def learns(self) -> bool:
        """Whether the layer's weights are trained in this phase."""
        return self.weight.requires_grad

    def norms(self) -> Tensor:
        """Return the Euclidean norms (K,) of the rows."""
        norms: Tensor = torch.linalg.vector_norm(self.weight.detach().flatten(1), dim=1)
        return norms

    def measure(self) -> Tensor:
        """Measure :meth:`norms` and keep them as ``measured`` for the next update: they take as long as an update's own arithmetic."""
        self.measured = self.norms()
        return self.measured

    def execute(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the block's output, its linear map's input (N, ...) and pre-activations u (N, K, ...), without a graph.

        Raises:
            UsageError: the linear map is called several times, or is a dense layer on a sequence.
        """
        with torch.no_grad(), recorded_calls(self.linear) as calls:
            output = self.block(x)
        seen = calls[self.linear]
        if len(seen) != 1:
            raise UsageError(f"a Hebbian rule needs a linear map that is called once, not {len(seen)} times", where=f"block {self.name}")
        source, u = seen[0]
        if u.dim() != 2 and isinstance(self.linear, nn.Linear):  # its units are the last axis: the second would be taken for them
            raise UsageError(
                f"no Hebbian update is known for a dense layer whose outputs are (N, {', '.join(map(str, u.shape[1:]))})",
                where=f"block {self.name}",
                fix="flatten its input, or use nn.Conv1d with a kernel of width 1",
            )
        return output, source, u

    def product(self, source: Tensor, y: Tensor) -> Tensor:
        """Sum y_k x over examples and positions: (K, ...) like the weight, from y (N, K, ...) and the input."""
        return parameter_gradients(self.linear, source, y)["weight"]


def layers_of(network: Network) -> dict[str, Layer]:
    """Return the linear map of each hidden block, unchanged: see :func:`fit`.

    Raises:
        UsageError: a block without a linear map, or with several.
    """
    layers = {}
    for name in network.hidden:
        block = network.blocks[name]
        found = [part for part in block.modules() if is_linear(part)]
        if len(found) != 1:
            raise UsageError(
                f"a Hebbian rule needs one linear map per hidden block, {name!r} has {len(found)}",
                fix="use hebbian-mlp, hebbian-cnn, mlp or vgg, or cut the network between its layers",
            )
        linear = found[0]
        if type(linear) not in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) or getattr(linear, "groups", 1) != 1:
            raise UsageError(f"no Hebbian update is known for {linear}", where=f"block {name}", fix="use nn.Linear or nn.Conv2d")
        layers[name] = Layer(name, block, linear)
    return layers


def fit(layer: Layer) -> None:
    """Prepare a block for Hebbian learning: set its bias to zero for good, and stop activations from overwriting their input."""
    bias = layer.linear.bias
    if bias is not None:
        nn.init.zeros_(bias)  # type: ignore[arg-type]
        bias.requires_grad_(False)  # type: ignore[union-attr]
    for part in layer.block.modules():
        if getattr(part, "inplace", False):
            part.inplace = False  # type: ignore[assignment]


def channel_sum(values: Tensor) -> Tensor:
    """Sum (N, K, ...) over examples and positions: (K,)."""
    return values.sum([axis for axis in range(values.dim()) if axis != 1])


def largest_entry(values: Tensor) -> Tensor:
    """Return the largest absolute value, at least 1e-30; the infinity norm would take six times as long on a CPU."""
    return torch.maximum(values.amax(), -values.amin()).clamp_min_(1e-30)


def winners(indices: Tensor, units: int) -> Tensor:
    """Count the different units among the indices."""
    return torch.zeros(units, device=indices.device).scatter_(0, indices.flatten(), 1.0).sum()


def per_unit(values: Tensor, like: Tensor) -> Tensor:
    """Shape (K,) so that it multiplies the rows of a weight (K, ...)."""
    return values.view(-1, *[1] * (like.dim() - 1))
