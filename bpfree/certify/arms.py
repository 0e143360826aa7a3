"""What is done to one block in a whole run, and what the run is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from bpfree.certify.twice import EQUAL, Record
from bpfree.network.network import Network

__all__ = ["Arm", "Change", "Reference", "Weights", "WholeRun"]

Weights = dict[str, dict[str, Tensor]]
"""Parameters by block and name."""


@dataclass(frozen=True)
class Arm:
    """What is done to one block in a run.

    Attributes:
        block: its name; ``None``: to none, so that only the doubled executions themselves are tried.
        alter: whether executions on other inputs than a step's first have the values of other weights.
        since: ``network``: before the rule is given it; ``start``: after the rule was built and prepared.
        until: ``end`` of the run, or ``start``: dirty only while the rule is built and prepared.
        gentle: permuted only, which keeps norm, mean and deviation.
        rounding: change each value of doubled executions by its rounding, as a placebo.
        strict: with ``alter``: also executions on inputs that are no outputs of the block below.
        tethered: set the blocks below to the reference's weights after each step too, so that only what a block itself reads shows.
    """

    block: str | None
    alter: bool = False
    since: str = "network"
    until: str = "end"
    gentle: bool = False
    rounding: bool = False
    strict: bool = False
    tethered: bool = False


@dataclass
class Change:
    """How far the weights of a block are from the reference's.

    Attributes:
        first: step after which they first differed, from 1; 0: never, -1: before the first step.
        relative: after a third, two thirds and all of the steps: the norm of the difference over how far the block moved in the whole
            run, or over its size where it has not moved.
    """

    first: int = 0
    relative: tuple[float, ...] = ()

    @property
    def largest(self) -> float:
        """The largest relative difference."""
        return max(self.relative, default=0.0)

    @property
    def differs(self) -> bool:
        """Whether any bit is another one, at any time."""
        return self.first != 0


@dataclass
class Reference:
    """The recorded run.

    Attributes:
        record: its executions.
        network: that the rule was given.
        before, after: weights around each step, by block and name.
        initial, final: weights as the rule was given them, and at the end of training.
        steps: number of updates.
        exchanged: whether the rule has a network of other parameters than those it was given.
    """

    record: Record
    network: Network | None = None
    before: list[Weights] = field(default_factory=list)
    after: list[Weights] = field(default_factory=list)
    initial: Weights = field(default_factory=dict)
    final: Weights = field(default_factory=dict)
    exchanged: bool = False

    @property
    def steps(self) -> int:
        return len(self.after)

    @property
    def blocks(self) -> list[str]:
        """Names, first to last."""
        return list(self.initial)

    def moved(self, block: str) -> bool:
        """Whether the block has learned."""
        return any(name not in self.final[block] or not EQUAL(p, self.final[block][name]) for name, p in self.initial[block].items())


@dataclass
class WholeRun:
    """What a run showed.

    Attributes:
        arm: what was done.
        changes: of the blocks below, or of all without a block.
        transport: relative difference of cotangents through the clean and the dirty parameters: that a rule which sends one would be seen.
        overwritten: steps in which the block's dirty parameters became the reference's again, which the rule keeps elsewhere.
        changed: what the rule changed about how the block is executed.
        trouble: how the run ended before its time.
    """

    arm: Arm
    changes: dict[str, Change] = field(default_factory=dict)
    transport: float = 0.0
    overwritten: int = 0
    changed: str = ""
    trouble: str = ""
