"""Streams: tasks that are learned in stages, one after the other, and the examples that are kept of earlier stages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from bpfree.errors import UsageError
from bpfree.seeds import derive
from bpfree.step import Budget, Phase, Stage

__all__ = ["Memory", "chosen", "herded", "stages_from", "walk"]


class HasPhases(Protocol):
    """The part of a rule that this module uses."""

    def phases(self, budget: Budget) -> Iterable[Phase]:
        """Return the phases of a run."""


@dataclass(frozen=True)
class Memory:
    """The number of examples of earlier stages that later ones train on again.

    Attributes:
        total: examples in all, shared evenly by the classes seen so far; ``None``: ``per_class`` decides.
        per_class: examples of each class; for streams without new classes of each stage.
        choose: ``random``, or ``herding``: those whose mean of features, one by one, stays nearest to their class's (Rebuffi et al. 2017,
            algorithm 4).
    """

    total: int | None = None
    per_class: int | None = None
    choose: Literal["random", "herding"] = "random"

    def __post_init__(self) -> None:
        if (self.total is None) == (self.per_class is None) or min(self.total or 1, self.per_class or 1) < 1:
            raise UsageError("a memory has a total or a number per class, of 1 or more", where="Memory", fix="Memory(total=2000)")

    def each(self, groups: int) -> int:
        """Return the number of examples of each of n classes."""
        return self.per_class if self.per_class is not None else (self.total or 0) // max(1, groups)


def stages_from(recorded: Sequence[Mapping[str, Any]]) -> tuple[Stage, ...]:
    """Read the stages of a checkpoint, which have no examples."""
    return tuple(Stage(str(each["name"]), int(each["index"]), tuple(each["classes"])) for each in recorded)


def walk(rule: HasPhases, budget: Budget, stages: Sequence[Stage]) -> Iterator[Stage | Phase]:
    """Yield the phases of a run; in a stream each stage and then its phases, whose share of the budget ends them.

    Args:
        rule: whose phases.
        budget: of the run; epochs are those of each stage, everything else is shared evenly by the stages.
        stages: of the task; none: it is no stream.
    """
    if not stages:
        yield from rule.phases(budget)
        return
    count = len(stages)
    share = Budget(
        budget.epochs,
        None if budget.samples is None else max(1, budget.samples // count),
        *(None if value is None else value / count for value in (budget.seconds, budget.forwards, budget.operations)),
    )
    for stage in stages:
        yield stage
        for phase in rule.phases(share):
            yield _closed(phase, share)


def _closed(phase: Phase, share: Budget) -> Phase:
    """Let a phase without an end of its own end with its stage's share of the budget."""
    if not phase.is_open:
        return phase
    return replace(phase, epochs=share.epochs, seconds=share.seconds, forwards=share.forwards, operations=share.operations)


def chosen(memory: Memory, targets: Tensor, features: Tensor | None, groups: int, seed: int, stage: int) -> list[Tensor]:
    """Choose the examples to keep of a stage: positions among its examples, by class, the most useful first.

    Args:
        memory: how many, and how.
        targets: (M,) classes of the stage's examples, or (M, ...) of other kinds, which are one group.
        features: (M, F) of the examples, for herding.
        groups: classes seen so far.
        seed, stage: of a random choice.
    """
    labels = targets if targets.dim() == 1 and not targets.is_floating_point() else torch.zeros(len(targets), dtype=torch.long)
    found = []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        count = min(memory.each(groups), len(members))
        if memory.choose == "herding" and features is not None:
            found.append(members[herded(features[members], count)])
        else:
            generator = torch.Generator().manual_seed(derive(seed, "memory", stage, label))
            found.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return found


def herded(features: Tensor, count: int) -> Tensor:
    """Choose ``count`` rows (M, F) one by one, so that their mean stays nearest to the mean of all (Rebuffi et al. 2017, algorithm 4)."""
    rows = torch.nn.functional.normalize(features.double().flatten(1), dim=1)
    mean, total = rows.mean(0), torch.zeros(rows.shape[1], dtype=torch.float64)
    free, found = torch.ones(len(rows), dtype=torch.bool), []
    for number in range(1, count + 1):
        distance = (mean - (total + rows) / number).pow(2).sum(1)
        best = int(distance.masked_fill(~free, torch.inf).argmin())
        free[best] = False
        total += rows[best]
        found.append(best)
    return torch.tensor(found, dtype=torch.long)
