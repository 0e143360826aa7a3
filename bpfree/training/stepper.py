"""Steps with a rule outside the trainer: optimisers, generators and phases as in a run, in a loop of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bpfree import seeds
from bpfree.errors import BpfreeError
from bpfree.options import OptimizerConfig, ScheduleConfig
from bpfree.rule import Metrics, Rule
from bpfree.step import Batch, Phase, Step
from bpfree.tasks.task import Examples
from bpfree.training.accumulation import accumulate
from bpfree.training.phases import learning
from bpfree.training.updater import ClipConfig, Updater

__all__ = ["Stepper", "new_step"]


class Stepper:
    """Take steps with a rule outside the trainer: the same updates and noise as in a run of the same seed, bit for bit.

    Of torch's global generators the stepper has states of its own, which are set while the rule works; so steppers can be interleaved, and
    the caller's states stay.

    Args:
        rule: trained in place.
        optimizer: over the rule's default.
        schedule: of the learning rates, over the progress that :meth:`at` is called with.
        clip: of gradients.
        seed: of all noise.
        stream: further word of the seeds of the noise.
        device: where the rule is moved; ``None``: it stays where it is.

    Attributes:
        rule: the same rule.
        updater: its optimisers; ``updater.groups`` are the parameter groups of the current phase.
        step: what the rule's methods are called with, such as ``rule.credit(batch, stepper.step)``.
        device: the rule's.
    """

    def __init__(
        self,
        rule: Rule,
        optimizer: OptimizerConfig | None = None,
        *,
        schedule: ScheduleConfig | None = None,
        clip: ClipConfig | None = None,
        seed: int = 0,
        stream: str | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        self.rule = rule if device is None else rule.to(device)
        self.device = next((p.device for p in rule.parameters()), torch.device(device or "cpu"))
        self.updater = Updater(rule, optimizer, schedule=schedule, clip=clip)
        self._seed, self._stream = seed, stream
        generator = torch.Generator(self.device).manual_seed(self._derive("noise"))
        keyed = seeds.KeyedGenerators(seed, self.device, lambda: (self.step.index, self.step.part), stream=stream)
        self.step = Step(generator, keyed, self.updater.apply, self.updater.lr, Phase())
        drawn = self._derive("global")
        self._drawn: dict[str, Any] = {kind: torch.Generator(kind).manual_seed(drawn).get_state() for kind in {"cpu", self.device.type}}

    def _derive(self, *words: object) -> int:
        return seeds.derive_in(self._stream, self._seed, *words)

    # --- in the order of a run --------------------------------------------------------------------------------------

    def prepare(self, data: Examples) -> None:
        """Call ``rule.prepare`` with the training split, raw."""
        with self.drawing():
            self.rule.prepare(data, self.step.generator)

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[Phase]:
        """Begin a phase; inside, the rule is in train mode and the phase's groups learn.

        Raises:
            UsageError: the phase names a group that the rule does not have.
        """
        with self.drawing():
            self.rule.start_phase(phase)
        self.enter(phase)
        with learning(self.rule, phase):
            yield phase

    def enter(self, phase: Phase) -> None:
        """Adopt the parameters and make the optimiser of a phase that the rule has begun."""
        self.rule.to(self.device)
        self.updater.start_phase(phase)
        self.step.phase = phase

    def at(self, progress: float, in_phase: float | None = None) -> None:
        """Set ``step.progress`` and the learning rates of the next step.

        Args:
            progress: share of the budget that is used, 0 to 1.
            in_phase: the progress of the current phase, for a phase with a schedule of its own.
        """
        self.step.progress = progress
        self.updater.at(progress if in_phase is None else in_phase)

    def take(self, batch: Batch, parts: int = 1) -> Metrics:
        """Take a step on a batch and return the rule's metrics, detached scalars on the device.

        Args:
            batch: on the device, normalised (``spec.normalise``).
            parts: micro-batches that its gradient is accumulated from.
        """
        watching = self.updater.activations.watching() if self.updater.watches else nullcontext()
        with self.drawing(), watching:
            if self.updater.wants_closure:
                self.updater.recompute = self._again(batch)
            metrics = self.rule.learn(batch, self.step) if parts == 1 else accumulate(self.rule, batch, self.step, parts)
        self.step.index += 1
        return metrics

    def _again(self, batch: Batch) -> Callable[[], Tensor]:
        """Make a function that fills the gradients of a batch again, with the same noise, and returns the loss."""
        own, everywhere = self.step.generator.get_state(), seeds.global_state(self.device)

        def credit() -> Tensor:
            self.step.generator.set_state(own)
            seeds.set_global_state(everywhere, self.device)
            self.updater.zero_grad()
            metrics = self.rule.credit(batch, self.step)
            if "loss" not in metrics:
                what = f"{type(self.rule).__name__} gives no metric 'loss', by which {self.updater.config.name} judges its steps"
                raise BpfreeError(what, where="optimizer.name", fix="choose another optimiser")
            return torch.as_tensor(metrics["loss"])

        return credit

    def end_pass(self) -> None:
        """End a pass over the training split: advance ``step.epoch`` and schedules of torch."""
        self.step.epoch += 1
        self.updater.epoch_ended()

    def end_phase(self) -> None:
        """Call ``rule.end_phase``, after the last pass of the current phase."""
        with self.drawing():
            self.rule.end_phase(self.step.phase, self.step)

    # --- noise ------------------------------------------------------------------------------------------------------

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Use the stepper's own states of torch's global generators inside."""
        with seeds.preserved_global_state(self.device):
            seeds.set_global_state(self._drawn, self.device)
            yield
            self._drawn = seeds.global_state(self.device)

    def aside(self, draw: int = 0) -> Step:
        """Copy the step, with generators of its own, for a measurement that does not change the run.

        Args:
            draw: 0: the noise that the step itself will have; another number: other noise, by number.
        """
        generator = torch.Generator(self.device)
        if draw:
            generator.manual_seed(self._derive("alignment", self.step.index, draw))
        else:
            generator.set_state(self.step.generator.get_state())
        own = replace(self.step, generator=generator)
        seed = seeds.derive(self._seed, "alignment", draw) if draw else self._seed
        own.generator_for = seeds.KeyedGenerators(seed, self.device, lambda: (own.index, own.part), stream=self._stream)
        return own


def new_step(rule: Rule, optimizer: OptimizerConfig | None = None, *, seed: int = 0) -> Step:
    """Make a step for single calls of a rule's methods: ``Stepper(rule, optimizer, seed=seed).step``."""
    return Stepper(rule, optimizer, seed=seed).step
