"""Which weights above a block its learning reads, by whole runs: a matrix of verdicts by bits, and what they rest on."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from bpfree.certify.arms import Arm, Reference, WholeRun
from bpfree.certify.subject import Subject
from bpfree.certify.transport import chained_transport
from bpfree.certify.whole_runs import EPOCHS, run_arm
from bpfree.tasks.task import Examples, Task

__all__ = ["Cell", "Reading", "Verdict", "control_of", "first_inputs", "measure_reading", "read_matrix"]

Run = Callable[[Arm, int], WholeRun]
Control = dict[str, dict[str, float]]
"""Relative change of a block's gradient, by the block and by the dirty block above it."""

Verdict = Literal["none", "reads", "passed on", "executes", "statistics", "at construction", "unmeasured"]
"""What the learning of a block has of the weights of one above it.

``reads``: it is a function of them. ``passed on``: it is not, and changes only because blocks in between have read them. ``executes``: it
is not, as long as executions on other inputs than a step's first have other weights' values: it finds them out by executing the block.
``at construction``: a function of them as they were before the first step. ``statistics``: only of what a permutation of these leaves, such
as a norm by which feedback is scaled.
"""
EXAMPLES = 64
"""Examples of the positive control."""
PLACEBOS = 20
TIMES, LEAST = 10, {True: 1e-9, False: 1e-4}
"""Where bits cannot agree, a relative change counts if it is more than ``TIMES`` times the largest of all placebos, and more than
``LEAST[double]``: in double precision, or in single."""
SAME = 1e-3
"""Relative change up to which weights count as the same after a permutation, whose sums are rounded in another order."""
SEEN = 1e-3
"""Relative difference of cotangents from which a rule that sends one through the dirty parameters would be seen."""


@dataclass(frozen=True)
class Cell:
    """One entry of the matrix.

    Attributes:
        verdict: what was found.
        first: step after which the weights first differed, from 1; -1: when training began. 0: never.
        relative: the difference at the end of the run over how far the block moved.
        why: the reason, if it is unmeasured.
    """

    verdict: Verdict
    first: int = 0
    relative: float = 0.0
    why: str = ""


@dataclass
class Reading:
    """The matrix: rows are blocks that learn, columns blocks above them.

    Attributes:
        blocks: names, first to last.
        cells: [learning block][block above].
        task, steps: what it was measured on.
        draw: seed of the dirty parameters.
        transport: relative difference of cotangents through clean and dirty parameters, by block: the positive control.
        silent: blocks that do not learn.
        exact: whether verdicts are by bits; otherwise by ``threshold``, the relative change that counts.
        threshold: 0 where bits agree.
        exchanged: whether the rule exchanged the parameters of the network that it was given.
        trouble: why nothing could be measured.
    """

    blocks: list[str] = field(default_factory=list)
    cells: dict[str, dict[str, Cell]] = field(default_factory=dict)
    task: str = ""
    steps: int = 0
    draw: int = 0
    transport: dict[str, float] = field(default_factory=dict)
    silent: list[str] = field(default_factory=list)
    exact: bool = True
    threshold: float = 0.0
    exchanged: bool = False
    trouble: str = ""

    def found(self, *verdicts: Verdict, beyond: int = 0) -> list[tuple[str, str, Cell]]:
        """List the entries with one of these verdicts, of pairs more than ``beyond`` blocks apart, the farthest first."""
        places = {name: place for place, name in enumerate(self.blocks)}
        listed = [
            (places[above] - places[below], below, above, cell)
            for below, row in self.cells.items()
            for above, cell in row.items()
            if cell.verdict in verdicts and places[above] - places[below] > beyond
        ]
        return [(below, above, cell) for _, below, above, cell in sorted(listed, key=lambda entry: -entry[0])]

    def reach(self, *verdicts: Verdict) -> int:
        """Return how many blocks lie between the farthest pair with one of these verdicts, plus one; 0: there is none."""
        pairs = self.found(*verdicts)
        return self.blocks.index(pairs[0][1]) - self.blocks.index(pairs[0][0]) if pairs else 0

    def to_dict(self) -> dict[str, Any]:
        """Return the matrix as plain values."""
        rows = {
            below: {
                above: {
                    "verdict": cell.verdict,
                    **({"first_step": cell.first, "relative": float(f"{cell.relative:.3g}")} if cell.first else {}),
                    **({"why": cell.why} if cell.why else {}),
                }
                for above, cell in row.items()
            }
            for below, row in self.cells.items()
        }
        return {
            "blocks": self.blocks,
            "cells": rows,
            "task": self.task,
            "steps": self.steps,
            "draw": self.draw,
            "transport": {name: float(f"{value:.3g}") for name, value in self.transport.items()},
            "silent": self.silent,
            "exact": self.exact,
            "threshold": self.threshold,
            "exchanged": self.exchanged,
            "trouble": self.trouble,
        }


