"""Whole runs as the examination: what a rule learns when the weights above a block are dirty, on the path of ``bpfree train``.

A reference run of the rule is recorded: same trainer, hooks, network, task, precision and batch size as for a user, with a short budget.
Each further run has the same seed, and differs in one block j: its parameters are dirty from before the rule is given its network until the
run ends (``twice.py``), other ones in each step, while its executions have the reference's values. Blocks above j are set to the
reference's weights before and after each step, so that what they send down is unchanged. A rule whose updates are no functions of the
weights of j ends, in every block below, with the reference's weights bit for bit.

What only a second kind of change shows, *learning by execution*, is told apart: executions of block j on other inputs than the first of a
step have the values of other weights. A rule that finds weights out by executing blocks on noise, on perturbed activations or with
perturbed parameters ends elsewhere then.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from bpfree import runner
from bpfree.certify.subject import Subject
from bpfree.certify.twice import Doubles, Record, dirty, weights_apart
from bpfree.errors import BpfreeError
from bpfree.network.network import Network
from bpfree.rule import Rule
from bpfree.tasks.task import Task
from bpfree.training import probes, session
from bpfree.training.guards import LearningWatch
from bpfree.training.selection import Selection

__all__ = [
    "EPOCHS",
    "Arm",
    "Change",
    "Enough",
    "Intervening",
    "Recording",
    "Reference",
    "Watch",
    "WholeRun",
    "run_arm",
    "run_reference",
    "watched",
]

EPOCHS = 10
"""The default budget of ``bpfree train``."""
EQUAL = torch.equal
"""As it was before any rule could replace it."""
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
        before, after: weights around each step, by block and name.
        initial, final: weights as the rule was given them, and at the end of training.
        steps: number of updates.
        result: the run's.
        exchanged: whether the rule has a network of other parameters than those it was given.
    """

    record: Record
    before: list[Weights] = field(default_factory=list)
    after: list[Weights] = field(default_factory=list)
    initial: Weights = field(default_factory=dict)
    final: Weights = field(default_factory=dict)
    result: dict[str, float] = field(default_factory=dict)
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
        sides: executions of the block on other inputs than the first of their step.
        overwritten: steps in which the block's dirty parameters became the reference's again, which the rule keeps elsewhere.
        changed: what the rule changed about how the block is executed.
        trouble: how the run ended before its time.
    """

    arm: Arm
    changes: dict[str, Change] = field(default_factory=dict)
    transport: float = 0.0
    sides: int = 0
    overwritten: int = 0
    changed: str = ""
    trouble: str = ""


class Enough(Exception):
    """Every block below has other weights: the rest of the run would show nothing more."""


class Watch:
    """Follows one run: finds the network, and looks or acts before and after each step."""

    def __init__(self) -> None:
        self.network: Network | None = None
        self.rule: Rule | None = None
        self.doubles: Doubles | None = None
        self._stack = ExitStack()
        self._ids: set[int] = set()

    def given(self, network: Network) -> None:
        """Take up the network that the rule is about to get."""
        if self.network is None:
            self._take_up(network)

    def _take_up(self, network: Network) -> None:
        self._stack.close()
        self.network = network
        self._ids = {id(p) for p in network.parameters()}
        self.doubles = self.make_doubles(network)
        self._stack.enter_context(self.doubles.watching())
        self.begin()

    def built(self, rule: Rule) -> None:
        """Look at the network of the finished rule, which may be another one."""
        if self.rule is None:
            self.rule = rule

    def look(self) -> None:
        """Take up another network, if the rule has exchanged parameters of its blocks."""
        if self.rule is not None and not {id(p) for p in self.rule.network.blocks.parameters()} <= self._ids:
            step = self.doubles.step if self.doubles else -1
            self._take_up(self.rule.network)
            assert self.doubles is not None
            self.doubles.step = step
            self.exchanged()

    def close(self) -> None:
        self._stack.close()

    def live(self) -> dict[str, dict[str, nn.Parameter]]:
        """Return the network's parameters by block; a shared one belongs to the first block that has it."""
        assert self.network is not None
        seen: set[int] = set()
        found: dict[str, dict[str, nn.Parameter]] = {}
        for name, block in self.network.blocks.items():
            own = {key: p for key, p in block.named_parameters() if id(p) not in seen}
            seen |= {id(p) for p in own.values()}
            found[name] = own
        return found

    # --- what each kind of run does ----------------------------------------------------------------------------------

    def make_doubles(self, network: Network) -> Doubles:
        raise NotImplementedError

    def begin(self) -> None:
        """Act as soon as the network is there."""

    def exchanged(self) -> None:
        """Act when the rule has exchanged its network."""

    def before(self) -> None:
        """Act before a step."""

    def after(self) -> None:
        """Act after a step."""

    def end(self) -> None:
        """Act when training has ended."""


