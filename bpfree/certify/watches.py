"""Watches of a whole run: one that records it, one that changes a block and compares, one that looks at first steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.certify.arms import Arm, Change, Reference, Weights, WholeRun
from bpfree.certify.probe import task_gradients
from bpfree.certify.twice import EQUAL, Doubles, Record, dirty, weights_apart
from bpfree.network import kept_buffers
from bpfree.network.network import Network
from bpfree.rule import Rule
from bpfree.step import Batch
from bpfree.training import probes, session
from bpfree.training.guards import LearningWatch
from bpfree.training.selection import Selection

__all__ = ["Enough", "FirstSteps", "Intervening", "Recording", "Watch", "watched"]


FIRST = 10
"""Steps within which a block's first update is looked for."""


class Enough(Exception):
    """The rest of the run would show nothing more."""


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
        """Make what watches the executions of the network; here they are recorded."""
        return Doubles(network)

    def begin(self) -> None:
        """Act as soon as the network is there."""

    def exchanged(self) -> None:
        """Act when the rule has exchanged its network."""

    def before(self, batch: Batch) -> None:
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
        self.reference.network, self.reference.initial = self.network, self._copied({})

    def exchanged(self) -> None:
        self.reference.exchanged = True

    def before(self, batch: Batch) -> None:
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

    def outcome(self, make: Callable[[], Any]) -> WholeRun:
        """Make the run, and return what it showed; on other weights a rule may fail as it never does otherwise."""
        try:
            make()
        except Enough:
            pass
        except Exception as error:
            self.found.trouble = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return self.found

    @property
    def step(self) -> int:
        assert self.doubles is not None
        return self.doubles.step

    def begin(self) -> None:
        self._set(self._reference.initial)

    def before(self, batch: Batch) -> None:
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
            self.found.transport = doubles.transport.get(block, self._apart)
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


class FirstSteps(Watch):
    """Compares the first update of each hidden block with the true gradient, and ends the run then.

    Attributes:
        cosines: of minus the update with the gradient or with its signs (of which an adaptive optimiser's first step consists), whichever
            is larger, by block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cosines: dict[str, float] = {}
        self._gradients: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}

    def before(self, batch: Batch) -> None:
        assert self.rule is not None
        assert self.doubles is not None
        if not self.rule.network.chain or self.doubles.step == FIRST:
            raise Enough
        with torch.random.fork_rng(devices=[]), kept_buffers(self.rule.network):
            self._gradients = task_gradients(self.rule, batch)
        self._weights = self._flat()

    def after(self) -> None:
        assert self.rule is not None
        now, hidden = self._flat(), self.rule.network.hidden
        for name in hidden:
            update, gradient = self._weights[name] - now[name], self._gradients.get(name)
            if name not in self.cosines and gradient is not None and bool(update.any()) and bool(gradient.any()):
                self.cosines[name] = max(float(F.cosine_similarity(update, way, dim=0)) for way in (gradient, gradient.sign()))
        if len(self.cosines) == len(hidden):
            raise Enough

    def _flat(self) -> dict[str, Tensor]:
        """Return the weights of each block as one vector, in the order of its parameters."""
        assert self.rule is not None
        blocks = self.rule.network.blocks.items()
        return {name: torch.cat([p.detach().flatten() for p in block.parameters()] or [torch.zeros(0)]).clone() for name, block in blocks}


def _relative(reference: Reference, block: str, live: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> float:
    final, initial = reference.final[block], reference.initial[block]
    apart = _norm(p.detach() - here[name] for name, p in live.items() if name in here)
    size = _norm(final[name] - initial[name] for name in final if name in initial) or _norm(final.values())
    value = apart / size if size else 0.0
    return value if math.isfinite(value) else 1.0


def _norm(parts: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(part.square().sum()) for part in parts))


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
        watch.before(batch)
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
