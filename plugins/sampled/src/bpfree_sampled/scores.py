"""Metrics of learned energies and fields, in double precision.

Relative errors are of whole splits, ``||H - H'|| / ||H||`` over its states. Trajectories of learned and true field begin in the same states
and are followed by the same integrator, the implicit midpoint rule, which is symplectic for any energy: what differs is the field alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bpfree import Batch
from bpfree.devices import doubled
from bpfree.metric import Metric
from bpfree_sampled.integrators import rollout
from bpfree_sampled.systems import System

__all__ = ["DRIFT", "ENERGY", "FIELD", "ROLLOUT", "beginnings", "trajectories"]

Predict = Callable[[Any], Tensor]
TRAJECTORIES = 8
BOUND = 100.0
"""Where trajectories are stopped."""


class _Relative:
    """The norm of differences over the norm of what is true."""

    def __init__(self, values: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        self._values = values
        self._apart: Tensor | float = 0.0
        self._true: Tensor | float = 0.0

    def add(self, outputs: Tensor, batch: Batch) -> None:
        """Add the squares of a batch."""
        assert batch.targets is not None
        made, true = self._values(doubled(outputs), doubled(batch.targets))
        self._apart = self._apart + (made - true).square().sum()
        self._true = self._true + true.square().sum()

    def value(self) -> float:
        """Return the relative error; NaN without examples."""
        return math.sqrt(float(self._apart) / float(self._true)) if float(self._true) > 0 else math.nan


class _Energy:
    """The relative error of energies, whose constant is that of the state x = 0."""

    def __init__(self, spec: Any, predict: Predict) -> None:
        self._spec, self._predict = spec, predict
        self._inner: _Relative | None = None

    def add(self, outputs: Tensor, batch: Batch) -> None:
        """Add the squares of a batch."""
        if self._inner is None:
            origin = self._predict(torch.zeros_like(batch.inputs[:1]))[:1]
            constant = self._spec.origin_energy - self._spec.corrected(doubled(origin))
            self._inner = _Relative(lambda made, true: (self._spec.corrected(made) + constant, true[:, 0]))
        self._inner.add(outputs, batch)

    def value(self) -> float:
        """Return the relative error; NaN without examples."""
        return math.nan if self._inner is None else self._inner.value()


class _Trajectories:
    """A number of the trajectories that begin in fixed states; no example of the split is looked at."""

    def __init__(self, spec: Any, predict: Predict, measure: Callable[[System, Tensor, Tensor], float]) -> None:
        self._spec, self._predict, self._measure = spec, predict, measure
        self._like: Tensor | None = None

    def add(self, outputs: Tensor, batch: Batch) -> None:
        """Note the type and the device of the inputs."""
        self._like = batch.inputs[:0] if self._like is None else self._like

    def value(self) -> float:
        """Follow the trajectories, and return the number; NaN without examples."""
        if self._like is None:
            return math.nan
        learned, true = trajectories(self._spec, self._predict, self._like)
        return self._measure(self._spec.system, learned, true)


def beginnings(spec: Any, count: int = TRAJECTORIES) -> Tensor:
    """Draw the states (N, D) in which trajectories begin: bounded ones, the same for every run, moved into the box if they are outside."""
    low, high = torch.tensor(spec.system.start, dtype=torch.float64).view(-1, 2).unbind(1)
    states = low + (high - low) * torch.rand(count, len(low), dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    least, most = torch.tensor(spec.box, dtype=torch.float64).view(-1, 2).unbind(1)
    return states.clamp(least, most)


def trajectories(spec: Any, predict: Predict, like: Tensor, count: int = TRAJECTORIES) -> tuple[Tensor, Tensor]:
    """Follow the learned and the true field from the same states, by the implicit midpoint rule: (steps + 1, N, D) each, on the CPU.

    Args:
        spec: of the task.
        predict: states to energies and fields.
        like: a tensor of the type and device of the inputs.
        count: of trajectories.
    """

    def learned(states: Tensor) -> Tensor:
        field = doubled(predict(states.to(like)))[: len(states), 1:]
        return field.to(states)

    states = beginnings(spec, count)
    options = {"step": spec.rollout_step, "steps": spec.rollout, "bound": BOUND}
    return rollout(learned, states, **options), rollout(spec.system.field, states, **options)


def _distance(system: System, learned: Tensor, true: Tensor) -> float:
    return float((learned - true)[1:].norm() / true[1:].norm())


def _drift(system: System, learned: Tensor, true: Tensor) -> float:
    energies = system.energy(learned.flatten(0, 1)).view(learned.shape[:2])
    return float((energies - energies[0]).abs().max() / (energies[0] - energies[0].mean()).abs().max().clamp_min(1e-12))


def _relative_field(made: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    return made[:, 1:], true[:, 1:]


ENERGY = Metric("energy_error", greater=False, summary="relative error of the energy over the split's states", begin=_Energy)
FIELD = Metric(
    "field_error",
    greater=False,
    summary="relative error of the field over the split's states",
    begin=lambda spec, predict: _Relative(_relative_field),
)
ROLLOUT = Metric(
    "rollout_error",
    greater=False,
    summary="relative distance of trajectories of the learned field from those of the true one",
    begin=lambda spec, predict: _Trajectories(spec, predict, _distance),
)
DRIFT = Metric(
    "energy_drift",
    greater=False,
    summary="largest change of the true energy along trajectories of the learned field, over the spread of the energies they begin with",
    begin=lambda spec, predict: _Trajectories(spec, predict, _drift),
)
