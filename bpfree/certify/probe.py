"""One examined trajectory: a rule takes its steps from fixed weights, and every block's update is noted.

It begins near the rule's own initialisation, every parameter moved a little. After each step the parameters go back to where they were, so
that steps at other batches and in other phases are all taken from the same weights, and two trajectories differ by what was done to these
and by nothing else. A rule's other state (buffers, copies of weights that it made when a phase began) goes on.

The update of a block is what ``learn`` does to its parameters: under SGD of rate 1 without decay or clipping; for a rule that
decides by itself when to apply, what it applied, with weights that stay (rate zero), plus what it moved in place.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bpfree.certify.subject import Specimen, Subject, batches, examples
from bpfree.network.network import evaluating
from bpfree.options import OptimizerConfig
from bpfree.rule import Rule
from bpfree.step import Batch, Budget, Phase, Step
from bpfree.training.phases import learning
from bpfree.training.seeds import seeded
from bpfree.training.updater import Updater, new_step

__all__ = ["PLAIN", "Moment", "Probe", "Sampling", "task_gradients"]

PLAIN = OptimizerConfig("sgd", lr=1.0, weight_decay=0.0, momentum=0.0, options={"nesterov": False, "dampening": 0.0, "maximize": False})
MOST_PHASES = 8
Watch = Callable[[Rule, Batch, Step], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Sampling:
    """How many examples a probe sees.

    Attributes:
        samples: per batch.
        steps: of each phase.
    """

    samples: int = 4
    steps: int = 2


@dataclass
class Moment:
    """A step of a trajectory.

    Attributes:
        phase: its name, and its position among the phases.
        batch: as the rule got it.
        updates: by block, flat: what the step did to its parameters.
        gradients: by block, flat: the true gradient of the task's loss there; empty where the task's loss is not the network's.
        output: the network's plain output before the step; ``None`` for networks that only their rule can execute.
        entries: parameters after ``start_phase``, by name, at the first step of a phase.
    """

    phase: str
    batch: Batch
    updates: dict[str, Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)
    output: Tensor | None = None
    entries: dict[str, Tensor] = field(default_factory=dict)


class Probe:
    """Trajectories of a small instance, the same each time but for what is done to its weights.

    Args:
        subject: the rule.
        specimen: how small.
        sampling: how much it sees.
        dtype: of all its numbers.
        gradients: whether true gradients are noted beside the updates.
    """

    def __init__(
        self,
        subject: Subject,
        specimen: Specimen,
        sampling: Sampling | None = None,
        *,
        dtype: torch.dtype = torch.float64,
        gradients: bool = False,
    ) -> None:
        self.subject, self.specimen, self.dtype = subject, specimen, dtype
        self.sampling = sampling or Sampling()
        self._gradients = gradients
        count = MOST_PHASES * self.sampling.steps
        self._batches = batches(specimen.spec, self.sampling.samples, count, dtype=dtype)

    def with_other_labels(self) -> Probe:
        """The same with labels that belong to other examples."""
        other = copy.copy(self)
        other._batches = [replace(batch, targets=batch.targets.roll(1)) for batch in self._batches if batch.targets is not None]
        return other

    def build(self) -> Rule:
        """A fresh instance, prepared as a run would."""
        rule = self.subject.build(self.specimen, dtype=self.dtype)
        rule.prepare(examples(self.specimen.spec, 64), torch.Generator().manual_seed(0))
        _shake(rule)
        return rule

    def run(
        self, added: Mapping[str, Tensor] | None = None, *, base: list[Moment] | None = None, watch: Watch | None = None
    ) -> list[Moment]:
        """Go through the rule's phases.

        Args:
            added: to parameters, by name, before the first phase begins; once more after a phase began that had put them back.
            base: the trajectory without it, to know what a phase puts back.
            watch: entered around every ``learn``.
        """
        with seeded(0):
            rule = self.build()
            parameters = dict(rule.named_parameters())
            self._add(parameters, added)
            return list(self._moments(rule, parameters, added or {}, base, watch or _unwatched))

    def _add(self, parameters: Mapping[str, nn.Parameter], added: Mapping[str, Tensor] | None) -> None:
        with torch.no_grad():
            for name, change in (added or {}).items():
                parameters[name].add_(change)

    def _moments(
        self, rule: Rule, parameters: dict[str, nn.Parameter], added: Mapping[str, Tensor], base: list[Moment] | None, watch: Watch
    ) -> Iterator[Moment]:
        rule.group_options = dict  # type: ignore[method-assign,assignment]  # rate 1 for all
        updater = Updater(rule, PLAIN)
        step = new_step(rule, PLAIN)
        step.lr = lambda name: 1.0
        supply = iter(self._batches)
        place = 0
        for phase in self._phases(rule):
            rule.start_phase(phase)
            parameters = dict(rule.named_parameters())
            before = base[place].entries if base is not None else {}
            undone = {n: change for n, change in added.items() if n in before and torch.equal(parameters[n], before[n])}
            self._add(parameters, undone)
            updater.start_phase(replace(phase, optimizer=None, schedule=None))
            step.phase = phase
            entries = {name: p.detach().clone() for name, p in parameters.items()}
            with learning(rule, phase):
                for _ in range(self.sampling.steps):
                    moment = self._moment(rule, updater, step, next(supply), watch)
                    moment.entries, entries = entries, {}
                    yield moment
                    place += 1
                    step.index += 1
            rule.end_phase(phase, step)

    def _phases(self, rule: Rule) -> list[Phase]:
        """The first ones; a single one comes twice, so that there is a border."""
        found = list(itertools.islice(rule.phases(Budget(epochs=8)), MOST_PHASES))
        return found * 2 if len(found) == 1 else found

    def _moment(self, rule: Rule, updater: Updater, step: Step, batch: Batch, watch: Watch) -> Moment:
        if step.phase.on_features:
            with torch.no_grad(), evaluating(rule):
                batch = Batch(rule.features(batch.inputs), batch.targets)
        moment = Moment(step.phase.name, batch, {})
        if not step.phase.on_features and rule.network.chain:
            with torch.no_grad():
                moment.output = rule.network(batch.inputs)
            if self._gradients:
                moment.gradients = task_gradients(rule, batch)
        before = {name: p.detach().clone() for name, p in rule.named_parameters()}
        applied: dict[str, Tensor] = {}
        step.apply = updater.apply if rule.traits.update == "grad" else _noting(rule, updater, applied)
        with watch(rule, batch, step):
            rule.learn(batch, step)
        moment.updates = _updates(rule, before, applied)
        with torch.no_grad():
            for name, p in rule.named_parameters():
                if name in before:
                    p.copy_(before[name])
                p.grad = None
        return moment


def _shake(rule: Rule) -> None:
    """Move every parameter a little: heads and readouts that begin at zero would hide what depends on them."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in rule.parameters():
            scale = 0.1 * max(float(p.square().mean().sqrt()), 0.05)
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def _unwatched(rule: Rule, batch: Batch, step: Step) -> AbstractContextManager[None]:
    return nullcontext()


