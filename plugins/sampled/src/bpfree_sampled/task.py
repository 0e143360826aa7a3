"""The task ``hamiltonian``: learn the energy of a system from its field, or from states along trajectories.

Outputs and targets are (N, 1 + D): the energy, then the field (dH/dp, -dH/dq). The loss is of the field alone; the energy in the targets is
for metrics, and for the one sampling that is said to know it (``rule.sampling=swim``). A field determines its energy up to a constant, so
that the energy of the state x = 0, which is given, fixes the constant of every learned energy before it is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from bpfree import Batch, DataSource, Split, TaskSpec, UsageError, option
from bpfree.metric import Metric
from bpfree_sampled import scores
from bpfree_sampled.systems import SYSTEMS, System

__all__ = ["HAMILTONIAN", "HamiltonianConfig", "HamiltonianSpec", "flow", "observed"]

Observed = Literal["derivatives", "midpoints", "euler"]
PARTS = 40
"""Steps of Runge-Kutta between two observations."""


@dataclass
class HamiltonianConfig:
    """A system, the box in which it is observed, and what is observed."""

    equations: Literal["pendulum", "spring", "lotka-volterra", "double-pendulum", "henon-heiles"] = option(
        "pendulum", "of motion; all constants are 1"
    )
    box: list[float] = option(
        factory=list, help="lowest and highest value of each coordinate, q first (two numbers: of all of them); []: the system's own"
    )
    examples: int = option(2000, "states to learn from, uniform in the box", ge=2)
    validation_examples: int = option(500, "states to choose by; 0: none (task.validation has no effect on this task)", ge=0)
    test_examples: int = option(2000, "states to be tested on", ge=1)
    data_seed: int = option(0, "of the states; independent of seed", ge=0)
    observe: Observed = option(
        "derivatives",
        "exact derivatives at the states; or differences over a step of the trajectory from each, taken for the field between the two "
        "(midpoints), or at (q of the second, p of the first), whose error of first order is corrected in the energy (euler)",
    )
    step: float = option(0.1, "time between two observations", gt=0, needs={"observe": ("midpoints", "euler")})
    rollout: int = option(100, "steps of the trajectories that are compared; 0: none are", ge=0)
    rollout_step: float = option(0.05, "time of a step of these", gt=0, unless={"rollout": (0,)})


@dataclass(frozen=True)
class HamiltonianSpec(TaskSpec):
    """Describe a Hamiltonian system: states (q, p), with energies and fields as targets.

    Attributes:
        equations: name of the system.
        box: lowest and highest value of each coordinate, one after the other.
        correction: half the step that the learned energy is corrected for (``observe=euler``); 0: none.
        rollout, rollout_step: steps of trajectories that metrics follow, and their time.
    """

    equations: str = "pendulum"
    box: tuple[float, ...] = ()
    correction: float = 0.0
    rollout: int = 0
    rollout_step: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if set(self.mean) != {0.0} or set(self.std) != {1.0} or self.scale not in (None, 1.0):
            what = "states are taken as they are, since derivatives are by these coordinates"
            raise UsageError(what, where=f"task {self.name}", fix="leave task.normalise, task.mean and task.std as they are")

    @property
    def system(self) -> System:
        """The system itself."""
        return SYSTEMS[self.equations]

    @property
    def origin_energy(self) -> float:
        """The energy of the state x = 0."""
        return float(self.system.energy(torch.zeros(1, self.input_size, dtype=torch.float64)))

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Compute half the squared error of the field, summed over coordinates, mean over states."""
        return self.losses(outputs, batch).mean()

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Compute half the squared error of the field of each state, (N,)."""
        assert batch.targets is not None
        return 0.5 * (outputs - self.beside(outputs, batch.targets))[:, 1:].square().sum(1)

    def error(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Compute dLoss/dOutputs (N, 1 + D); that of the energy is 0."""
        assert batch.targets is not None
        with torch.no_grad():
            made = (outputs - self.beside(outputs, batch.targets)) / len(outputs)
            made[:, 0] = 0
            return made

    def corrected(self, outputs: Tensor) -> Tensor:
        """Return energies (N,) of outputs (N, 1 + D), corrected to second order for ``observe=euler``: H + h/2 dH/dq . dH/dp."""
        by_p, negative_by_q = outputs[:, 1:].chunk(2, dim=1)
        return outputs[:, 0] - self.correction * (by_p * negative_by_q).sum(1)

    def metrics(self) -> Sequence[Metric]:
        """Return the metrics of energy and field, and those of trajectories where these are followed."""
        return [scores.ENERGY, scores.FIELD, *([scores.ROLLOUT, scores.DRIFT] if self.rollout else [])]

    def example(self, count: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Make up states, uniform in the box."""
        return drawn(self.box, count, generator).to(dtype)

    def example_targets(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Make up targets of as many states."""
        return _targets(self.system, drawn(self.box, count, generator)).float()


def drawn(box: Sequence[float], count: int, generator: torch.Generator | None) -> Tensor:
    """Draw states (N, D), uniform in a box, in double precision."""
    low, high = torch.tensor(box, dtype=torch.float64).view(-1, 2).unbind(1)
    return low + (high - low) * torch.rand(count, len(low), dtype=torch.float64, generator=generator)


def _targets(system: System, states: Tensor) -> Tensor:
    return torch.cat([system.energy(states)[:, None], system.field(states)], dim=1)


def flow(system: System, states: Tensor, time: float) -> Tensor:
    """Follow the true trajectories for a time, by the classical Runge-Kutta method of fourth order in 40 steps."""
    h, f = time / PARTS, system.field
    for _ in range(PARTS):
        a = f(states)
        b = f(states + h / 2 * a)
        c = f(states + h / 2 * b)
        states = states + h / 6 * (a + 2 * b + 2 * c + f(states + h * c))
    return states


def observed(system: System, states: Tensor, observe: Observed, step: float) -> Split:
    """Return what is observed at states (N, D): where, and the energy and the field, exactly or by differences."""
    if observe == "derivatives":
        return Split(states, _targets(system, states))
    later, d = flow(system, states, step), system.freedoms
    places = (states + later) / 2 if observe == "midpoints" else torch.cat([later[:, :d], states[:, d:]], 1)
    return Split(places, torch.cat([system.energy(places)[:, None], (later - states) / step], 1))


def _box(config: HamiltonianConfig) -> tuple[float, ...]:
    system = SYSTEMS[config.equations]
    box = tuple(config.box) * (2 * system.freedoms if len(config.box) == 2 else 1) or system.box
    if len(box) != 4 * system.freedoms or any(not low < high for low, high in zip(box[::2], box[1::2], strict=True)):
        what = f"{config.equations} has the coordinates {', '.join(system.names)}, so a box has {4 * system.freedoms} numbers, or 2"
        raise UsageError(what, where=f"task.box={list(config.box)}", fix="give the lowest and the highest value of each")
    return tuple(float(value) for value in box)


def spec(config: HamiltonianConfig, root: Path | None) -> HamiltonianSpec:
    """Describe the system."""
    size = 2 * SYSTEMS[config.equations].freedoms
    return HamiltonianSpec(
        f"hamiltonian-{config.equations}",
        (size,),
        1 + size,
        "real",
        scale=1.0,
        output_shape=(1 + size,),
        input_names=SYSTEMS[config.equations].names,
        equations=config.equations,
        box=_box(config),
        correction=config.step / 2 if config.observe == "euler" else 0.0,
        rollout=config.rollout,
        rollout_step=config.rollout_step,
    )


def load(config: HamiltonianConfig, root: Path | None) -> tuple[Split, Split | None, Split]:
    """Draw states; those of validation and test are observed exactly."""
    system, box = SYSTEMS[config.equations], _box(config)
    counts = (config.examples, config.validation_examples, config.test_examples)
    states = [drawn(box, count, torch.Generator().manual_seed(3 * config.data_seed + place)) for place, count in enumerate(counts)]
    train = observed(system, states[0], config.observe, config.step)
    exact = [observed(system, each, "derivatives", config.step) for each in states[1:]]
    return train, exact[0] if config.validation_examples else None, exact[1]


HAMILTONIAN = DataSource(
    spec, load, HamiltonianConfig, "the energy of a pendulum, a spring or another Hamiltonian system, from its field (no download)"
)
