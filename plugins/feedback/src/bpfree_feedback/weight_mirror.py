"""Weight mirrors: feedback weights learn from how layers respond to noise.

Akrout, Wilson, Humphreys, Lillicrap, Tweed: Deep learning without weight transport. NeurIPS 2019, arXiv 1904.05391. Noise x with variance
s^2 at a layer's input makes y = f(W x + b) at its output, and since E[x x^T] = s^2 I,

    E[y x^T] = s^2 E[f'(W x + b)] W    (rows of W times their unit's mean slope; exactly so for Gaussian noise, Stein's identity),
    B <- B + rate (mean(y x^T) / s^2 - decay B)    tends to    E[f'] W / decay.

With the decay matched to the growth (decay 1) and linear units this is W itself. Without one, B grows in W's direction for ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bpfree import Batch, Card, Network, Step, Traits, option
from bpfree.tasks.task import Examples
from bpfree_feedback.base import FeedbackConfig, FeedbackRule

__all__ = ["WeightMirror", "WeightMirrorConfig", "correlation"]

UNITS: dict[str, Callable[[Tensor], Tensor]] = {"linear": lambda u: u, "relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}
FIRST_DRAWS = 64
"""Patterns of noise in each step before training, where they are as many as examples later."""


@dataclass
class WeightMirrorConfig(FeedbackConfig):
    """Options of weight mirrors."""

    mirror_rate: float = option(0.1, "rate of the feedback weights towards the correlation of responses and noise", gt=0, le=1)
    mirror_decay: float = option(1.0, "decay of the feedback weights over the rate; 1 matches the growth, 0: none", ge=0)
    mirror_units: Literal["linear", "relu", "tanh", "sigmoid"] = option("linear", "nonlinearity of the responses to noise")
    mirror_noise: float = option(1.0, "standard deviation of the noise", gt=0)
    mirror_draws: int = option(0, "patterns of noise in each step; 0: as many as there are examples in the batch", ge=0)
    mirror_first: int = option(20, "steps of the mirror before training", ge=0)


class WeightMirror(FeedbackRule):
    """Weight mirror: feedback weights learn to be the forward weights from responses to noise."""

    Config = WeightMirrorConfig
    card = Card(
        "weight mirror: feedback weights learn from the layers' responses to noise to be like the forward weights",
        paper="Akrout, Wilson, Humphreys, Lillicrap, Tweed: Deep learning without weight transport. NeurIPS 2019, arXiv 1904.05391",
        equation="delta_l = (B_{l+1}^T delta_{l+1}) * f'(u_l);  B_l <- B_l + rate (mean(y x^T) / s^2 - decay B_l),  "
        "y = f(W_l x + b_l),  x ~ N(0, s^2)",
        notes="Noise goes into each layer by itself, into one receptive field of a convolution. Without the decay that matches the growth "
        "feedback weights grow for ever: rule.mirror_decay=0, as in the published code. The weights are not read but found from responses, "
        "which still makes updates depend on all weights above.",
    )

    @classmethod
    def traits_of(cls, config: Any, network: Network | None = None) -> Traits:
        return Traits("all", downstream_weights="all", reverse_span=1, passes=2)

    def prepare(self, data: Examples, generator: torch.Generator) -> None:
        for _ in range(self.config.mirror_first):
            self.mirror(self.config.mirror_draws or FIRST_DRAWS, lambda name: generator)

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        metrics = super().credit(batch, step)
        if step.part == 0:
            self.mirror(self.config.mirror_draws or len(batch), lambda name: step.generator_for(f"mirror {name}"))
        return metrics

    @torch.no_grad()
    def mirror(self, draws: int, generator_for: Callable[[str], torch.Generator]) -> None:
        """Move the feedback weights of each layer towards the correlation of its responses to noise with the noise.

        Args:
            draws: patterns of noise for each layer.
            generator_for: gives the generator of a layer's noise, by its name.
        """
        config, units = self.config, UNITS[self.config.mirror_units]
        for name in self.layers:
            layer = self.network.get_submodule(self.layers[name].rpartition(".")[0])
            found = correlation(layer, draws, generator_for(name), noise=config.mirror_noise, units=units)
            self.feedback[name].mul_(1 - config.mirror_rate * config.mirror_decay).add_(found, alpha=config.mirror_rate)

    def backward_weights(self, generator: Callable[[], torch.Generator]) -> dict[str, Tensor]:
        return {name: self.feedback[name] for name in self.layers}


def correlation(
    layer: Any, draws: int, generator: torch.Generator, *, noise: float = 1.0, units: Callable[[Tensor], Tensor] = UNITS["linear"]
) -> Tensor:
    """Return the mean of y x^T over the noise's variance, of the weight's shape: what a layer's responses to noise say about its weight.

    A convolution gets noise in one receptive field, and responds at the position that sees this field alone; so positions do not overlap,
    and no padding is seen.

    Args:
        layer: a linear layer or convolution.
        draws: patterns of noise.
        generator: of the noise, on the layer's device.
        noise: its standard deviation.
        units: the nonlinearity of the responses.
    """
    weight = layer.weight
    if isinstance(layer, torch.nn.Linear):
        x = _normal(weight, (draws, weight.shape[1]), noise, generator)
        return units(layer(x)).t() @ x / (draws * noise**2)
    places, starts, ends = _field(layer)
    x = _normal(weight, (draws, weight.shape[1] * layer.groups, *ends), noise, generator)
    y, seen = units(layer(x)), x
    for axis, (place, start, end, step) in enumerate(zip(places, starts, ends, layer.dilation, strict=True), start=2):
        y = y.narrow(axis, place, 1)
        seen = seen.index_select(axis, torch.arange(start, end, step, device=x.device))
    y, seen = y.view(draws, layer.groups, -1), seen.reshape(draws, layer.groups, -1)
    return torch.einsum("ngo,ngd->god", y, seen).reshape(weight.shape) / (draws * noise**2)


def _field(layer: Any) -> tuple[list[int], list[int], list[int]]:
    """Return the first position of the output whose field is clear of the padding, where that field begins, and the input that holds it."""
    before = layer._reversed_padding_repeated_twice[-2::-2]  # at the beginning of each axis, first to last
    extent = [step * (size - 1) + 1 for size, step in zip(layer.kernel_size, layer.dilation, strict=True)]
    places = [math.ceil(pad / stride) for pad, stride in zip(before, layer.stride, strict=True)]
    starts = [place * stride - pad for place, stride, pad in zip(places, layer.stride, before, strict=True)]
    return places, starts, [start + size for start, size in zip(starts, extent, strict=True)]


def _normal(like: Tensor, shape: tuple[int, ...], deviation: float, generator: torch.Generator) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device).normal_(0, deviation, generator=generator)