def _noting(rule: Rule, updater: Updater, applied: dict[str, Tensor]) -> Callable[..., None]:
    """An ``apply`` of rate zero: notes what it would have applied."""
    names = {id(p): name for name, p in rule.named_parameters()}

    def apply(*groups: str) -> None:
        rule.before_update()
        for group in groups or tuple(updater.groups):
            for p in updater.groups[group]:
                if p.grad is not None:
                    name = names[id(p)]
                    applied[name] = applied[name] - p.grad if name in applied else -p.grad
                    p.grad = None
        rule.after_update()

    return apply


def _updates(rule: Rule, before: Mapping[str, Tensor], applied: Mapping[str, Tensor]) -> dict[str, Tensor]:
    updates = {}
    for name, block in rule.network.blocks.items():
        parts = []
        for own, p in block.named_parameters():
            full = f"network.blocks.{name}.{own}"
            moved = p.detach() - before[full] if full in before else torch.zeros_like(p)
            parts.append((moved + applied[full] if full in applied else moved).flatten())
        updates[name] = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
    return updates


def task_gradients(rule: Rule, batch: Batch) -> dict[str, Tensor]:
    """By block, flat: the gradient of the task's loss of the network's output, by autograd; empty if the network makes no scores."""
    if rule.network.readout is None or batch.targets is None:
        return {}
    named = {name: list(block.parameters()) for name, block in rule.network.blocks.items()}
    everything = [p for members in named.values() for p in members]
    wanted = [p.requires_grad for p in everything]
    try:
        for p in everything:
            p.requires_grad_(True)
        with torch.enable_grad():
            loss = rule.spec.loss(rule.network(batch.inputs), batch)
        found = iter(torch.autograd.grad(loss, everything, allow_unused=True))
    finally:
        for p, value in zip(everything, wanted, strict=True):
            p.requires_grad_(value)
    return {name: torch.cat([_or_zero(next(found), p) for p in members]) for name, members in named.items() if members}


def _or_zero(gradient: Tensor | None, p: Tensor) -> Tensor:
    return torch.zeros_like(p).flatten() if gradient is None else gradient.flatten()
