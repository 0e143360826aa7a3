"""One call of ``Trainer.fit``: the loop for every rule, and the objects that are made for it."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bpfree.errors import BpfreeError, DiskError, UsageError
from bpfree.rule import Metrics, Rule
from bpfree.run import ReadOnly
from bpfree.step import Batch, Phase, Stage, Step
from bpfree.tasks.loading import Loader
from bpfree.tasks.stages import walk
from bpfree.tasks.task import Split
from bpfree.training import environment
from bpfree.training.batches import Batches
from bpfree.training.budget import BudgetTracker
from bpfree.training.calibration import NOT_CALIBRATED, calibrates
from bpfree.training.checkpoint import replay
from bpfree.training.divergence import check_losses, check_weights
from bpfree.training.evaluation import Evaluator
from bpfree.training.features import FeatureLoader
from bpfree.training.guards import Values, named_tensors, only_read
from bpfree.training.hook_watch import HookWatch
from bpfree.training.observers import Observers
from bpfree.training.operations import kind_of
from bpfree.training.phases import learning
from bpfree.training.probes import take_step
from bpfree.training.saving import Checkpoints
from bpfree.training.selection import Selection
from bpfree.training.setup import Setup
from bpfree.training.state import RunState
from bpfree.training.stopping import Stop

__all__ = ["Session"]

logger = logging.getLogger("bpfree")

PREDICTING = ("predict", "alternatives", "effort", "read", "sample")
"""Methods of a rule that an evaluation of its predictions calls."""


class Session:
    """Trains a rule once, from the first phase or from a checkpoint.

    Args:
        setup: the run's; the rule is moved to the device.
        observers: of the run.
        stop: whether it is to end early.
        resume: the checkpoint.

    Attributes:
        state: everything that changes while it trains.
        at_rest: whether nothing but an evaluation is in progress: a checkpoint is whole wherever that is stopped.

    Raises:
        BpfreeError: the checkpoint cannot be read, or is of another rule or other data, or is beyond the budget.
    """

    def __init__(self, setup: Setup, observers: Observers, stop: Stop, resume: Path | None = None) -> None:
        self._setup, self._observers, self._stop = setup, observers, stop
        self._rule, self._run, self._config, self._team = setup.rule, setup.run, setup.config, setup.team
        self._rule.to(setup.device)
        if self._config.twin:
            self._rule.freeze_features()
        self.state = RunState(setup)
        self._checkpoints = Checkpoints(setup, self.state)
        self._selection = Selection(setup, self.state, self._checkpoints)
        self._evaluator = Evaluator(setup, self._while_evaluating)
        self._batches = Batches(setup, self._evaluator)
        self._budget_tracker = BudgetTracker(setup, self.state)
        observers.watch = HookWatch(self._run, self.state)
        self._next_look = time.perf_counter() + self._config.log_interval
        self.at_rest = self._tests = False
        self._saved = None if resume is None else self._checkpoints.read(resume)
        self._check_budget()
        self._describe()

    def _check_budget(self) -> None:
        if (
            self._saved is None
            or self._saved["budget"] == dataclasses.asdict(self._setup.budget)
            or (used := self._budget_tracker.used()) <= 1
        ):
            return
        raise UsageError(
            f"the run has already used {100 * used:.0f} % of the new budget",
            where="budget",
            fix="give a larger budget, or test the trained rule with bpfree evaluate",
        )

    def _describe(self) -> None:
        if self._setup.task.validation is None and calibrates(self._rule) and not self._config.calibration.folds:
            self._run.tags["calibration"] = NOT_CALIBRATED
        self._run.total_epochs = self._budget_tracker.passes or None
        together = {"world_size": str(self._setup.world.size), "parallel": self._team.kind}
        self._run.tags.update(environment.describe(self._setup.device) | together)

    # --- the loop ---------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train until the budget is used, and test once.

        Raises:
            Interrupted: the run was asked to stop.
            Diverged: a loss, or a weight, is not finite.
        """
        state = self.state
        self._notify("run_start")
        for phase in self._phases():
            at, whole = state.at, not (state.at.phase_epoch or state.at.batch)
            with learning(self._rule, phase):
                state.learning.begin_phase(phase, state.updater.groups, at.step)
                self._notify("phase_start", phase=phase)
                self._catch_up(phase)
                while not self._budget_tracker.phase_is_over(phase):
                    self._one_pass(phase)
                if not at.phase_epoch:  # a phase without a pass
                    state.solve("end_phase", phase, state.step)
                state.learning.end_phase(steps=at.step, whole=whole)
            self._batches.end_phase()
            self._notify("phase_end", phase=phase)
            state.end_phase()
            if self._budget_tracker.is_over():
                break
        self._finish()

    def _one_pass(self, phase: Phase) -> None:
        """Train for a pass over the training split, or for the rest of one that was interrupted."""
        state, watched = self.state, self._observers.listens("step_end")
        loader = self._batches.batches(phase, state.clock, self._while_computing_features)
        self._count_forward(phase, loader)
        state.clock.start()
        with environment.autocast(self._setup.device, self._config.precision):
            for batch in loader.batches(state.at.epoch, state.at.batch):
                self._aim(phase)
                state.clock.step(kind_of(phase, batch))
                metrics = take_step(state.probes, self._update, state.clock, batch, state.step)
                state.metrics.add(metrics, self._team.examples(batch, self._config.accumulate))
                state.operations.add_step(phase, batch, features=isinstance(loader, FeatureLoader))
                state.advance(len(batch), len(loader))
                state.learning.after_step()
                if watched:
                    self._notify("step_end", step=state.step)
                if self._stop.is_time(state.at.step, time.perf_counter() >= self._next_look):
                    self._look()
                if self._stop.reason or self._budget_tracker.is_used_up(phase):
                    break
        halted = self._stop.reason and state.at.batch < len(loader) and not self._budget_tracker.is_used_up(phase)
        if not halted:
            self._team.synchronise()
        state.clock.stop()
        if halted:
            self._stop.obey(self._run.folder)
        state.clock.settle()
        state.end_pass()
        if self._budget_tracker.phase_is_over(phase):  # before the evaluation and the checkpoint, which are to see what it solves
            state.solve("end_phase", phase, state.step)
        self._end_epoch(phase)
        self._stop.confer()
        self._stop.obey(self._run.folder)

    def _catch_up(self, phase: Phase) -> None:
        """Evaluate after the last pass of a run that was stopped before it could."""
        at, evaluated = self.state.at, self._run.history[-1]["epoch"] if self._run.history else 0
        if self._saved is not None and at.phase_epoch and not at.batch and at.epoch > evaluated:
            self._batches.batches(phase, self.state.clock, self._while_computing_features)
            self._end_epoch(phase)

    def _aim(self, phase: Phase) -> None:
        """Set progress and learning rates for the next step."""
        progress = min(1.0, self._budget_tracker.used())
        self.state.stepper.at(progress, None if phase.schedule is None else self._budget_tracker.phase_progress(phase, progress))

    def _update(self, batch: Batch, step: Step) -> Metrics:
        learned = self._team.update(batch, step, self._config.accumulate)
        return {f"rule/{name}": value for name, value in learned.items()}

    def _end_epoch(self, phase: Phase) -> None:
        epoch = self._run.epoch = self.state.at.epoch
        self._stop.confer()
        self._stop.obey(self._run.folder)
        self.state.learning.check_fixed()
        self.state.learning.look(steps=self.state.at.step)
        last = self._budget_tracker.used() >= 1 or self._budget_tracker.phase_is_over(phase)
        evaluated: dict[str, float] = {}
        if phase.evaluate and (last or epoch % self._config.evaluation.every == 0):
            validate = only_read(self._rule, *PREDICTING)(partial(self._evaluator.validate, epoch))
            self.at_rest = True
            evaluated = self._setup.world.from_first(validate)
            self.at_rest = False
        metrics = self.state.epoch_metrics() | evaluated  # now, as a run that is stopped while it evaluates does so when it is resumed
        self._run.history.append(metrics)
        self._notify("epoch_end", metrics=metrics, rule=self._rule)
        check_losses(metrics, self.state.at.step)
        check_weights(self._rule, epoch)
        self._selection.keep(metrics)
        self._budget_tracker.note(metrics)
        self._budget_tracker.ending = self._setup.world.from_first(lambda: self._stop.ending)
        every = self._config.checkpoint.every
        if (every and epoch % every == 0) or self._budget_tracker.used() >= 1:
            self._save_on_the_way()

    # --- phases -----------------------------------------------------------------------------------------------------

    def _phases(self) -> Iterator[Phase]:
        """Yield the phases to train, each after it has begun; a resumed run starts with the phase in which it was saved."""
        steps, state, saved = walk(self._rule, self._setup.budget, self._setup.task.stages), self.state, self._saved
        if saved is None:
            self._prepare()
            state.begin()
        else:
            current = None
            for each in replay(self._rule, steps, saved):
                if isinstance(each, Stage):
                    self._begin_stage(each)
                else:
                    current = each
                    self._team.check(current)
                    self._enter(current)
            state.take_weights(saved)
            if current is not None and state.at.phase < state.begun:
                yield current
        for each in steps:
            if isinstance(each, Stage):
                self._end_stage()
                state.solve("start_stage", each)
                self._begin_stage(each)
                continue
            self._team.check(each)
            state.solve("start_phase", each)
            self._enter(each)
            if state.begun == 1:
                self._evaluator.try_protocols()
            yield each

    def _begin_stage(self, stage: Stage) -> None:
        stream = self.state.stream
        stream.stage = self.state.step.stage = stage
        self._batches.begin_stage(stream.positions())
        self._evaluator.begin_stage(stage, stream.seen)

    def _end_stage(self) -> None:
        """Score the stages seen so far, and choose the examples to keep of the present one; only once, also in a resumed run."""
        stream = self.state.stream
        if stream.ended:
            return
        scored = only_read(self._rule, *PREDICTING)(partial(self._evaluator.score_stages, stream.seen))
        for split, scores in self._setup.world.from_first(scored).items():
            stream.add(split, scores)

        def features(positions: Tensor) -> Tensor:
            inputs: Tensor = self._batches.features(
                self._evaluator.raw(self._setup.task.train.subset(positions)), lambda share: None
            ).inputs
            return inputs

        with only_read(self._rule, "features"):
            self.state.charge(partial(stream.keep, features))

    def _prepare(self) -> None:
        if type(self._rule).prepare is not Rule.prepare:
            before, task = Values(named_tensors(self._rule)), self._setup.task
            first = task.stages[0].train if task.stages else None  # of a stream nothing is seen ahead
            seen = task.train if first is None else task.train.subset(first)
            self.state.solve("prepare", seen, self.state.step.generator)  # the first process's is sent to all by a phase
            self.state.learning.prepared(before)

    def _enter(self, phase: Phase) -> None:
        self.state.stepper.enter(phase)
        self._team.enter(self.state.step, self.state.updater)
        self.state.begun += 1

    def _count_forward(self, phase: Phase, loader: Loader | FeatureLoader) -> None:
        """Count once, on the first training examples, the operations of a forward pass and of a phase's features."""
        operations, at, train = self.state.operations, self.state.at, self._setup.task.train
        few = operations.wants_features(phase)
        if not operations.trouble and (operations.forward is None or few):
            batch = next(iter(self._evaluator.raw(train.subset(torch.arange(min(self._config.batch_size, len(train)))))))
            with environment.autocast(self._setup.device, self._config.precision):
                if operations.forward is None:
                    operations.count_forward(batch.inputs, len(batch))
                if few:
                    operations.count_features(phase, batch.inputs)
        new = few or not self._rule.fixed_features
        if isinstance(loader, Loader) and phase.on_features and new and not at.phase_epoch and not at.batch:  # they were computed here
            operations.add_features(len(self._batches.examples(phase)))

    # --- between steps ----------------------------------------------------------------------------------------------

    def _while_computing_features(self, share: float) -> None:
        """Show the progress while features are computed; weights do not change, so there is nothing to save."""
        self._stop.obey(self._run.folder)
        self._show({"features": share})

    def _while_evaluating(self, share: float) -> None:
        """Show the progress while a split is evaluated, and stop if asked; several processes wait for the first one."""
        if self._setup.world.size == 1:
            self._stop.obey(self._run.folder)
        self._show({"evaluation": share})

    def _show(self, metrics: dict[str, float]) -> None:
        if time.perf_counter() >= self._next_look:
            self._next_look = time.perf_counter() + self._config.log_interval
            self._notify("progress", metrics=self._standing() | metrics)

    def _look(self) -> None:
        """Read the step metrics, check for divergence, and save if a checkpoint is due."""
        self._next_look = time.perf_counter() + self._config.log_interval
        means = self._team.joined(self.state.metrics.flush())
        check_losses(means, self.state.at.step)
        self._notify("progress", metrics=self._standing() | means)
        late = time.monotonic() - self._checkpoints.saved_at > 60 * self._config.checkpoint.minutes
        if self._stop.confer(late and self._setup.world.first)[0]:
            with self.state.clock.stopped():
                self._save_on_the_way()

    def _standing(self) -> dict[str, float]:
        state, at = self.state, self.state.at
        standing = {"step": float(at.step), "epoch": at.epoch + at.share, "samples": float(at.samples)}
        return standing | {"progress": state.step.progress, "seconds": state.clock.seconds}

    def _notify(self, hook: str, **arguments: Any) -> None:
        self._observers.notify(hook, **{name: ReadOnly(given) if name == "metrics" else given for name, given in arguments.items()})

    def save(self, weights: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint, with the rule's weights or others."""
        self.state.learning.look(steps=self.state.at.step)
        path = self._checkpoints.save(weights)
        if path is not None:
            self._notify("checkpoint_saved", path=path)

    def _save_on_the_way(self) -> None:
        """Write a checkpoint; if the disk is full, continue training, and write the next one when it is due."""
        try:
            self.save()
        except DiskError as error:
            if not self._checkpoints.trouble:
                logger.warning("%s (%s); training continues and will try again", error.what, error.where)
            self._checkpoints.trouble = error.what

    def rescue(self) -> None:
        """Save the progress of a stopped run, unless the weights to be tested are loaded: then it is saved already."""
        if not self._tests:
            self.save()

    # --- the end ----------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Load the selected weights, and test them once, or not at all if the configuration says so."""
        state, world, result = self.state, self._setup.world, self._run.result
        if type(result) is not dict:
            raise BpfreeError(
                f"the run's result was replaced by a {type(result).__name__} while it trained",
                where=type(self._rule).__name__,
                fix="let rule and observers leave the record of a run alone",
            )
        self._end_stage()
        state.end_training()
        state.learning.end_run(steps=state.at.step, gradients=state.updater.received)
        if self._checkpoints.saved_epoch != state.at.epoch:
            self.save()
        self._tests = True
        self._selection.take(self.save)
        tested = world.from_first(only_read(self._rule, *PREDICTING)(self._evaluator.test))
        self._run.reason, ended = self._budget_tracker.told()
        result.update(tested | state.stream.results(self._setup.task.spec.primary) | state.costs() | ended)
        check_losses(tested, state.at.step)
        protocols = partial(self._evaluator.protocols, self._trained_features, self._batches.resident)
        result.update(world.from_first(only_read(self._rule, "features")(protocols)))
        self._evaluator.keep_predictions()

    def _trained_features(self, batches: Loader) -> Split:
        """Compute a split's features with the trained rule, unless the run is asked to stop."""

        def look(share: float) -> None:
            if self._stop.asked:
                raise BpfreeError(f"{self._stop.asked}; bpfree evaluate computes them")

        return self._batches.features(batches, look)
