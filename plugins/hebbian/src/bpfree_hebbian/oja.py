"""Principal components by Hebbian learning: Oja's subspace rule and Sanger's generalised Hebbian algorithm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bpfree import Card, Network, ScheduleConfig, TaskSpec
from bpfree.network.closed_form import is_batch_norm
from bpfree_hebbian.base import Defaults, Hebbian, Response
from bpfree_hebbian.layer import Layer, layers_of

__all__ = ["Oja", "Sanger"]

RATE = 1.0
"""First rate in units of 1 / mean |x|^2. Second moments have no larger eigenvalue, and along one of them a row's length s goes to
s (1 + a (1 - s^2)) with a the rate times the eigenvalue, which stays bounded for a <= 2 if it begins below sqrt(2)."""

RADIUS = 0.7
"""Singular values of K <= D random rows of this length in D dimensions are at most twice it: below sqrt(2)."""

CENTRING = (
    "Components are those of the second moments of what the layer sees, which are not centred (network.norm=batch centres and scales "
    "each input). The rates are ours: 1 / mean |x|^2, taken to be 1 / fan-in as inputs are normalised, falling linearly to zero. "
    "In convolutions the update is a mean over positions: the components are those of the patches. A layer has at most as many components "
    "as inputs, hence other default widths than those of the rules that compete."
)


class Oja(Hebbian):
    """Units that subtract from the input what all of them explain of it: they come to span its principal subspace.

    Oja: A simplified neuron model as a principal component analyzer. 1982 (one unit); Neural networks, principal components,
    and subspaces. 1989 (several).
    """

    card = Card(
        "Oja's subspace rule: each layer's units come to span the principal components of its input",
        paper="Oja: Neural networks, principal components, and subspaces. International Journal of Neural Systems 1, 1989; one unit: "
        "A simplified neuron model as a principal component analyzer. Journal of Mathematical Biology 15, 1982",
        equation="y = W x;  dW = lr mean_n (y x^T - y y^T W);  of one unit: dw = lr y (x - y w)",
        notes="The units make an orthonormal basis of the principal subspace, in no order; sanger orders them. " + CENTRING,
    )

    @classmethod
    def defaults_of(cls, config: Any, network: Network) -> Defaults:
        """Read the few components of a dense layer at a large rate, chosen on digits and MNIST; a convolution's many maps at Adam's own."""
        layers = layers_of(network)
        rates = [RATE / size for size in _squared_lengths(layers)]
        readout_lr = 0.1 if isinstance(layers[network.hidden[-1]].linear, nn.Linear) else 1e-3
        return Defaults(rates, radius=RADIUS, feature_batch_size=16, schedule=ScheduleConfig("linear"), readout_lr=readout_lr)

    @classmethod
    def network_options(cls, spec: TaskSpec, config: Any) -> dict[str, Any]:
        if spec.is_image and spec.input_shape[0] > 1:
            return {"name": "hebbian-cnn", "channels": [64, 256, 1024]}
        widths = [128 if spec.input_size >= 256 else min(16, spec.input_size)]
        return {"name": "hebbian-mlp", "widths": widths, "activation": "identity"}

    @torch.no_grad()
    def respond(self, layer: Layer, source: Tensor, u: Tensor) -> Response:
        mean = u / (u[0, 0].numel())  # over positions
        moments = mean.transpose(0, 1).flatten(1) @ u.transpose(0, 1).flatten(1).t()
        rows = layer.weight.flatten(1)
        overlap = rows @ rows.t() - torch.eye(len(rows), device=rows.device, dtype=rows.dtype)
        return Response(mean, self.subtracted(moments), {"off_orthonormal": overlap.square().mean().sqrt()})

    def subtracted(self, moments: Tensor) -> Tensor:
        """Return (K, K): which units' explanations each unit subtracts, of their second moments; here all of them."""
        return moments


class Sanger(Oja):
    """Each unit subtracts what it and those before it explain: they become the principal components in order.

    Sanger: Optimal unsupervised learning in a single-layer linear feedforward neural network. 1989.
    """

    card = Card(
        "Sanger's generalised Hebbian algorithm: each layer's units become the principal components of its input, in order",
        paper="Sanger: Optimal unsupervised learning in a single-layer linear feedforward neural network. Neural Networks 2, 1989",
        equation="y = W x;  dW = lr mean_n (y x^T - LT(y y^T) W), LT the lower triangle with its diagonal",
        notes="A unit settles after those before it, so late components of close eigenvalues need many passes. " + CENTRING,
    )

    def subtracted(self, moments: Tensor) -> Tensor:
        return moments.tril()


def _squared_lengths(layers: dict[str, Layer]) -> list[float]:
    """Estimate |x|^2 of each layer's input (of one position): the fan-in where inputs are normalised, else a bound.

    A layer without batch norm sees what the one below made, which by then is no longer than what that one saw.
    """
    sizes: list[float] = []
    for layer in layers.values():
        fan_in, area = layer.weight[0].numel(), layer.weight[0, 0].numel()
        normalised = not sizes or any(is_batch_norm(part) for part in layer.block.modules())
        sizes.append(fan_in if normalised else max(fan_in, area * sizes[-1]))
    return sizes