class Recording(Watch):
    """Records the reference run."""

    def __init__(self) -> None:
        super().__init__()
        self.reference = Reference(Record())

    def make_doubles(self, network: Network) -> Doubles:
        doubles = Doubles(network)
        doubles.record = self.reference.record
        return doubles

    def begin(self) -> None:
        self.reference.initial = self._copied({})

    def exchanged(self) -> None:
        self.reference.exchanged = True

    def before(self) -> None:
        self.reference.before.append(self._copied(self.reference.after[-1] if self.reference.after else self.reference.initial))

    def after(self) -> None:
        self.reference.after.append(self._copied(self.reference.before[-1]))

    def end(self) -> None:
        self.reference.final = self._copied(self.reference.after[-1] if self.reference.after else {})

    def _names(self) -> dict[str, Any]:
        return {name: own.keys() for name, own in self.live().items()}

    def _copied(self, last: Weights) -> Weights:
        """Copy the weights, except those that are as they were."""
        found: Weights = {}
        if self.reference.initial and self._names() != {name: own.keys() for name, own in self.reference.initial.items()}:
            self.reference.exchanged = True
        for block, own in self.live().items():
            old = last.get(block, {})
            found[block] = {
                name: old[name] if name in old and EQUAL(old[name], p.detach()) else p.detach().clone() for name, p in own.items()
            }
        return found


