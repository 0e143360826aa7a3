"""What is measured of a rule, each quantity once, when it is first needed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from bpfree.certify import training_runs
from bpfree.certify.cost import MemoryCurve, measure_memory
from bpfree.certify.interventions import Matrix, dependence, downstream_weights, name_of_dependence
from bpfree.certify.learning import Lesson, learn_lesson
from bpfree.certify.loop import Loop
from bpfree.certify.pace import CLOCK, measure_time
from bpfree.certify.probe import MOST_PHASES, PLAIN, Moment, Probe, Sampling
from bpfree.certify.reading import Verdict
from bpfree.certify.reverse import OWN, ObservedSteps, observed
from bpfree.certify.subject import Specimen, Subject, batches
from bpfree.certify.whole_examination import WholeExamination, examine_whole_runs
from bpfree.rule import Rule, Traits
from bpfree.step import Batch, Step
from bpfree.tasks.spec import TaskSpec
from bpfree.training.stepper import Stepper

__all__ = ["SPECIMENS", "Measurements", "Observation"]

SPECIMENS = {"dense": Specimen("dense", depth=4, width=32), "convolutional": Specimen("convolutional", depth=3, width=16, image=4)}
"""Specimens on which structure is measured, by kind of network: small, because the null space of a layer's inputs must not be empty."""
EXACT = 1 - 1e-6
"""Cosine from which an update counts as the true gradient."""
EXAMPLES = 7
"""Batch size when operations are observed: prime, so that sums over examples are not taken for sums over the inputs of a layer."""
IN_BLOCKS = "network.blocks."
PRACTICE_EPOCHS = 6
UNMEASURED = "unmeasured"
DEPENDENCES = ("independent", "upstream", "neighbours", "all")


@dataclass(frozen=True)
class Observation:
    """A trajectory with what it executed.

    Attributes:
        moments: its steps, with true gradients where there are some.
        steps: what each step executed; the same order.
        plain: what one forward pass of the network executes, where it is a chain. Rows of a sequence are no examples.
    """

    moments: list[Moment]
    steps: list[ObservedSteps]
    plain: ObservedSteps | None = None

    def total(self) -> ObservedSteps:
        """Return the observations of all steps together."""
        whole = ObservedSteps()
        for step in self.steps:
            whole.merge(step)
        return whole

    def passes(self) -> dict[str, float]:
        """Return forward passes per example by block, in a usual step (sampled extras excluded) of the phase with most."""
        one = {name: max(1.0, self.plain.passes(name)) if self.plain else 1.0 for name in self.moments[0].updates}
        return {name: count / one[name] for name, count in self._rows().items()}

    def _rows(self) -> dict[str, float]:
        """Return rows per example that go forward through the most used weights of each block."""
        names = self.moments[0].updates
        return {name: max(statistics.median(step.passes(name) for step in steps) for steps in self._by_phase()) for name in names}

    def disagreement(self) -> str:
        """Say why the operations of the steps disagree with the passes of the most used block; empty if they agree."""
        most = max(self._rows().values())
        if not most:
            return "no product with a block's own weights was seen: it works with copies or stacks of them"
        found = [reason for step in self.steps if (reason := step.disagreement(most))]
        return found[0] if found else ""

    def measured_passes(self) -> dict[str, float] | None:
        """Return the forward passes; ``None`` where the operations disagree with them."""
        return None if self.disagreement() else self.passes()

    def _by_phase(self) -> Iterable[list[ObservedSteps]]:
        phases: dict[str, list[ObservedSteps]] = {}
        for moment, step in zip(self.moments, self.steps, strict=True):
            phases.setdefault(moment.phase, []).append(step)
        return phases.values()

    def cosines(self) -> dict[str, float]:
        """Return for each learning block the smallest cosine of minus its update with the true gradient of the task's loss."""
        found: dict[str, float] = {}
        for moment in self.moments:
            for name, gradient in moment.gradients.items():
                update = moment.updates[name]
                if bool(update.any()) and bool(gradient.any()):
                    cosine = float(F.cosine_similarity(-update, gradient, dim=0))
                    found[name] = min(found.get(name, 1.0), cosine if math.isfinite(cosine) else -1.0)
        return found


