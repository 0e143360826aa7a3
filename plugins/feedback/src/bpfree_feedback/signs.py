"""Sign-symmetry: credit through weights that have the forward weights' signs, and sizes of their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bpfree import Card, Network, Traits, option
from bpfree.network.initialisation import Initialisation
from bpfree_feedback.base import FeedbackConfig, FeedbackRule

__all__ = ["SignSymmetry", "SignSymmetryConfig", "deviation"]


@dataclass
class SignSymmetryConfig(FeedbackConfig):
    """Options of sign-symmetry."""

    magnitude: Literal["uniform", "fresh", "fixed"] = option(
        "uniform",
        "sizes of the feedback weights: one for a whole layer (uSF), drawn in each step, or each part of an accumulated one (brSF), "
        "or drawn once (frSF)",
    )


class SignSymmetry(FeedbackRule):
    """Sign-symmetry: credit goes down through weights with the forward weights' signs, and other sizes."""

    Config = SignSymmetryConfig
    card = Card(
        "sign-symmetry: errors go down through weights with the signs of the forward weights",
        paper="Liao, Leibo, Poggio: How important is weight symmetry in backpropagation? AAAI 2016, arXiv 1510.05067; Xiao, Chen, Liao, "
        "Poggio: Biologically-plausible learning algorithms can scale to large datasets. ICLR 2019, arXiv 1811.03567 (the size of uSF); "
        "Moskovitz, Litwin-Kumar, Abbott: Feedback alignment in deep convolutional networks. 2018, arXiv 1812.06488 (sizes that are "
        "drawn once)",
        equation="delta_l = (B_{l+1}^T delta_{l+1}) * f'(u_l);  B = M * sign(W);  M = sigma (uniform), |N| redrawn (fresh) or kept (fixed)",
        notes="sigma is the deviation of rule.init. Signs are weights that are transported: one bit for each.",
    )

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        init, scale = self.config.init, self.config.scale
        self.sigma: dict[str, float] = {name: scale * deviation(self._weight(name), init) for name in self.layers}

    @classmethod
    def traits_of(cls, config: Any, network: Network | None = None) -> Traits:
        return Traits("all", downstream_weights="all", reverse_span=1)

    def drawn(self, name: str) -> Tensor | None:
        return super().drawn(name) if self.config.magnitude == "fixed" else None

    def backward_weights(self, generator: Callable[[], torch.Generator]) -> dict[str, Tensor]:
        drawing = generator() if self.config.magnitude == "fresh" else None
        return {name: self._magnitude(name, drawing) * self._weight(name).detach().sign() for name in self.layers}

    def _magnitude(self, name: str, generator: torch.Generator | None) -> Tensor | float:
        if self.config.magnitude == "uniform":
            return self.sigma[name]
        if self.config.magnitude == "fixed":
            return self.feedback[name].abs()
        fresh: Tensor = torch.empty_like(self._weight(name), requires_grad=False)
        if self.config.init.endswith("uniform") or self.config.init == "torch":
            fresh.uniform_(0, math.sqrt(3) * self.sigma[name], generator=generator)  # the sizes of what is uniform around zero
        else:
            fresh.normal_(0, self.sigma[name], generator=generator).abs_()
        return fresh


def deviation(weight: Tensor, init: Initialisation) -> float:
    """Return the standard deviation of an entry of weights of this shape, as ``init`` draws them."""
    fan_in, field = weight[0].numel(), weight[0, 0].numel()
    fan_out = len(weight) * field
    variances = {
        "xavier-normal": 2 / (fan_in + fan_out),
        "xavier-uniform": 2 / (fan_in + fan_out),
        "he-normal": 2 / fan_in,
        "he-uniform": 2 / fan_in,
        "lecun-normal": 1 / fan_in,
        "orthogonal": 1 / max(fan_in, len(weight)),
        "torch": 1 / (3 * fan_in),
    }
    return math.sqrt(variances[init])