def measure_reading(subject: Subject, reference: Reference, task: Task, *, draw: int, epochs: int = EPOCHS) -> Reading:
    """Examine each block above the first, each over whole runs.

    Args:
        subject: the rule.
        reference: its recorded run.
        task: of that run.
        draw: seed of the dirty parameters.
        epochs: of that run.
    """

    def run(arm: Arm, drawn: int) -> WholeRun:
        return run_arm(subject, arm, reference, task, draw=drawn, epochs=epochs)

    return read_matrix(reference, run, draw=draw, control=control_of(reference, task, draw))


def first_inputs(split: Examples, task: Task, count: int) -> Any:
    """Return the first examples of a split as networks see them."""
    raw, _ = split.batch(torch.arange(min(count, len(split))))
    return task.spec.normalise(raw)


def control_of(reference: Reference, task: Task, draw: int) -> Control | None:
    """Send a cotangent down the network of a run, where that is a chain whose parameters the rule has left in place."""
    if reference.network is None or not reference.network.chain or reference.exchanged:
        return None
    return chained_transport(reference.network, reference.after[-1], first_inputs(task.train, task, EXAMPLES), draw)


def read_matrix(reference: Reference, run: Run, *, draw: int, control: Control | None = None, since: str = "network") -> Reading:
    """Fill the matrix from whole runs.

    Args:
        reference: the recorded run.
        run: makes a run with a change, with a seed of what is drawn for it.
        draw: the first of these seeds.
        control: what transport changes in each block, by the dirty block above; ``None``: the network is no chain, and each block's own
            cotangents have to suffice.
        since: from when on weights are dirty (``Arm.since``); ``start`` in forks, whose weights come from a checkpoint.
    """
    return _Examination(reference, run, draw, control, since).measure()


