"""Krotov and Hopfield's competing hidden units: the winner learns, a runner-up unlearns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bpfree import Card, Network, ScheduleConfig, TaskSpec, UsageError, option
from bpfree_hebbian.base import Defaults, Hebbian, HebbianConfig, Response
from bpfree_hebbian.layer import Layer, channel_sum, largest_entry, layers_of, winners

__all__ = ["KrotovHopfield", "KrotovHopfieldConfig"]

FEW = 100
"""Units, of which fewer do not bear the published delta of 0.4, nor large rates: one unit soon takes every win."""


@dataclass
class KrotovHopfieldConfig(HebbianConfig):
    """Options of Krotov and Hopfield's rule."""

    p: float = option(2.0, "norm in which the weights are measured (Lebesgue norm)", ge=1)
    rank: int = option(2, "which unit unlearns, by its current: the rank-th largest (the paper on MNIST: 7)", ge=2, unless={"delta": (0,)})
    delta: float | None = option(
        None,
        "how much it unlearns, in units of what the first learns; 0: the winner takes all (none: 0.4, or 0.1 in layers of few units)",
        ge=0,
    )
    normalise: bool = option(True, "divide each update by its largest entry")


class KrotovHopfield(Hebbian):
    """For each input (and position) the unit with the largest current learns it and the one of a given rank unlearns it.

    Krotov, Hopfield: Unsupervised learning by competing hidden units. PNAS 116(16), 2019.
    """

    Config = KrotovHopfieldConfig
    card = Card(
        "Krotov and Hopfield: the unit that answers most learns the input, a runner-up unlearns it, then a trained readout",
        paper="Krotov, Hopfield: Unsupervised learning by competing hidden units. PNAS 116(16), 2019, arXiv 1806.10181",
        equation="I_k = sum_i sign(w_ki) |w_ki|^(p-1) x_i;  g = 1 for the largest I, -delta for the rank-th, else 0;  "
        "dw_k = sum_n (g_k x - g_k I_k w_k);  w_k += lr dw_k / max|dW|",
        notes="p, rank, delta, initial weights ~ N(0, 1) and a rate that falls linearly to zero are those of the authors' notebook (100 "
        "units, rate 0.02, batches of 100, 200 passes); for 2000 units on MNIST the paper has rank 7. The rate of 0.2 (0.02 in "
        "layers of fewer than 100 units) and batches of 20 are ours, for a few passes. Every update is divided by its largest entry, so "
        "its size does not depend on the batch size, while "
        "the number of updates does. Rows begin at a norm of sqrt(fan-in) and shrink to p-norm one as they win, which lets others win "
        "next. On digits with 16 units one of them takes everything if weights begin small, with a delta of 0.4 (hence 0.1 in layers "
        "of fewer than 100), or with a rate of 0.2 (in one of five seeds). The readout takes relu(W x)^4.5, standardised, with softmax and "
        "cross-entropy; the paper's has tanh outputs and another error. Inputs are scaled to length one, where "
        "the notebook takes pixels (network.inputs=pixels): 96.5 against 95.5 % of MNIST's validation split after two passes.",
    )
    config: KrotovHopfieldConfig

    def __init__(self, network: Any, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        for layer in self.layers.values():
            if layer.units < self.config.rank:
                raise UsageError(
                    f"block {layer.name!r} has {layer.units} units, so none of rank {self.config.rank}", where="rule.rank", fix="more units"
                )

    @classmethod
    def defaults_of(cls, config: Any, network: Network) -> Defaults:
        units = [layer.units for layer in layers_of(network).values()]
        many = max(units) >= FEW
        rates = [0.2 if count >= FEW else 0.02 for count in units]
        return Defaults(rates, feature_batch_size=20, schedule=ScheduleConfig("linear"), readout_lr=1e-3 if many else 0.1)

    @classmethod
    def network_options(cls, spec: TaskSpec, config: Any) -> dict[str, Any]:
        options = super().network_options(spec, config)
        if options["name"] == "hebbian-mlp":
            options |= {"activation": "relu", "power": 4.5, "inputs": "unit"}
        return options

    @torch.no_grad()
    def _initialise(self, layer: Layer) -> None:
        """Draw each weight ~ N(0, 1) as in the paper, unless the configuration says otherwise."""
        if self.config.init == "auto" and self.config.radius is None:
            nn.init.normal_(layer.weight)
        else:
            super()._initialise(layer)

    def describe(self, layer: Layer) -> str:
        return f"rank {self.config.rank} unlearns {self._delta(layer):g} of what the first learns; norms of p = {self.config.p:g}"

    @torch.no_grad()
    def respond(self, layer: Layer, source: Tensor, u: Tensor) -> Response:
        currents = self._currents(layer, source, u)
        ranked = currents.topk(self.config.rank, dim=1).indices
        winner, loser = ranked[:, :1], ranked[:, -1:]
        g = torch.zeros_like(currents).scatter_(1, winner, 1.0).scatter_(1, loser, -self._delta(layer))
        metrics = {"active_units": winners(winner, layer.units)}
        if self.config.p != 2:  # else the base class reports it
            metrics["p_norm"] = torch.linalg.vector_norm(layer.weight.flatten(1), self.config.p, dim=1).mean()
        return Response(g, channel_sum(g * currents), metrics)

    def _delta(self, layer: Layer) -> float:
        if self.config.delta is not None:
            return self.config.delta
        return 0.4 if layer.units >= FEW else 0.1

    def _currents(self, layer: Layer, source: Tensor, u: Tensor) -> Tensor:
        """Return the units' answers (N, K, ...) in the inner product that belongs to the p-norm."""
        if self.config.p == 2:
            return u
        weight = layer.weight.detach()
        dual = weight.sign() * weight.abs().pow(self.config.p - 1)
        currents: Tensor = torch.func.functional_call(layer.linear, {"weight": dual}, (source,))
        return currents

    @torch.no_grad()
    def before_update(self, groups: Sequence[str]) -> None:
        """Divide ``.grad`` by its largest entry, once per update, when it is complete."""
        if not self.config.normalise:
            return
        for layer in self.layers_in(groups):
            gradient = layer.weight.grad
            if gradient is not None:
                gradient.div_(largest_entry(gradient))
