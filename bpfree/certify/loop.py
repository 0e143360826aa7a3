"""Training step by step on given batches: a rule's phases as the trainer goes through them, with access between the steps."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bpfree.certify import training_runs
from bpfree.certify.subject import Subject, with_views
from bpfree.network.network import evaluating
from bpfree.options import OptimizerConfig
from bpfree.rule import Rule
from bpfree.step import Batch, Budget, Phase
from bpfree.tasks.task import Split, TaskSpec
from bpfree.training.stepper import Stepper

__all__ = ["EPOCHS", "Loop", "numbered", "predict", "small_rule", "trained"]

EPOCHS = 8
MOST_PHASES = 6
"""Number of phases to go through, since a rule may have endless phases."""


class Loop(Stepper):
    """Takes a rule through its phases.

    Args:
        rule: freshly built.
        seed: of its noise.
        optimizer: in place of the rule's and its phases' own.
        phases: how many to go through at most.
    """

    def __init__(self, rule: Rule, *, seed: int = 0, optimizer: OptimizerConfig | None = None, phases: int = MOST_PHASES) -> None:
        super().__init__(rule, optimizer, seed=seed)
        self._most_phases, self._keep_optimizers = phases, optimizer is None

    def phases(self) -> list[Phase]:
        """Return the first phases of a run."""
        found = itertools.islice(self.rule.phases(Budget(epochs=EPOCHS)), self._most_phases)
        return [phase if self._keep_optimizers else replace(phase, optimizer=None) for phase in found]

    def turns(self, batches: Sequence[Batch], *, each: int) -> Iterator[Batch]:
        """Yield the batch of each step, for :meth:`take`: n steps per phase, repeating the given batches.

        A phase on features gets the rule's features of the batch.
        """
        self.prepare(_split(batches))
        phases = self.phases()
        for index, phase in enumerate(phases):
            with self.phase(phase):
                for turn, batch in enumerate(itertools.islice(itertools.cycle(batches), each)):
                    self.at((index + turn / each) / len(phases), turn / each if phase.schedule else None)
                    yield self._of_features(batch) if phase.on_features else batch
                    self.step.index = index * each + turn + 1  # also where the caller makes the step itself
                self.end_pass()
                self.end_phase()

    def _of_features(self, batch: Batch) -> Batch:
        with evaluating(self.rule), torch.no_grad():
            return with_views(Batch(self.rule.features(batch.inputs), batch.targets), self.rule.traits.views)


def _split(batches: Sequence[Batch]) -> Split:
    targets = [batch.targets for batch in batches if batch.targets is not None]
    return Split(torch.cat([batch.inputs for batch in batches]), torch.cat(targets) if targets else None)


def small_rule(subject: Subject, kind: str, spec: TaskSpec, *, seed: int = 0) -> Rule:
    """Build a small instance for a task, on a network of a kind that the rule takes."""
    return training_runs.build(subject, spec, seed=seed, specimen=subject.specimen(kind, depth=2, width=16))


def numbered(loop: Loop, batches: Sequence[Batch], *, each: int) -> Iterator[tuple[int, Batch]]:
    """Yield the loop's turns, each with its number in its phase, from 0."""
    return ((turn % each, batch) for turn, batch in enumerate(loop.turns(batches, each=each)))


def trained(rule: Rule, batches: Sequence[Batch], *, each: int, seed: int = 0) -> Rule:
    """Return the rule after n steps of each of its phases."""
    loop = Loop(rule, seed=seed)
    for batch in loop.turns(batches, each=each):
        loop.take(batch)
    return rule


@torch.no_grad()
def predict(rule: Rule, inputs: Tensor, *, seed: int = 0) -> Tensor:
    """Return the rule's predictions in eval mode, with noise from the seed."""
    with evaluating(rule):
        return rule.predict(inputs, torch.Generator(inputs.device).manual_seed(seed))
