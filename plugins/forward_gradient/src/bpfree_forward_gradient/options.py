"""Options of the rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bpfree import option
from bpfree.errors import UsageError

__all__ = ["ForwardGradientConfig", "LocalBackpropConfig", "LocalForwardGradientConfig", "Losses"]

ACTIVITIES = {"perturb": ("activities",)}
"""What an option needs that is about noise on activities."""
Losses = Literal["blockwise", "patchwise", "groupwise", "all"]


@dataclass
class ForwardGradientConfig:
    """Options of forward gradients: how the gradient is estimated."""

    perturb: Literal["activities", "weights"] = option("activities", "noise before each nonlinearity, or on the parameters")
    tangents: int = option(8, "directions per step, averaged (K); the papers have one", ge=1)
    noise: Literal["gaussian", "rademacher"] = option("rademacher", "distribution of the noise")
    independent: bool | None = option(None, "independent noise for each example (not set: with activities yes, with weights no)")
    mask: bool = option(True, "no noise on inactive units (activities in front of a ReLU)", needs=ACTIVITIES)
    antithetic: bool = option(False, "directions in pairs that share their noise and differ in sign at every second layer with noise")
    norm_gradient: Literal["exact", "ignored"] = option(
        "exact", "cotangent of a normalisation in front of the noise: in closed form, or left out", needs=ACTIVITIES
    )
    norm_scales: Literal["activities", "weights"] = option(
        "activities",
        "scale and shift of a normalisation in front of the noise: from the activities' estimate, or by noise of their own",
        needs=ACTIVITIES,
    )
    batch_norm: Literal["batch-scalar", "frozen-statistics"] = option(
        "batch-scalar", "where examples meet in a batch norm behind the noise: one derivative per batch, or running statistics"
    )
    together: bool = option(
        True,
        "several directions at once (vmap) rather than one by one; not where batch norm trains",
        needs={**ACTIVITIES, "independent": (None, False)},  # directions of single examples are always taken at once
    )

    def check(self) -> None:
        """Raise UsageError for settings that exclude each other."""
        if self.antithetic and self.tangents % 2:
            raise UsageError("antithetic directions come in pairs", where="rule.tangents", fix="rule.tangents=2, or another even number")

    @property
    def per_example(self) -> bool:
        """Whether each example has noise of its own."""
        return self.perturb == "activities" if self.independent is None else self.independent


@dataclass
class LocalForwardGradientConfig(ForwardGradientConfig):
    """Options of local forward gradients: how the gradient is estimated, and of which local losses."""

    tangents: int = option(1, "directions per step, averaged (K); the papers have one", ge=1)
    losses: Losses = option("all", "local losses: one per block, per patch (tokens), per group of channels, or per patch and group")
    group_size: int | None = option(
        None, "channels per group (not set: the network's own groups, else about 8)", ge=1, needs={"losses": ("groupwise", "all")}
    )
    pool: int = option(1, "positions per side of a feature map that a local head sees", ge=1)


@dataclass
class LocalBackpropConfig:
    """Options of local losses whose gradients are computed by back-propagation."""

    greedy: bool = option(True, "no gradient crosses a block's border; false: the losses of all blocks above count too")
    pool: int = option(1, "positions per side of a feature map that a local head sees", ge=1)
