"""Training step by step on given batches: a rule's phases as the trainer goes through them, with access between the steps."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from bpfree.certify import practice
from bpfree.certify.subject import Specimen, Subject
from bpfree.network.network import evaluating
from bpfree.options import OptimizerConfig
from bpfree.rule import Metrics, Rule
from bpfree.seeds import KeyedGenerators, derive
from bpfree.step import Batch, Budget, Phase, Step
from bpfree.tasks.task import Split, TaskSpec
from bpfree.training.phases import learning
from bpfree.training.updater import Updater

__all__ = ["EPOCHS", "Loop", "numbered", "predict", "small_rule", "trained"]

EPOCHS = 8
MOST_PHASES = 6
"""A rule may have endless phases; the first ones are taken for all."""


class Loop:
    """Takes a rule through its phases.

    The loop has a state of torch's global generator of its own, which is set while the rule runs and put aside between its steps, so
    that loops can be interleaved.

    Args:
        rule: freshly built.
        seed: of its noise.
        optimizer: in place of the rule's and its phases' own.
        phases: how many to go through at most.

    Attributes:
        rule: as given.
        updater: applies its updates.
        step: what it is handed; advanced after each turn.
    """

    def __init__(self, rule: Rule, *, seed: int = 0, optimizer: OptimizerConfig | None = None, phases: int = MOST_PHASES) -> None:
        self.rule, self._most_phases = rule, phases
        self._keep_optimizers = optimizer is None
        self.updater = Updater(rule, optimizer)
        device = next(rule.parameters()).device
        generator = torch.Generator(device).manual_seed(derive(seed, "noise"))
        keyed = KeyedGenerators(seed, device, lambda: (self.step.index, self.step.part))
        self.step = Step(generator, keyed, self.updater.apply, self.updater.lr, Phase())
        self._global = torch.Generator().manual_seed(derive(seed, "global")).get_state()

    def phases(self) -> list[Phase]:
        """The first phases of a run."""
        found = itertools.islice(self.rule.phases(Budget(epochs=EPOCHS)), self._most_phases)
        return [phase if self._keep_optimizers else replace(phase, optimizer=None) for phase in found]

    def turns(self, batches: Sequence[Batch], *, each: int) -> Iterator[Batch]:
        """The batch of each step to come, for :meth:`learn`: so many steps per phase, repeating the given batches.

        A phase on features gets the rule's features of the batch.
        """
        with self._world():
            self.rule.prepare(_split(batches), self.step.generator)
        phases = self.phases()
        for index, phase in enumerate(phases):
            self._enter(phase)
            with learning(self.rule, phase):
                for turn, batch in enumerate(itertools.islice(itertools.cycle(batches), each)):
                    self.step.progress = (index + turn / each) / len(phases)
                    self.updater.at(turn / each if phase.schedule else self.step.progress)
                    yield self._of_features(batch) if phase.on_features else batch
                    self.step.index += 1
                self.step.epoch += 1
                with self._world():
                    self.rule.end_phase(phase, self.step)

    def learn(self, batch: Batch) -> Metrics:
        """Take the step."""
        with self._world():
            return self.rule.learn(batch, self.step)

    def _enter(self, phase: Phase) -> None:
        with self._world():
            self.rule.start_phase(phase)
        self.updater.start_phase(phase)
        self.step.phase = phase

    def _of_features(self, batch: Batch) -> Batch:
        with evaluating(self.rule), torch.no_grad():
            return Batch(self.rule.features(batch.inputs), batch.targets)

    @contextmanager
    def _world(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._global)
            yield
            self._global = torch.get_rng_state()


def _split(batches: Sequence[Batch]) -> Split:
    targets = [batch.targets for batch in batches if batch.targets is not None]
    return Split(torch.cat([batch.inputs for batch in batches]), torch.cat(targets) if targets else None)


def small_rule(subject: Subject, kind: str, spec: TaskSpec, *, seed: int = 0) -> Rule:
    """A small instance for a task, on a network of the kind that the rule takes."""
    return practice.build(subject, spec, seed=seed, specimen=Specimen(kind, depth=2, width=16))


def numbered(loop: Loop, batches: Sequence[Batch], *, each: int) -> Iterator[tuple[int, Batch]]:
    """The loop's turns, each with its number in its phase, from 0."""
    return ((turn % each, batch) for turn, batch in enumerate(loop.turns(batches, each=each)))


def trained(rule: Rule, batches: Sequence[Batch], *, each: int, seed: int = 0) -> Rule:
    """The rule after so many steps of each of its phases."""
    loop = Loop(rule, seed=seed)
    for batch in loop.turns(batches, each=each):
        loop.learn(batch)
    return rule


@torch.no_grad()
def predict(rule: Rule, inputs: Tensor, *, seed: int = 0) -> Tensor:
    """The rule's predictions in eval mode, with noise from the seed."""
    with evaluating(rule):
        return rule.predict(inputs, torch.Generator(inputs.device).manual_seed(seed))
