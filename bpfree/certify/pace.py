"""How long a step takes: processor time beside back-propagation's on the same network, in neighbouring pairs."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from bpfree.baselines import Backprop
from bpfree.certify.probe import PLAIN, Probe, Sampling
from bpfree.certify.subject import Specimen, Subject, batches
from bpfree.errors import UsageError
from bpfree.rule import Rule
from bpfree.step import Batch, Step
from bpfree.training.stepper import new_step

__all__ = ["CLOCK", "Lap", "measure_time", "ratio"]

CLOCK = "processor"
"""Kind of seconds in a certificate; times of other kinds, from earlier versions, are not shown."""
EXAMPLES = 64
PHASES = 8
PAIRS = 40
"""Pairs of steps in each phase."""
LEAST = 20
SPREAD = 1.5
"""Largest factor between the quartiles of the ratios; beyond it the machine was measured, not the rule."""
SHARES = (0.1, 1.1)
"""Processor seconds over wall seconds of one thread: below this range the step waits, above it other threads work for it."""


@dataclass(frozen=True)
class Lap:
    """How long something took, in seconds.

    Attributes:
        processor: of all threads of this process.
        wall: by the clock.
    """

    processor: float
    wall: float


def measure_time(subject: Subject, specimen: Specimen) -> dict[str, float | None]:
    """Return the processor seconds of a step over those of back-propagation's on the same network and examples, by phase.

    Each step of the rule has one of back-propagation beside it, in turns before and after it. In a phase on features the step itself
    is timed, without the features.

    Returns:
        the median over the pairs; ``None``: unmeasured, see :func:`ratio`. Empty where back-propagation cannot train the network.
    """
    probe = Probe(subject, specimen, Sampling(samples=EXAMPLES, steps=PAIRS, phases=PHASES), dtype=torch.float32)
    raw = batches(specimen.spec, EXAMPLES, 1, dtype=torch.float32, views=subject.views)[0]
    pairs: dict[str, list[tuple[Lap, Lap]]] = {}
    reference: list[tuple[Backprop, Step]] = []

    def reference_step() -> None:
        reference[0][0].learn(raw, reference[0][1])

    @contextmanager
    def watch(rule: Rule, batch: Batch, step: Step) -> Iterator[None]:
        if not reference:
            other = Backprop(copy.deepcopy(rule.network).requires_grad_(True), rule.spec)
            reference.append((other, new_step(other, PLAIN)))
            reference_step()  # lazy set-up
        found = pairs.setdefault(step.phase.name, [])
        laps: list[Lap] = []
        before = len(found) % 2 == 0
        if before:
            with _timed(laps):
                reference_step()
        with _timed(laps):
            yield
        if not before:
            with _timed(laps):
                reference_step()
        found.append((laps[1], laps[0]) if before else (laps[0], laps[1]))

    try:
        probe.run(watch=watch)
    except UsageError:  # no chain, or no readout
        return {}
    return {phase: ratio(found) for phase, found in pairs.items()}


@contextmanager
def _timed(laps: list[Lap]) -> Iterator[None]:
    wall, processor = time.perf_counter(), time.process_time()
    yield
    laps.append(Lap(time.process_time() - processor, time.perf_counter() - wall))


def ratio(pairs: Sequence[tuple[Lap, Lap]]) -> float | None:
    """Return the median ratio of paired processor seconds, the rule's over back-propagation's; ``None``: unmeasured.

    That is where there are fewer than 20 pairs, where the quartiles of the ratios are further apart than a factor of 1.5, and where
    the processor's share of the wall seconds of either is not that of one thread at work (0.1 to 1.1).
    """
    if len(pairs) < LEAST or not all(_plausible([pair[side] for pair in pairs]) for side in (0, 1)):
        return None
    ratios = [ours.processor / theirs.processor for ours, theirs in pairs if theirs.processor > 0]
    if len(ratios) < LEAST:
        return None
    low, middle, high = statistics.quantiles(ratios, n=4)
    return round(middle, 2) if low > 0 and high <= SPREAD * low else None


def _plausible(laps: Sequence[Lap]) -> bool:
    wall = sum(lap.wall for lap in laps)
    return wall > 0 and SHARES[0] <= sum(lap.processor for lap in laps) / wall <= SHARES[1]