class Measurements:
    """Measurements of a rule; each is made when it is first needed, and kept.

    Args:
        subject: the rule.

    Attributes:
        subject: as given.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    def specimen(self, kind: str) -> Specimen:
        """Return the specimen on which structure is measured."""
        return self.subject.fitted(SPECIMENS[kind])

    @property
    def spec(self) -> TaskSpec:
        """The made-up task of small instances."""
        return self.subject.specimen(self.kind).spec

    def batches(self, size: int, count: int, *, dtype: torch.dtype = torch.float32, seed: int = 1) -> list[Batch]:
        """Make batches of the made-up task, with the views that the rule asks for."""
        return batches(self.spec, size, count, dtype=dtype, seed=seed, views=self.subject.views)

    @cached_property
    def kinds(self) -> list[str]:
        """The kinds of networks that structure is measured on: those on which the rule takes its steps."""
        built = self.subject.kinds() or [self.subject.kind()]
        return [kind for kind in built if self._works(kind)] or built[:1]

    def _works(self, kind: str) -> bool:
        """Tell whether the rule takes a step; an error on a network that it did not refuse is reported by another check."""
        try:
            Probe(self.subject, self.specimen(kind), Sampling(samples=2, steps=1), dtype=torch.float32).run()
        except Exception:
            return False
        return True

    @property
    def kind(self) -> str:
        """First kind of network that structure is measured on."""
        return self.kinds[0]

    def build(self, *, seed: int = 0, depth: int = 2, width: int = 16, dtype: torch.dtype = torch.float32) -> Rule:
        """Build a small instance for images of 8 times 8 pixels and five classes."""
        return self.subject.build(self.subject.specimen(self.kind, depth, width), seed=seed, dtype=dtype)

    def traits(self, kind: str | None = None) -> Traits:
        """Return the traits that the rule declares on the measured network."""
        return self.subject.build(self.specimen(kind or self.kind)).traits

    @cached_property
    def dtype(self) -> torch.dtype:
        """Double precision, or single where the rule's own tensors do not follow."""
        try:
            Probe(self.subject, self.specimen(self.kind)).run()
        except RuntimeError:
            return torch.float32
        return torch.float64

    # --- whose weights ----------------------------------------------------------------------------------------------

    @cached_property
    def _moved(self) -> dict[str, Matrix]:
        """What changes when parameters are moved a little, by kind of network."""
        return {kind: dependence(self.subject, self.specimen(kind), dtype=self.dtype) for kind in self.kinds}

    @cached_property
    def downstream(self) -> dict[str, Matrix]:
        """Downstream-weight matrix by kind of network."""
        found = self._moved
        return {kind: downstream_weights(self.subject, self.specimen(kind), found[kind], dtype=self.dtype) for kind in self.kinds}

    @cached_property
    def dependence(self) -> dict[str, Matrix]:
        """Dependence matrix by kind of network.

        It has an entry wherever downstream weights have one: a rule that decides by comparing candidates changes nothing while weights
        move a little, and depends on them all the same.
        """
        return {kind: matrix.joined(self.downstream[kind]) for kind, matrix in self._moved.items()}

    @property
    def dependence_name(self) -> str:
        """Widest name of dependence over the kinds of networks."""
        return max((name_of_dependence(matrix) for matrix in self.dependence.values()), key=DEPENDENCES.index)

    @property
    def silent(self) -> list[str]:
        """Blocks whose update is identically zero, on any kind of network."""
        return sorted({name for matrix in self.dependence.values() for name in matrix.silent})

    @cached_property
    def moving(self) -> dict[str, set[str]]:
        """By kind of network: blocks that plain training of the same specimen moves, in single precision; ``OWN``: the rule's."""
        return {kind: self._moving(kind) for kind in self.kinds}

    def _moving(self, kind: str) -> set[str]:
        specimen = self.specimen(kind)
        rule = self.subject.build(specimen)
        before = {name: p.detach().clone() for name, p in rule.named_parameters()}
        loop = Loop(rule, optimizer=replace(PLAIN, lr=0.01), phases=MOST_PHASES)  # without decay, which moves what has no update
        for batch in loop.turns(batches(specimen.spec, 16, 3, dtype=torch.float32, views=self.subject.views), each=3):
            loop.take(batch)
        moved = [name for name, p in rule.named_parameters() if name in before and not torch.equal(p, before[name])]
        return {name.split(".")[2] if name.startswith(IN_BLOCKS) else OWN for name in moved}

    def doubts(self, kind: str) -> str:
        """Say why a kind of network on which no transport was seen does not show that the rule is local; empty if it does."""
        matrix = self.downstream[kind]
        if unprobed := [name for name in matrix.silent if name in self.moving[kind]]:
            return f"blocks {', '.join(unprobed)} learn in training, and have no update in the probe"
        hidden = self.subject.build(self.specimen(kind)).network.hidden
        if hidden and set(hidden) <= set(matrix.silent) and OWN in self.moving[kind]:
            return "no hidden block of its network learns: what learns are parameters of the rule itself, which are not probed"
        return ""

    # --- what is executed -------------------------------------------------------------------------------------------

    @cached_property
    def observations(self) -> dict[str, Observation]:
        """Observation of a trajectory by kind of network."""
        return {kind: self._observe(kind) for kind in self.kinds}

    def _observe(self, kind: str) -> Observation:
        steps: list[ObservedSteps] = []

        @contextmanager
        def watch(rule: Rule, batch: Batch, step: Step) -> Iterator[None]:
            with observed(rule, batch, step) as execution:
                yield
            steps.append(execution)

        probe = Probe(self.subject, self.specimen(kind), Sampling(samples=EXAMPLES), dtype=self.dtype, gradients=True)
        moments = probe.run(watch=watch)
        return Observation(moments, steps, self._one_pass(probe, moments[0].batch))

    def _one_pass(self, probe: Probe, batch: Batch) -> ObservedSteps | None:
        """Observe a forward pass of the network."""
        rule = probe.build()
        if not rule.network.chain:
            return None
        with observed(rule, batch, Stepper(rule, PLAIN).step) as execution, torch.no_grad():
            rule.network(batch.inputs)
        return execution

    @cached_property
    def label_sensitive(self) -> dict[str, bool]:
        """By block: whether its update changes when the batch's labels do."""
        probe = Probe(self.subject, self.specimen(self.kind), dtype=self.dtype)
        base, other = probe.run(), probe.with_other_labels().run()
        names = base[0].updates
        return {name: any(not torch.equal(a.updates[name], b.updates[name]) for a, b in zip(base, other, strict=True)) for name in names}

    @property
    def span(self) -> int:
        """Blocks that the widest reverse-mode call crossed."""
        return max(observation.total().span for observation in self.observations.values())

    @property
    def equals_backprop(self) -> bool:
        """Whether every block of a network of several learns, and by the true gradient."""
        for observation in self.observations.values():
            cosines = observation.cosines()
            if len(cosines) < 2 or len(cosines) < len(observation.moments[0].updates) or min(cosines.values()) < EXACT:
                return False
        return True

    # --- what it costs, how it aligns -------------------------------------------------------------------------------

    @cached_property
    def memory(self) -> MemoryCurve:
        """Memory of a step against depth."""
        return measure_memory(self.subject, self.specimen(self.kind))

    @cached_property
    def time(self) -> dict[str, float | None]:
        """Time of a step over back-propagation's on the same network, by phase; ``None``: unmeasured."""
        return measure_time(self.subject, self.subject.specimen(self.kind, depth=4, width=128 if self.kind == "dense" else 16))

    @cached_property
    def alignment(self) -> dict[str, dict[str, float]]:
        """``early`` and ``late`` in training on digits: each block's mean cosine with the true gradient; empty where there is none."""
        run = training_runs.train(self.subject, epochs=PRACTICE_EPOCHS, alignment_every=4)
        seen: dict[str, dict[str, list[float]]] = {"early": {}, "late": {}}
        for name in sorted({key for epoch in run.history for key in epoch if key.startswith("alignment/") and key.endswith("/cosine")}):
            values = [epoch[name] for epoch in run.history if name in epoch and math.isfinite(epoch[name])]
            block = name.split("/")[1]
            if values:
                seen["early"][block], seen["late"][block] = values[:1], values[-1:]
        return {when: {block: round(value[0], 4) for block, value in blocks.items()} for when, blocks in seen.items()}

    @cached_property
    def whole(self) -> WholeExamination:
        """Whole runs of the rule with its own settings."""
        return examine_whole_runs(self.subject)

    @cached_property
    def lesson(self) -> Lesson:
        """The rule, its floor, its own-prediction twin and back-propagation on digits."""
        return learn_lesson(self.subject)

    # --- in words ---------------------------------------------------------------------------------------------------

    @property
    def credit(self) -> str:
        """How far credit travels, in words: the first line of the certificate."""
        if self.equals_backprop:
            return "equivalent to back-propagation"
        if any(matrix.unmeasured() or self.doubts(kind) for kind, matrix in self.downstream.items()):
            return "unmeasured"
        reach = max(matrix.reach() or 0 for matrix in self.downstream.values())
        if not reach:
            return "local"
        everything = any(matrix.reach() == len(matrix.blocks) - 1 for matrix in self.downstream.values())
        return "uses the weights of all blocks above" if everything else f"uses the weights of {reach} block{'s' * (reach > 1)} above"

    @property
    def hidden_that_learn(self) -> list[str]:
        """Names of the blocks below the last that whole runs judge."""
        return [name for name in self.whole.reading.blocks[:-1] if name not in self.whole.reading.silent]

    @property
    def credit_in_whole_runs(self) -> str:
        """How far credit travels, in words, by whole runs and on the specimens: the wider of both."""
        small, reading = self.credit, self.whole.reading
        if self.whole.trouble or small.startswith("equivalent"):
            return small if small != "local" else "unmeasured"
        credits: tuple[tuple[Verdict, str], ...] = (
            ("reads", "uses the weights of {}"),
            ("at construction", "made from the first weights of {}, before the first step"),
            ("executes", "finds out the weights of {} by executing them"),
        )
        for verdict, words in credits:
            reach = reading.reach(verdict)
            if reach:
                blocks = "all blocks above" if reach == len(reading.blocks) - 1 else f"{reach} block{'s' * (reach > 1)} above"
                return words.format(blocks)
        if reading.found("unmeasured") or reading.trouble or self.whole.unaligned or self.whole.contradicts_itself:
            return "unmeasured" if small == "local" else small
        if reading.found("statistics"):
            return "local, scaled by a statistic of the first weights above"
        judged = set(self.hidden_that_learn) <= set(reading.cells)
        return "local" if small == "unmeasured" and reading.exact and reading.cells and judged else small

    def properties(self, *, quick: bool = False) -> dict[str, Any]:
        """Return the properties as plain values, for the certificate; one that cannot be measured says why, and keeps the others."""
        measured: dict[str, Callable[[], Any]] = {
            "credit": lambda: self.credit if quick else self.credit_in_whole_runs,
            "specimens": lambda: {kind: self.subject.specimen_settings(self.specimen(kind)) for kind in self.kinds},
            "precision": lambda: str(self.dtype).removeprefix("torch."),
            "dependence": lambda: {"name": self.dependence_name, "matrices": {k: m.to_dict() for k, m in self.dependence.items()}},
            "downstream_weights": lambda: {
                "reach": max((m.reach() or 0 for m in self.downstream.values()), default=0),
                "matrices": {k: m.to_dict() for k, m in self.downstream.items()},
            },
            "silent_blocks": lambda: self.silent,
            "reverse": self._reverse,
            "forward_mode": lambda: any(observation.total().forward_mode for observation in self.observations.values()),
            "labels_change": lambda: self.label_sensitive,
            "gradient_cosine": lambda: {k: {b: round(c, 6) for b, c in o.cosines().items()} for k, o in self.observations.items()},
            "passes": lambda: {k: o.measured_passes() for k, o in self.observations.items()},
            "memory": lambda: self.memory.to_dict(),
            "time": lambda: {"over_backprop": self.time, "clock": CLOCK},
            "alignment": lambda: {"task": self._practice, "epochs": PRACTICE_EPOCHS, **self.alignment},
        }
        if not quick:
            measured["whole_runs"] = lambda: self.whole.to_dict()
            if self.subject.targets == "classes" and self.subject.own_task is None:
                measured["learning"] = lambda: self.lesson.to_dict()
        found: dict[str, Any] = {}
        unmeasured: dict[str, str] = {}
        for name, measure in measured.items():
            try:
                found[name] = measure()
            except Exception as error:  # a rule that breaks a measurement has failed a check already
                unmeasured[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return {"credit": UNMEASURED, **found, "unmeasured": unmeasured}

    @property
    def _practice(self) -> str:
        return training_runs.task_of(self.subject).spec.name

    def _reverse(self) -> dict[str, Any]:
        total = {kind: observation.total() for kind, observation in self.observations.items()}
        widest = max(total.values(), key=lambda execution: execution.span)
        return {
            "span": self.span,
            "of_blocks": len(self.observations[self.kind].moments[0].updates),
            "layers": max(execution.layers for execution in total.values()),
            "calls_per_step": round(len(widest.calls) / max(1, widest.steps), 2),
            "widest_call": widest.widest.where if widest.widest else "",
            "unattributed": sum(len(execution.unattributed) for execution in total.values()),
            "status": "observed",
        }
