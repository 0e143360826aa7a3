"""One examined trajectory: a rule takes its steps from fixed weights, and every block's update is noted.

It begins near the rule's own initialisation, every parameter moved a little. After each step the network's parameters go back to where
they were, so that steps at other batches and in other phases are all taken from the same weights, and two trajectories differ by what was
done to these and by nothing else. A rule's other state is kept: its own parameters, which learn slowly, buffers, copies of weights that it
made at some time. What is done to the weights
is done as soon as the rule has its network, so that its copies of them, made when it is built, differ as well.

The update of a block is what ``learn`` does to its parameters: under SGD of rate 1 without decay or clipping; for a rule that
decides by itself when to apply, what it applied, with weights that stay (rate zero), plus what it moved in place.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from bpfree.certify.subject import Specimen, Subject, batches, examples, with_views
from bpfree.errors import BpfreeError
from bpfree.network.network import Network, evaluating
from bpfree.options import OptimizerConfig
from bpfree.rule import Rule
from bpfree.seeds import seeded
from bpfree.step import Batch, Budget, Phase, Step
from bpfree.training.phases import learning
from bpfree.training.stepper import Stepper
from bpfree.training.updater import Updater, told_groups

__all__ = ["PLAIN", "Moment", "Probe", "Sampling", "task_gradients"]

PLAIN = OptimizerConfig("sgd", lr=1.0, weight_decay=0.0, momentum=0.0, options={"nesterov": False, "dampening": 0.0, "maximize": False})
OWN_RATE = 0.01
"""Learning rate of a rule's own parameters, such as feedback weights and heads."""
BLOCKS = "network.blocks."
MOST_PHASES = 24
"""Number of phases to go through, since a rule may have endless phases."""
Watch = Callable[[Rule, Batch, Step], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Sampling:
    """How many examples a probe sees.

    Attributes:
        samples: per batch.
        steps: of each phase, each with another batch; the batches are the same in every phase.
        rounds: how often a phase goes round its batches.
        phases: how many at most.
    """

    samples: int = 4
    steps: int = 2
    rounds: int = 1
    phases: int = MOST_PHASES


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
    """Trajectories of a small instance, identical except for the change made to its weights.

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
        self._batches = batches(specimen.spec, self.sampling.samples, self.sampling.steps, dtype=dtype, views=subject.views)

    def with_other_labels(self) -> Probe:
        """Return a probe whose labels belong to other examples."""
        other = copy.copy(self)
        targets = [None if batch.targets is None else batch.targets.roll(1, 0) for batch in self._batches]
        other._batches = [replace(batch, targets=rolled) for batch, rolled in zip(self._batches, targets, strict=True)]
        return other

    def build(self, added: Mapping[str, Tensor] | None = None) -> Rule:
        """Build a fresh instance, prepared as in a run.

        Args:
            added: to parameters, by name, as soon as the rule has its network.
        """
        with _shaken(self.subject.rule, added or {}, self.dtype) as early:
            rule = self.subject.build(self.specimen, dtype=self.dtype)
        _shake(
            p for p in rule.parameters() if id(p) not in early or not torch.equal(p, early[id(p)].to(p.dtype))
        )  # new ones, and those that were filled again
        rule.prepare(examples(self.specimen.spec, 64), torch.Generator().manual_seed(0))
        return rule

    def run(
        self,
        added: Mapping[str, Tensor] | None = None,
        *,
        base: list[Moment] | None = None,
        watch: Watch | None = None,
        late: bool = False,
        ready: Callable[[Rule], object] | None = None,
    ) -> list[Moment]:
        """Take the rule through its phases.

        Args:
            added: to parameters, by name, as soon as the rule has its network; once more after whatever had put them back.
            base: the trajectory without it, to know what was put back.
            watch: entered around every ``learn``.
            late: whether ``added`` waits until the rule was built and prepared, which may depend on its weights.
            ready: called with the rule before its first phase.
        """
        with seeded(0), _other_generators_seeded():
            rule = self.build(None if late else added)
            parameters = dict(rule.named_parameters())
            if late:
                _add(parameters, added or {})
            if ready is not None:
                ready(rule)
            return list(self._moments(rule, added or {}, base, watch or _unwatched))

    def _moments(self, rule: Rule, added: Mapping[str, Tensor], base: list[Moment] | None, watch: Watch) -> Iterator[Moment]:
        own = {name: {"lr": OWN_RATE} for name in rule.groups() if name not in rule.network.blocks}
        rule.group_options = lambda: own  # type: ignore[method-assign]  # rate 1 for all blocks
        stepper = Stepper(rule, PLAIN)
        step = stepper.step
        step.lr = lambda name: OWN_RATE if name in own else 1.0
        place = 0
        for phase in self._phases(rule):
            rule.start_phase(phase)
            parameters = dict(rule.named_parameters())
            before = base[place].entries if base is not None else {}
            undone = {n: change for n, change in added.items() if n in before and torch.equal(parameters[n], before[n])}
            _add(parameters, undone)
            stepper.enter(replace(phase, optimizer=None, schedule=None))
            step.phase = phase
            entries = {name: p.detach().clone() for name, p in parameters.items()}
            with learning(rule, phase):
                for batch in self._batches * self.sampling.rounds:
                    moment = self._moment(stepper, batch, watch)
                    moment.entries, entries = entries, {}
                    yield moment
                    place += 1
            rule.end_phase(phase, step)

    def _phases(self, rule: Rule) -> list[Phase]:
        """Return the first phases; a single phase is repeated, so that there is a border."""
        found = list(itertools.islice(rule.phases(Budget(epochs=8)), self.sampling.phases))
        if not found:
            raise BpfreeError(
                "the rule has no phases, so it never takes a step", where=f"{type(rule).__name__}.phases", fix="yield a Phase"
            )
        return found * 2 if len(found) == 1 else found

    def _moment(self, stepper: Stepper, batch: Batch, watch: Watch) -> Moment:
        rule, updater, step = stepper.rule, stepper.updater, stepper.step
        if step.phase.on_features:
            with torch.no_grad(), evaluating(rule):
                batch = with_views(Batch(rule.features(batch.inputs), batch.targets), self.subject.views)
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
        step.index += 1
        moment.updates = _updates(rule, before, applied)
        with torch.no_grad():
            for name, p in rule.named_parameters():
                if name in before and name.startswith(BLOCKS):
                    p.copy_(before[name])
                p.grad = None
        return moment


@contextmanager
def _shaken(kind: type[Rule], added: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[dict[int, Tensor]]:
    """Set the precision of a rule built inside, and shake and change its network before the rule sees it.

    Yields:
        The network's parameters as they then are, by identity.
    """
    early: dict[int, Tensor] = {}

    def change(network: object) -> None:
        if isinstance(network, Network):
            fresh = {f"network.{name}": p for name, p in network.named_parameters() if id(p) not in early}
            _shake(fresh.values())
            _add(fresh, {name: value for name, value in added.items() if name in fresh})
            early.update({id(p): p.detach().clone() for p in fresh.values()})

    original, own = Rule.__init__, kind.__init__

    def initialise(rule: Rule, *args: Any, **kwargs: Any) -> None:
        original(rule, *args, **kwargs)
        change(rule.network)  # one that the rule has made itself

    def begin(rule: Rule, *args: Any, **kwargs: Any) -> None:
        change(args[0] if args else kwargs.get("network"))
        own(rule, *args, **kwargs)

    precision = torch.get_default_dtype()
    with mock.patch.object(Rule, "__init__", initialise), mock.patch.object(kind, "__init__", begin):
        try:
            torch.set_default_dtype(dtype)
            yield early
        finally:
            torch.set_default_dtype(precision)


def _shake(parameters: Iterable[nn.Parameter]) -> None:
    """Move every parameter a little: heads and readouts that begin at zero would hide what depends on them."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in parameters:
            scale = 0.1 * max(float(p.square().mean().sqrt()), 0.05)
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def _add(parameters: Mapping[str, nn.Parameter], added: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, change in added.items():
            parameters[name].add_(change)


@contextmanager
def _other_generators_seeded() -> Iterator[None]:
    """Seed the generators of Python and numpy, which another check forbids, so that their noise is not taken for a dependence."""
    states = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(0)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _unwatched(rule: Rule, batch: Batch, step: Step) -> AbstractContextManager[None]:
    return nullcontext()


def _noting(rule: Rule, updater: Updater, applied: dict[str, Tensor]) -> Callable[..., None]:
    """Replace ``apply`` by one of rate zero that records what it would have applied."""
    names = {id(p): name for name, p in rule.named_parameters()}

    before_update, after_update = told_groups(rule.before_update), told_groups(rule.after_update)

    def apply(*chosen: str) -> None:
        groups = chosen or tuple(updater.groups)
        before_update(groups)
        for group in groups:
            for p in updater.groups[group]:
                if p.grad is not None:
                    name = names[id(p)]
                    if name.startswith(BLOCKS):
                        applied[name] = applied[name] - p.grad if name in applied else -p.grad
                    else:
                        with torch.no_grad():
                            p.sub_(OWN_RATE * p.grad)
                    p.grad = None
        after_update(groups)

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
    """Return by block the flat gradient of the task's loss of the network's output, by autograd; empty without scores."""
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
