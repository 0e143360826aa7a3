"""The changing state of a run, and how checkpoints save and restore it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bpfree import devices, seeds
from bpfree.errors import BpfreeError
from bpfree.rule import Rule
from bpfree.training import environment
from bpfree.training.alignment import Alignment
from bpfree.training.calibration import Calibration
from bpfree.training.checkpoint import load_weights
from bpfree.training.compiling import Compilation
from bpfree.training.guards import LearningWatch
from bpfree.training.meters import Clock, StepMemory, StepMetrics
from bpfree.training.operations import Operations
from bpfree.training.probes import StepProbe
from bpfree.training.setup import Setup
from bpfree.training.stepper import Stepper
from bpfree.training.streams import StreamState

__all__ = ["Position", "RunState", "copied"]


@dataclass
class Position:
    """The position of a run in its training; all of it is saved.

    Attributes:
        phase: index of the current phase; ``phase_epoch`` passes of it are complete.
        phase_seconds, phase_operations: where it began.
        epoch: passes completed in all; ``batch`` batches of the next one are done, which are ``share`` of it.
        step: updates.
        samples: examples drawn.
        epoch_seconds, epoch_samples, epoch_step: where the current pass began.
        best_epoch, best_score: of the primary metric on validation so far, greater being better; epoch 0: nothing was measured yet.
    """

    phase: int = 0
    phase_epoch: int = 0
    phase_seconds: float = 0.0
    phase_operations: int = 0
    epoch: int = 0
    batch: int = 0
    share: float = 0.0
    step: int = 0
    samples: int = 0
    epoch_seconds: float = 0.0
    epoch_samples: int = 0
    epoch_step: int = 0
    best_epoch: int = 0
    best_score: float = -math.inf


SAVED: dict[str, type] = {"addons": list, "generator": torch.Tensor, "global": dict, "optimizers": dict, "stream": dict}
"""Types of the parts that are taken up only once the run has begun, so that others are refused before."""


class RunState:
    """The changing parts of a run.

    Args:
        setup: the run's; the rule is on its device.

    Attributes:
        at: the position of the run.
        clock, metrics, memory, operations, compilation: what it measures.
        probes: measure single steps, the outermost first (``training/probes.py``).
        stepper, updater, step: takes the steps; its optimisers, and the step that rules are handed.
        load: of the machine when the run began; ``None`` where that is not known.
        begun: phases that have begun, which is what a loaded rule must replay.
        best: validation score and weights (on the CPU) of the best epoch, where weights are selected so.
        learning: checks that fixed parameters stay, and that learning ones move.
        stream: scores and kept examples of a task of several stages.
        calibration: values that the rule chose on the validation split after the last step, if it has.
    """

    def __init__(self, setup: Setup) -> None:
        rule, config, device, team = setup.rule, setup.config, setup.device, setup.team
        self.rule, self.device, self.team = rule, device, team
        self._seeds = partial(seeds.derive_in, config.stream, config.seed)
        self.at = Position()
        self.clock, self.metrics, self.memory = Clock(device), StepMetrics(), StepMemory(device, self.kept)
        self.stepper = Stepper(
            rule, config.optimizer, schedule=config.schedule, clip=config.clip, seed=config.seed, stream=config.stream, device=device
        )
        self.updater, self.step = self.stepper.updater, self.stepper.step
        if team.stream:
            self.step.generator.manual_seed(self._seeds("noise", *team.stream))
        self.operations = Operations(self.stepper, team.world)
        alignment = Alignment(self.stepper, config.alignment, parts=config.accumulate)
        self.compilation = Compilation(rule.compiled(), config.compile, device)
        self.probes: list[StepProbe] = [self.compilation, alignment, self.operations, self.memory]
        self.best: tuple[float, dict[str, Any]] | None = None
        self.load = environment.load()
        self.learning = LearningWatch(rule, team.world, twin=config.twin)
        self.calibration: Calibration | None = None
        self.stream = StreamState(setup.task, config.seed)
        self.begun = 0
        self._complete: Position | None = None

    def solve(self, name: str, *arguments: Any) -> None:
        """Call the rule outside of steps (``prepare``, ``start_phase``, ``end_phase``): on the clock, its operations and memory counted."""
        method = getattr(self.rule, name)
        if getattr(method, "__func__", None) is getattr(Rule, name):  # there is nothing to do
            return

        self.charge(partial(method, *arguments), partial(self.memory.beside_steps, name))

    def charge(self, work: Callable[[], object], watch: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """Do work of the training outside of steps: on the clock, its operations counted; inside ``watch``, which is not timed."""

        def call() -> None:
            with watch(), self.clock.running():
                work()

        with self.compilation.apart(self.clock):
            self.operations.add_call(call, self.step)

    def begin(self) -> None:
        """Begin the first phase, after the rule has prepared."""
        self.at.phase_seconds, self.at.phase_operations = self.clock.report(), self.operations.total

    def advance(self, examples: int, batches: int) -> None:
        """Add a step, with its number of examples, and of batches of the pass."""
        at = self.at
        at.batch, at.samples = at.batch + 1, at.samples + examples
        at.step = self.step.index = at.step + 1
        at.share = at.batch / batches

    def end_pass(self) -> None:
        """End a pass over the training split."""
        at = self.at
        at.epoch, at.phase_epoch, at.batch, at.share = at.epoch + 1, at.phase_epoch + 1, 0, 0.0
        self.step.epoch = at.epoch
        self.updater.epoch_ended()

    def end_phase(self) -> None:
        """End the current phase."""
        self._complete = dataclasses.replace(self.at)
        self.at.phase, self.at.phase_epoch, self.at.phase_seconds = self.at.phase + 1, 0, self.clock.report()
        self.at.phase_operations = self.operations.total

    def end_training(self) -> None:
        """End the last phase: a checkpoint from now on can resume it, should the budget become larger."""
        if self._complete is not None and self._complete.phase_epoch:
            self.at = self._complete

    def kept(self) -> int:
        """Return the bytes that are held between steps: parameters, buffers and optimiser state."""
        return sum(t.numel() * t.element_size() for t in (*self.rule.parameters(), *self.rule.buffers(), *self.updater.tensors()))

    def peak_memory(self) -> float | None:
        """Return MiB: a step's peak and what is held between steps, of the process with most; ``None`` if it was not measured."""
        return self.team.world.largest(self.memory.total() or 0.0)[0] or None

    def epoch_metrics(self) -> dict[str, float]:
        """Return costs and step metrics of the pass that ended, without those not measured, and start those of the next pass."""
        at, seconds, processor = self.at, self.clock.report(), self.clock.report_processor()
        spent, samples, steps = seconds - at.epoch_seconds, at.samples - at.epoch_samples, at.step - at.epoch_step
        at.epoch_seconds, at.epoch_samples, at.epoch_step = seconds, at.samples, at.step
        measured = {
            "processor_seconds": processor,
            "samples_per_second": samples / spent if spent and samples else None,
            "step_ms": 1000 * spent / steps if spent and steps else None,
            "peak_memory_mb": self.peak_memory(),
            "forwards": self.operations.forwards,
        }
        return {
            "epoch": float(at.epoch),
            "samples": float(at.samples),
            "steps": float(at.step),
            "seconds": seconds,
            **known(measured),
            **self.metrics.epoch(self.team.merged),
        }

    def costs(self) -> dict[str, float]:
        """Return the costs of the run, for its result, without those that were not measured."""
        self.clock.settle()
        seconds, parameters = self.clock.report(), list(self.rule.parameters())
        measured = {
            "train/processor_seconds": self.clock.report_processor(),
            "train/samples_per_second": self.at.samples / seconds if seconds and self.at.samples else None,
            "train/peak_memory_mb": self.peak_memory(),
            "load_start": self.load,
            "load_end": environment.load(),
        }
        return {
            "train/seconds": seconds,
            "train/samples": float(self.at.samples),
            "train/steps": float(self.at.step),
            **known(measured),
            **self.operations.costs(),
            **self.compilation.costs(),
            "parameters": float(sum(p.numel() for p in parameters)),
            "parameters_trained": float(sum(p.numel() for p in parameters if p.requires_grad)),
        }

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values without the rule's weights; ``ranks`` holds what each of several processes has alone."""
        own: dict[str, Any] = {
            "generator": self.step.generator.get_state(),
            "global": devices.global_state(self.device),
            "metrics": self.metrics.state_dict(),
            "statistics": self.team.statistics(),
            "memory": self.memory.state_dict(),
        }
        return {
            "position": dataclasses.asdict(self.at),
            "seconds": self.clock.seconds,
            "clock": self.clock.state_dict(),
            "load": self.load,
            "memory": {**own["memory"], "step_bytes": int(self.team.world.largest(self.memory.step_bytes)[0])},
            "operations": self.operations.state_dict(),
            "optimizers": self.team.optimizers(self.updater),
            "generator": own["generator"],
            "global": own["global"],
            "metrics": self.team.merged(own["metrics"]),
            "best": None if self.best is None else {"score": self.best[0], "weights": self.best[1]},
            "learning": self.learning.state_dict(),
            "stream": self.stream.state_dict(),
            "addons": self.updater.addon_states(),
            "calibration": None if self.calibration is None or self.calibration.step != self.at.step else self.calibration.to_dict(),
            "device": self.device.type,
            **({} if self.team.world.size == 1 else {"parallel": self.team.kind, "ranks": self.team.world.collected(own)}),
        }

    def _own(self, saved: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Return the state that this process had alone, if as many processes shared the work in the same way."""
        ranks, world = saved.get("ranks", ()), self.team.world
        same = world.size > 1 and len(ranks) == world.size and saved["parallel"] == self.team.kind
        return ranks[world.rank] if same else None

    def take_position(self, saved: Mapping[str, Any]) -> None:
        """Restore a saved position; parameters and optimisers follow when the phases have been replayed."""
        wrong = [name for name, kind in SAVED.items() if name in saved and not isinstance(saved[name], kind)]
        if wrong:
            raise TypeError(f"{', '.join(wrong)} cannot be {type(saved[wrong[0]]).__name__}")
        self.at = Position(**saved["position"])
        self.clock.load_state_dict(saved.get("clock"), saved["seconds"])
        self.load = saved.get("load", self.load)
        self.operations.load_state_dict(saved.get("operations"))
        own, whole = self._own(saved), saved["metrics"] if self.team.world.first else {}
        self.metrics.load_state_dict(whole if own is None else own["metrics"])
        memory = saved.get("memory") or {"step_bytes": saved["step_bytes"], "seen": {}}  # older checkpoints: no counts
        if own is None and ("ranks" in saved or self.team.world.size > 1):
            memory = {"step_bytes": memory["step_bytes"], "seen": {}}  # a step is different now
        self.memory.load_state_dict(memory if own is None else own["memory"])
        self.learning.load_state_dict(saved.get("learning"))
        self.stream.load_state_dict(saved.get("stream"))
        self.calibration = Calibration(**saved["calibration"]) if saved.get("calibration") else None
        self.step.index, self.step.epoch = self.at.step, self.at.epoch
        if saved["best"] is not None:
            self.best = (saved["best"]["score"], saved["best"]["weights"])

    def take_weights(self, content: Mapping[str, Any]) -> None:
        """Load a checkpoint's weights, optimisers and generators.

        Raises:
            BpfreeError: they do not fit the network.
        """
        load_weights(self.rule, content, fix="resume with the same configuration")
        try:
            self._take_training(content["training"])
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise BpfreeError(f"the checkpoint's state of training does not fit: {error}", fix="use another checkpoint") from error

    def _take_training(self, saved: Mapping[str, Any]) -> None:
        if self.calibration is not None:  # calibrated values are no part of the training, which may be resumed
            self.calibration.undo(self.rule)
        self.updater.load_addon_states(saved.get("addons", ()))
        self.updater.load_state_dict(self.team.own_optimizers(saved["optimizers"]))
        self._take_generators(saved)

    def _take_generators(self, saved: Mapping[str, Any]) -> None:
        own = self._own(saved)
        if own is None and self.team.stream:  # a process that did not exist when the checkpoint was written: draw fresh noise
            self.step.generator.manual_seed(self._seeds("noise", *self.team.stream, self.at.step))
            torch.manual_seed(self._seeds("global", *self.team.stream, self.at.step))
            return
        states = saved if own is None else own
        if saved["device"] == self.device.type:
            self.step.generator.set_state(states["generator"].cpu())
        devices.set_global_state({name: state.cpu() for name, state in states["global"].items()}, self.device)
        if own is not None:
            buffers = dict(self.rule.named_buffers())  # not by load_state_dict, which a rule may take for the weights of a whole run
            for name, value in own["statistics"].items():
                buffers[name].copy_(value)


def known(measured: Mapping[str, float | None]) -> dict[str, float]:
    """Keep the costs that were measured."""
    return {name: value for name, value in measured.items() if value is not None}


def copied(rule: Rule) -> dict[str, Any]:
    """Copy the rule's state dict to the CPU."""
    return {name: value.detach().cpu().clone() for name, value in rule.state_dict().items()}
