"""Options of the rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bpfree import option

__all__ = ["EPCConfig", "FixedPredictionConfig", "IPCConfig", "OutputConfig", "PredictiveCodingConfig", "RelaxedConfig", "ZILConfig"]


@dataclass
class OutputConfig:
    """Options of the energy at the output, and of how blocks are executed."""

    output: Literal["auto", "cross-entropy", "squared"] = option(
        "auto", "energy of the scores: cross-entropy, or half the squared distance to the target; auto: the task's loss"
    )
    precision: float = option(1.0, "factor on the output's energy; towards 0 the update over it tends to back-propagation's", gt=0)
    path: Literal["auto", "generic"] = option("auto", "closed-form derivatives where a block's layers are known, or autograd in all blocks")


@dataclass
class RelaxedConfig(OutputConfig):
    """Options of a relaxation of T steps."""

    T: int = option(8, "inference steps per batch", ge=1)
    state_lr: float = option(0.05, "rate of the relaxed variables (states, or epc's errors), per example", gt=0)
    state_momentum: float = option(0.0, "momentum of the relaxed variables", ge=0, lt=1)
    scaling: Literal["none", "mupc"] = option(
        "none", "mupc: weights N(0, 1) with multipliers that depend on width and depth, no biases (Innocenti et al. 2025)"
    )
    profile_every: int = option(100, "steps between measurements of energies and the distance to equilibrium; 0: never", ge=0)


@dataclass
class PredictiveCodingConfig(RelaxedConfig):
    """Options of relaxed states: their initial values, and whether the output is clamped or nudged."""

    init: Literal["forward", "zeros"] = option("forward", "states begin as predictions of a forward pass, or at zero")
    nudge: Literal["none", "positive", "negative", "centred"] = option(
        "none", "clamp the output to the target (none), or move it by beta towards it, away from it, or both in turn, epoch by epoch"
    )
    beta: float = option(0.3, "strength of the nudging in the first epoch", gt=0, le=1, unless={"nudge": ("none",)})
    beta_ramp: float = option(0.02, "what each epoch adds to beta, up to 1", ge=0, unless={"nudge": ("none",), "beta": (1.0,)})


@dataclass
class IPCConfig(RelaxedConfig):
    """Options of incremental predictive coding, whose states and weights move at each inference step."""

    state_lr: float = option(0.2, "rate of the states, per example", gt=0)


@dataclass
class FixedPredictionConfig(OutputConfig):
    """Options of relaxed errors with predictions held fixed."""

    T: int = option(20, "inference steps per batch; back-propagation's errors with state_lr=1 and as many steps as blocks", ge=1)
    state_lr: float = option(0.1, "rate of the errors", gt=0)
    profile_every: int = option(100, "steps between measurements of energies and the distance to equilibrium; 0: never", ge=0)


@dataclass
class ZILConfig(OutputConfig):
    """Options of zero-divergence inference learning: only the output's energy, since its rate and times make it exact."""


@dataclass
class EPCConfig(RelaxedConfig):
    """Options of errors that relax instead of states."""

    state_lr: float = option(0.02, "rate of the errors, per example", gt=0)