class _Examination:
    def __init__(self, reference: Reference, run: Run, draw: int, control: Control | None, since: str) -> None:
        self._reference, self._make, self._draw, self._control, self._since = reference, run, draw, control, since
        silent = [name for name in reference.blocks if not reference.moved(name)]
        self.found = Reading(list(reference.blocks), {}, steps=reference.steps, draw=draw, silent=silent, exchanged=reference.exchanged)

    def measure(self) -> Reading:
        control = WholeRun(Arm(None)) if self._reference.exchanged else self._run(Arm(None))
        if self._reference.exchanged:
            self.found.trouble = "the rule exchanged or rearranged the parameters of the network that it was given"
        elif control.trouble:
            self.found.trouble = f"executing its blocks twice ends the run: {control.trouble}"
        elif apart := max((change.largest for change in control.changes.values() if change.differs), default=0.0):
            self._calibrate(apart)
        for name in self.found.blocks[1:]:
            self._column(name)
        return self.found

    def _run(self, arm: Arm, further: int = 0) -> WholeRun:
        return self._make(arm if self._since == "network" else replace(arm, since=self._since), self._draw + further)

    def _calibrate(self, apart: float) -> None:
        """Find the relative change that counts, where not even two runs without a change agree bit for bit."""
        if apart > SAME:
            self.found.trouble = (
                f"two runs of the same seed end with other weights (by {apart:.2g} of how far they moved): they depend on the clock, on "
                "what earlier runs have left, or on how blocks are executed"
            )
            return
        runs = [self._run(Arm(None, rounding=True), number) for number in range(PLACEBOS)]
        double = any(p.dtype == torch.float64 for own in self._reference.initial.values() for p in own.values())
        changes = [value for run in runs for change in run.changes.values() for value in change.relative]
        self.found.exact, self.found.threshold = False, max(LEAST[double], TIMES * max(changes, default=0.0))

    def _column(self, name: str) -> None:
        below = [row for row in self.found.blocks[: self.found.blocks.index(name)] if row not in self.found.silent]
        verdicts = {row: Cell("unmeasured", why=self.found.trouble) for row in below}
        if not self.found.trouble:
            whole = self._run(Arm(name, alter=True, strict=True))
            self.found.transport[name] = whole.transport
            reason = self._reason(whole, name)
            reasons = {row: reason or self._uncontrolled(row, name) for row in below}
            verdicts = {row: Cell("unmeasured", why=why) if why else Cell("none") for row, why in reasons.items()}
            if self._differing(whole):
                verdicts |= self._explained(name, whole)
        for row in below:
            self.found.cells.setdefault(row, {})[name] = verdicts[row]

    def _uncontrolled(self, row: str, name: str) -> str:
        """Say why a chained cotangent would not be seen in a block; empty if it would, or if there is no chain."""
        if self._control is None or not self._reference.initial[name] or self._control.get(row, {}).get(name, 0.0) >= SEEN:
            return ""
        return (
            f"a cotangent that is sent from the output to {row!r} is the same with other weights of {name!r}, so transport would not show"
        )

    def _reason(self, run: WholeRun, name: str) -> str:
        """Say why equal weights would show nothing; empty if they do."""
        if run.trouble:
            return f"the run fails on other weights of {name!r}: {run.trouble}"
        if run.changed:
            return run.changed
        if run.overwritten:
            return f"the weights of {name!r} are overwritten by what the rule keeps elsewhere (in {run.overwritten} places)"
        if not self._reference.initial[name]:
            return ""  # without parameters there is nothing to read
        if run.transport < SEEN:
            return f"a cotangent through the dirty parameters of {name!r} is the same: transport would not be seen"
        return ""

    def _differing(self, run: WholeRun) -> dict[str, Cell]:
        """Return the blocks whose weights differ, with when and by how much."""
        found = {}
        for name, change in run.changes.items():
            counts = change.differs if self.found.exact else _holds(change.relative, self.found.threshold)
            if counts:
                found[name] = Cell("reads", change.first, change.relative[-1] if change.relative else 0.0)
        return found

    def _explained(self, name: str, whole: WholeRun) -> dict[str, Cell]:
        """Tell apart why blocks end with other weights: each further run explains some of those that are left."""
        open_rows = self._differing(whole)
        found = self._differing(self._run(Arm(name, since="start")))
        if len({cell.first for cell in found.values()}) > 1:
            direct = self._differing(self._run(Arm(name, since="start", tethered=True)))
            found = {row: cell if row in direct else replace(cell, verdict="passed on") for row, cell in found.items()}
        if not open_rows.keys() <= found.keys() and self._since == "network":
            found = self._at_construction(name) | found
        if not open_rows.keys() <= found.keys():
            executed = self._differing(self._run(Arm(name, alter=True)))
            found = {row: replace(cell, verdict="executes") for row, cell in executed.items()} | found
        noise = f"it changes with what {name!r} makes of inputs that are no outputs of the block below, such as noise of the rule's own"
        return {row: replace(cell, verdict="unmeasured", why=noise) for row, cell in open_rows.items()} | found

    def _at_construction(self, name: str) -> dict[str, Cell]:
        early = self._differing(self._run(Arm(name)))
        if not early:
            return {}
        gentle = self._run(Arm(name, until="start", gentle=True))
        same = not gentle.trouble and all(value <= SAME for change in gentle.changes.values() for value in change.relative)
        verdict: Verdict = "statistics" if same else "at construction"
        return {row: replace(cell, verdict=verdict) for row, cell in early.items()}


def _holds(changes: tuple[float, ...], threshold: float) -> bool:
    """Tell whether two of three moments exceed the threshold."""
    return len(changes) > 1 and statistics.median(changes) > threshold