class Intervening(Watch):
    """Changes one block, and compares with the reference."""

    def __init__(self, arm: Arm, reference: Reference, seed: int) -> None:
        super().__init__()
        self._arm, self._reference = arm, reference
        self._generator = torch.Generator().manual_seed(seed)
        self._written: dict[str, Tensor] = {}
        names = reference.blocks
        place = names.index(arm.block) if arm.block is not None else 0
        self._above = tuple(names[place + 1 :]) if arm.block is not None else tuple(names[1:])
        self._below = names[:place] if arm.block is not None else names
        self._dirty_now = arm.since == "network"
        self._apart = 0.0
        self._moments = {max(1, reference.steps // 3), max(1, 2 * reference.steps // 3)}
        self.found = WholeRun(arm, {name: Change() for name in self._below})

    def make_doubles(self, network: Network) -> Doubles:
        own = () if self._arm.block is None else (self._arm.block,)
        altered = own if self._arm.alter else ()
        doubled, generator = (*own, *self._above), self._generator
        return Doubles(
            network,
            self._reference.record,
            doubled=doubled,
            altered=altered,
            generator=generator,
            strict=self._arm.strict,
            rounding=self._arm.rounding,
        )

    @property
    def step(self) -> int:
        assert self.doubles is not None
        return self.doubles.step

    def begin(self) -> None:
        self._set(self._reference.initial)

    def before(self) -> None:
        known = self._reference.before
        here = known[min(self.step, len(known) - 1)]
        self._look_for_overwriting(here)
        if self.step == 0:
            self._dirty_now = self._arm.until == "end"
        self._compare(here, self.step or -1)
        self._set(here)

    def after(self) -> None:
        known = self._reference.after
        here = known[min(self.step, len(known) - 1)]
        self._look_for_overwriting(here)
        self._compare(here, self.step + 1)
        if self.step + 1 in self._moments:
            self._measure(here)
        if (
            self._arm.block is not None
            and not self._arm.gentle
            and self.found.changes
            and all(change.first for change in self.found.changes.values())
        ):
            self.end()
            raise Enough
        self._set(here)

    def _measure(self, here: Weights) -> None:
        live = self.live()
        for name, change in self.found.changes.items():
            change.relative += (_relative(self._reference, name, live[name], here[name]),)

    def end(self) -> None:
        known = self._reference.after
        last = self._reference.final if self.step + 1 >= len(known) else known[self.step]
        self._compare(last, self.step + 1)
        self._measure(last)
        doubles, block = self.doubles, self._arm.block
        assert doubles is not None
        if block is not None:
            self.found.transport, self.found.sides = doubles.transport.get(block, self._apart), doubles.sides[block]
            self.found.changed = next((doubles.changed[name] for name in (block, *self._above) if name in doubles.changed), "")

    def _compare(self, here: Weights, step: int) -> None:
        live = self.live()
        for name, change in self.found.changes.items():
            if not change.first and any(not EQUAL(p.detach(), here[name][key]) for key, p in live[name].items() if key in here[name]):
                change.first = step

    def _set(self, weights: Weights) -> None:
        """Give the block dirty parameters, and those above it the reference's."""
        live = self.live()
        with torch.no_grad():
            for name in (*self._above, *(self._below if self._arm.tethered else ())):
                for key, p in live[name].items():
                    if not EQUAL(p, weights[name][key]):
                        p.copy_(weights[name][key])
            for key, p in live.get(self._arm.block or "", {}).items():
                clean = weights[self._arm.block or ""][key]
                p.copy_(self._soiled(clean) if self._dirty_now else clean)
                self._written[key] = p.detach().clone()
        if self._arm.block is not None and not self._apart:
            self._apart = weights_apart(weights[self._arm.block], live[self._arm.block])

    def _soiled(self, clean: Tensor) -> Tensor:
        if not self._arm.gentle:
            return dirty(clean, self._generator)
        order = torch.randperm(clean.numel(), generator=self._generator)
        return clean.flatten()[order].reshape(clean.shape)

    def _look_for_overwriting(self, here: Weights) -> None:
        """Count the times at which dirty parameters have become the reference's."""
        if self._arm.block is None or not self._written or not self._dirty_now:
            return
        for key, p in self.live()[self._arm.block].items():
            clean, written = here[self._arm.block][key], self._written[key]
            if EQUAL(p.detach(), clean) and not EQUAL(written, clean) and clean.numel() > 1:
                self.found.overwritten += 1
                return


def _relative(reference: Reference, block: str, live: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> float:
    final, initial = reference.final[block], reference.initial[block]
    apart = _norm(p.detach() - here[name] for name, p in live.items() if name in here)
    size = _norm(final[name] - initial[name] for name in final if name in initial) or _norm(final.values())
    value = apart / size if size else 0.0
    return value if math.isfinite(value) else 1.0


def _norm(parts: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(part.square().sum()) for part in parts))


# --- the runs -----------------------------------------------------------------------------------------------------------


def run_reference(subject: Subject, task: Task | None = None, *, epochs: int = EPOCHS, seed: int = 0) -> tuple[Reference, Rule]:
    """Train the rule as a user would, and record it; returns the trained rule too.

    Raises:
        BpfreeError: the run fails.
    """
    watch = Recording()
    run = _run(subject, watch, task, epochs=epochs, seed=seed)
    watch.reference.result = dict(run.result)
    if not watch.reference.after:
        raise BpfreeError("the rule has taken no step", where=subject.name, fix="yield a Phase from Rule.phases")
    assert watch.rule is not None
    return watch.reference, watch.rule


def run_arm(
    subject: Subject, arm: Arm, reference: Reference, task: Task | None = None, *, draw: int, epochs: int = EPOCHS, seed: int = 0
) -> WholeRun:
    """Train the rule with one block changed, and compare.

    Args:
        subject: the rule.
        arm: what is changed.
        reference: of the same seed, task and budget.
        task: in place of the rule's default one.
        draw: seed of what is drawn for the change.
        epochs, seed: of the run.
    """
    watch = Intervening(arm, reference, draw)
    try:
        _run(subject, watch, task, epochs=epochs, seed=seed)
    except Enough:
        pass
    except Exception as error:  # on such weights a rule may fail as it never does otherwise
        watch.found.trouble = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return watch.found


def settings_of(subject: Subject, folder: str, epochs: int, seed: int) -> dict[str, Any]:
    """Return the settings of an examined run over the rule's own."""
    quiet = {"tracking.enabled": False, "pictures.every": 0, "pictures.curves": False}
    return {"output": folder, "seed": seed, "budget.epochs": epochs, "device": "cpu", "threads": 1, **quiet, **subject.own_network}


def _run(subject: Subject, watch: Watch, task: Task | None, *, epochs: int, seed: int) -> Any:
    folder = tempfile.mkdtemp(prefix="bpfree-")
    try:
        recipe = subject.resolve(settings_of(subject, folder, epochs, seed), None if task is None else task.spec)
        with watched(subject.rule, watch):
            return runner.run(recipe, quiet=True, task=task)
    finally:
        watch.close()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def watched(kind: type[Rule], watch: Watch) -> Iterator[None]:
    """Follow the run that is made inside."""
    original, own = Rule.__init__, kind.__init__
    take_step, take = probes.take_step, Selection.take

    def initialise(rule: Rule, *args: Any, **kwargs: Any) -> None:
        original(rule, *args, **kwargs)
        if isinstance(rule.network, Network):
            watch.given(rule.network)

    def begin(rule: Rule, *args: Any, **kwargs: Any) -> None:
        network = args[0] if args else kwargs.get("network")
        if isinstance(network, Network):
            watch.given(network)
        own(rule, *args, **kwargs)
        watch.built(rule)

    def step(wanted: Any, update: Callable[..., Any], clock: Any, batch: Any, step: Any) -> Any:
        watch.look()
        assert watch.doubles is not None
        watch.doubles.begin_step()
        watch.before()
        metrics = take_step(wanted, update, clock, batch, step)
        watch.after()
        return metrics

    def select(selection: Selection, save: Any) -> None:
        watch.end()
        take(selection, save)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Rule, "__init__", initialise))
        stack.enter_context(mock.patch.object(kind, "__init__", begin))
        stack.enter_context(mock.patch.object(session, "take_step", step))
        stack.enter_context(mock.patch.object(Selection, "take", select))
        # parameters that do not learn are dirty too
        stack.enter_context(mock.patch.object(LearningWatch, "check_fixed", return_value=None))
        yield
