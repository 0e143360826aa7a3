"""Measurements of single steps that leave the run unchanged, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol

from bpfree.rule import Metrics
from bpfree.step import Batch, Step
from bpfree.training.meters import Clock

__all__ = ["StepProbe", "Take", "take_step"]

Take = Callable[[Batch, Step], Metrics]
"""Takes a step, and returns its metrics."""


class StepProbe(Protocol):
    """Measures some of a run's steps.

    The order of probes (``State.probes``, the outermost first) matters. Compilation comes first: it takes back the time of a whole step,
    so that this must have been noted by then. Alignment meets the weights before the step and puts them back, so that what is inside of it
    sees one step only, and counts none of its operations. Operations surround memory, because a count that fails puts everything back and
    takes the step again, which is to be watched as well, and because the copy that it keeps for that is not the step's memory.
    """

    def wants(self, batch: Batch, step: Step) -> bool:
        """Tell whether to measure the next step; called once for each step."""

    def around(self, take: Take, clock: Clock, batch: Batch, step: Step) -> Metrics:
        """Take the step, and measure before, after or around it.

        Args:
            take: the step, with what the next probes do.
            clock: of training. What must not count is done while it is :meth:`~bpfree.training.meters.Clock.stopped`; a step that is taken
                meanwhile, because measuring makes it slow, is charged by others of its kind.
            batch, step: for ``take``.

        Returns:
            the step's metrics, and perhaps further ones, by their full names.
        """


def take_step(probes: Iterable[StepProbe], take: Take, clock: Clock, batch: Batch, step: Step) -> Metrics:
    """Take a step inside the probes that want to measure it."""
    wanted = [probe for probe in probes if probe.wants(batch, step)]
    if not wanted:
        return take(batch, step)

    def timed(batch: Batch, step: Step) -> Metrics:
        with clock.measuring():
            return take(batch, step)

    inner: Take = timed
    for probe in reversed(wanted):
        inner = partial(probe.around, inner, clock)
    return inner(batch, step)
