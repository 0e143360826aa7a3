"""The trainer: one loop for every rule."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bpfree import seeds
from bpfree.errors import BpfreeError, UsageError
from bpfree.rule import Metrics, Rule
from bpfree.run import ReadOnly, Run, new_run_id
from bpfree.step import Batch, Phase
from bpfree.tasks.loading import Loader
from bpfree.tasks.task import Split, Task
from bpfree.training import environment
from bpfree.training.calibration import NOT_CALIBRATED, calibrates
from bpfree.training.compiling import Compilation
from bpfree.training.config import TrainConfig
from bpfree.training.distributed import World
from bpfree.training.divergence import Diverged, check_losses, check_weights
from bpfree.training.evaluation import Evaluator, check_protocols
from bpfree.training.features import FeatureLoader
from bpfree.training.guards import Values, check_fit, check_made_to_learn, named_tensors, only_read
from bpfree.training.hook_watch import HookWatch
from bpfree.training.idle import idle_of_rule
from bpfree.training.limits import Limits
from bpfree.training.norms import check_batches_of_one
from bpfree.training.observers import Observers
from bpfree.training.operations import kind_of
from bpfree.training.phases import learning
from bpfree.training.saving import Checkpoints
from bpfree.training.schedules import CLASSES, check_length, planned_steps
from bpfree.training.selection import Selection
from bpfree.training.state import State
from bpfree.training.stopping import Stop
from bpfree.training.supply import Supply
from bpfree.training.team import make_team

__all__ = ["Interrupted", "Trainer"]

logger = logging.getLogger("bpfree")

CONFER_EVERY = 20
"""Steps between the moments at which several processes agree whether to report, save or stop."""

PREDICTING = ("predict", "alternatives", "read")
"""Methods of a rule that an evaluation of its predictions calls."""


class Interrupted(BpfreeError):
    """The run was asked to stop (SIGINT, SIGTERM, ``Trainer.stop``) and has saved a checkpoint to resume from.

    Attributes:
        exit_code: 130 for SIGINT, 143 for SIGTERM, as shells have it.
    """

    def __init__(self, reason: str, folder: Path | None) -> None:
        self.exit_code = 143 if "SIGTERM" in reason else 130
        super().__init__(reason, fix=f"resume it with: bpfree train --resume {folder}" if folder else "")


class Trainer:
    """Trains a rule on a task.

    Where a launcher has started several processes of the same program, each with a trainer, they train together; the first one alone
    evaluates, notifies observers, and writes.

    Args:
        rule: with its network; it is moved to the device and trained in place.
        task: its splits and spec.
        config: everything about training.
        folder: where checkpoints go; ``None``: nothing is written.
        observers: objects with lifecycle hooks (``bpfree.hooks``): tracking, progress, diagnostics.
        run: the record that observers see; made from the configuration if ``None``.
        recipe: the nested configuration that rebuilds rule and task, kept in checkpoints.
        augment: augmentations of the training batches.
        data: options of the loaders (``resident``, ``workers``).

    Raises:
        UsageError: settings that this rule or task excludes.
    """

    def __init__(
        self,
        rule: Rule,
        task: Task,
        config: TrainConfig | None = None,
        *,
        folder: str | Path | None = None,
        observers: Iterable[Any] = (),
        run: Run | None = None,
        recipe: Mapping[str, Any] | None = None,
        augment: Iterable[Any] = (),
        data: Mapping[str, Any] | None = None,
    ) -> None:
        self.rule, self.task, self.config, self.recipe = rule, task, config or TrainConfig(), recipe
        self._world = World.here()
        self.device = environment.resolve_device(self.config.device, process=self._world.local_rank)
        name = f"{type(rule).__name__.lower()}-{task.spec.name}-s{self.config.seed}"
        self.run = run or Run(new_run_id(name), name, config=dataclasses.asdict(self.config))
        if folder is not None:
            self.run.folder = Path(folder)
        if not self._world.first:
            self.run.folder, observers = None, ()
        self.budget = self.config.budget.resolve(len(task.train))
        self._check()
        self._observers = Observers(observers, self.run)
        self._augment, self._data = tuple(augment), {"dtype": rule.network.dtype, **(data or {})}
        self._stop = Stop(self._world)
        self._next_look, self._overdue = math.inf, False

    def _check(self) -> None:
        config = self.config
        check_fit(self.rule, self.task)
        self._team = make_team(self.rule, config, self._world)
        check_protocols(config.evaluation.protocols, self.rule)
        for key, reason in idle_of_rule(config, self.rule):
            raise UsageError(reason, where=key, fix="leave it out")
        if config.schedule.name in CLASSES:
            planned = planned_steps(self.rule, self.budget)
            for steps in [None] if planned is None else planned:
                check_length(config.schedule, steps)
        if self.task.validation is None and config.select == "best-val":
            raise UsageError(
                "without a validation split no best weights can be chosen", where="select", fix="select=last, or task.validation above 0"
            )
        check_made_to_learn(self.rule)
        check_batches_of_one(self.rule, self.task, self.budget, config.batch_size)

    # --- the loop ---------------------------------------------------------------------------------------------------

    def fit(self, resume: str | Path | None = None) -> Run:
        """Train until the budget is used, test once, and return the run (its ``status`` may be ``diverged``).

        Args:
            resume: a checkpoint to resume from.

        Raises:
            Interrupted: after a checkpoint was saved.
            BpfreeError: the checkpoint does not fit.
        """
        with self._session(resume) as saved:
            for index, phase in enumerate(self.rule.phases(self.budget)):
                self._enter(index, phase, saved)
                if index < self._state.at.phase:  # done before the interruption
                    continue
                at, whole = self._state.at, not (self._state.at.phase_epoch or self._state.at.batch)
                with learning(self.rule, phase):
                    self._state.learning.begin_phase(phase, self._state.updater.groups, at.step)
                    self._notify("phase_start", phase=phase)
                    while not self._limits.phase_is_over(phase):
                        self._one_pass(phase)
                    if not self._state.at.phase_epoch:  # a phase without a pass
                        self._solve("end_phase", phase, self._state.step)
                    self._state.learning.end_phase(steps=at.step, whole=whole)
                self._supply.end_phase()
                self._notify("phase_end", phase=phase)
                self._state.end_phase()
                if self._limits.is_over():
                    break
            self._finish(saved)
        return self.run

    def _one_pass(self, phase: Phase) -> None:
        """A pass over the training split, or the rest of one that was interrupted."""
        state, watched = self._state, self._observers.listens("step_end")
        loader = self._supply.batches(phase, state.clock, self._while_computing_features)
        self._count_forward(phase, loader)
        state.clock.start()
        with environment.autocast(self.device, self.config.precision):
            for batch in loader.batches(state.at.epoch, state.at.batch):
                self._aim(phase)
                state.clock.step(kind_of(phase, batch))
                with self._compiled.aside(state.clock):
                    state.metrics.add(self._learn(batch), self._team.examples(batch, self.config.accumulate))
                state.operations.add_step(phase, batch, features=isinstance(loader, FeatureLoader))
                state.advance(len(batch), len(loader))
                state.learning.after_step()
                if watched:
                    self._notify("step_end", step=state.step)
                if self._is_time():
                    self._look()
                if self._stop.reason or self._limits.is_used_up(phase):
                    break
        halted = self._stop.reason and state.at.batch < len(loader) and not self._limits.is_used_up(phase)
        if not halted:
            self._team.synchronise()
        state.clock.stop()
        if halted:
            raise Interrupted(self._stop.reason, self.run.folder)
        state.clock.settle()
        state.end_pass()
        if self._limits.phase_is_over(phase):  # before the evaluation and the checkpoint, which are to see what it solves
            self._solve("end_phase", phase, state.step)
        self._end_epoch(phase)
        self._stop.confer()
        if self._stop.reason:
            raise Interrupted(self._stop.reason, self.run.folder)

    def _learn(self, batch: Batch) -> Metrics:
        """Take the step, after what is measured on its side; returns all metrics by their full names."""
        state, metrics = self._state, {}
        if state.alignment.wants(state.step):
            with state.clock.stopped():
                metrics = state.alignment.measure(batch, state.step)
        watches, counts = state.memory.wants(state.step.phase.name), state.operations.wants(state.step.phase, batch)
        if watches or counts:
            take = self._watched_update if watches else self._measured_update
            with state.clock.stopped():  # a step that is measured is a slow one: the clock charges it by those that are not
                learned = state.operations.count(batch, state.step, take) if counts else take(batch)
        else:
            learned = self._update(batch)
        return metrics | {f"rule/{name}": value for name, value in learned.items()}

    def _watched_update(self, batch: Batch) -> Metrics:
        with self._state.memory.watch(self._state.step.phase.name, self._state.kept):
            return self._measured_update(batch)

    def _measured_update(self, batch: Batch) -> Metrics:
        with self._state.clock.measuring():
            return self._update(batch)

    def _solve(self, name: str, *arguments: Any) -> None:
        """What the rule does outside of steps, as costs of the run."""
        with self._compiled.apart(self._state.clock):
            self._state.solve(name, *arguments)

    def _update(self, batch: Batch) -> Metrics:
        return self._team.update(batch, self._state.step, self.config.accumulate)

    def _count_forward(self, phase: Phase, loader: Loader | FeatureLoader) -> None:
        """Count the operations of a forward pass, once, and of features that a phase is on, on the first training examples."""
        operations, at = self._state.operations, self._state.at
        few = operations.wants_features(phase)
        if not operations.trouble and (operations.forward is None or few):
            count = min(self.config.batch_size, len(self.task.train))
            batch = next(iter(self._evaluator.raw(self.task.train.subset(torch.arange(count)))))
            with environment.autocast(self.device, self.config.precision):
                if operations.forward is None:
                    operations.count_forward(batch.inputs, len(batch))
                if few:
                    operations.count_features(phase, batch.inputs)
        if isinstance(loader, Loader) and phase.on_features and not at.phase_epoch and not at.batch:  # they were computed here
            operations.add_features(len(self.task.train))

    def _aim(self, phase: Phase) -> None:
        """Set progress and learning rates for the step that comes."""
        step = self._state.step
        step.progress = min(1.0, self._limits.used())
        self._state.updater.at(step.progress if phase.schedule is None else self._limits.phase_progress(phase))

    def _end_epoch(self, phase: Phase) -> None:
        epoch = self.run.epoch = self._state.at.epoch
        self._state.learning.check_fixed()
        self._state.learning.look(steps=self._state.at.step)
        metrics = self._state.epoch_metrics()
        last = self._limits.used() >= 1 or self._limits.phase_is_over(phase)
        if phase.evaluate and (last or epoch % self.config.evaluation.every == 0):
            metrics.update(self._world.from_first(only_read(self.rule, *PREDICTING)(partial(self._evaluator.validate, epoch))))
        self.run.history.append(metrics)
        self._notify("epoch_end", metrics=metrics, rule=self.rule)
        check_losses(metrics, self._state.at.step)
        check_weights(self.rule, epoch)
        self._selection.keep(metrics)
        every = self.config.checkpoint.every
        if (every and epoch % every == 0) or self._limits.used() >= 1:
            self._save()

    def _while_computing_features(self, share: float) -> None:
        """Show the progress; weights do not change, so there is nothing to save."""
        if self._stop.reason:
            raise Interrupted(self._stop.reason, self.run.folder)
        if time.perf_counter() >= self._next_look:
            self._next_look = time.perf_counter() + self.config.log_interval
            self._notify("progress", metrics=self._standing() | {"features": share})

    def _is_time(self) -> bool:
        """Whether it is time to look; of several processes the first one says so, at steps at which they confer."""
        due = time.perf_counter() >= self._next_look
        if self._world.size == 1 and not due:
            return False
        if self._world.size > 1 and self._state.at.step % CONFER_EVERY:
            return False
        late = time.monotonic() - self._checkpoints.saved_at > 60 * self.config.checkpoint.minutes
        due, self._overdue = self._stop.confer(due and self._world.first, late and self._world.first)
        return due

    def _look(self) -> None:
        """Read the step metrics, notice divergence, save if it is time."""
        self._next_look = time.perf_counter() + self.config.log_interval
        means = self._team.joined(self._state.metrics.flush())
        check_losses(means, self._state.at.step)
        self._notify("progress", metrics=self._standing() | means)
        if self._overdue:
            with self._state.clock.stopped():
                self._save()

    def _standing(self) -> dict[str, float]:
        state, at = self._state, self._state.at
        standing = {"step": float(at.step), "epoch": at.epoch + at.share, "samples": float(at.samples)}
        return standing | {"progress": state.step.progress, "seconds": state.clock.seconds}

    def _notify(self, hook: str, **arguments: Any) -> None:
        self._observers.notify(hook, **{name: ReadOnly(given) if name == "metrics" else given for name, given in arguments.items()})

    def _notify_end(self) -> None:
        """Notify observers of the end; the run has failed if one refuses it, or changes something, even then."""
        try:
            self._notify("run_end")
        except BpfreeError as error:
            self.run.status, self.run.reason = "failed", error.what
            self._observers.notify_again("run_end")
            raise

    # --- begin and end ----------------------------------------------------------------------------------------------

    @contextmanager
    def _session(self, resume: str | Path | None) -> Iterator[Mapping[str, Any] | None]:
        """Seeds, settings, signals and observers around a run; whatever happens, the caller's state comes back."""
        run = self.run
        with ExitStack() as stack:
            stack.enter_context(self._world.joined())
            stack.enter_context(torch.inference_mode(False))  # whatever the caller, or a plugin's import, has left behind
            stack.enter_context(torch.enable_grad())
            stack.enter_context(environment.numerics(threads=self.config.threads, deterministic=self.config.deterministic))
            stack.enter_context(seeds.preserved_global_state(self.device))
            saved = self._begin(resume)
            run.tags.update(environment.describe(self.device) | {"world_size": str(self._world.size), "parallel": self._team.kind})
            stack.enter_context(self._stop.on_signals())
            run.status = "running"
            try:
                self._notify("run_start")
                if saved is None:
                    self._prepare()
                    self._state.begin()
                yield saved
                run.status = "finished"
            except Diverged as error:
                run.status, run.reason = "diverged", str(error)
                run.result.update(self._state.costs())
            except Interrupted as error:
                self._save()
                run.status, run.reason = "interrupted", error.what
                raise
            except BaseException as error:
                run.status, run.reason = "failed", error.what if isinstance(error, BpfreeError) else f"{type(error).__name__}: {error}"
                raise
            finally:
                self._stop.forget()
                self._notify_end()

    def _prepare(self) -> None:
        if type(self.rule).prepare is not Rule.prepare:
            before = Values(named_tensors(self.rule))
            self._solve("prepare", self.task.train, self._state.step.generator)  # the first process's is sent to all by a phase
            self._state.learning.prepared(before)

    def _begin(self, resume: str | Path | None) -> Mapping[str, Any] | None:
        torch.manual_seed(seeds.derive_in(self.config.stream, self.config.seed, "global", *self._team.stream))
        self.rule.to(self.device)
        self._compiled = Compilation(self.rule.network.blocks.values(), self.config.compile, self.device)
        if self.config.twin:
            self.rule.freeze_features()
        self._state = State(self.rule, self.config, self.device, self._team)
        self._checkpoints = Checkpoints(self.run, self.rule, self.task, self.config, self.budget, self.recipe, self._state)
        self._selection = Selection(self.run, self.rule, self.task, self.config, self._state, self._checkpoints)
        self._evaluator = Evaluator(self.rule, self.task, self.config, self.device, self._data)
        self._supply = Supply(
            self.rule,
            self.task,
            self.config,
            self.device,
            self._evaluator,
            augment=self._augment,
            data=self._data,
            folder=self.run.folder,
        )
        self._limits = Limits(self.rule, self.budget, self._state)
        self._observers.watch = HookWatch(self.run, self._state)
        if self.task.validation is None and calibrates(self.rule):
            self.run.tags["calibration"] = NOT_CALIBRATED
        self.run.total_epochs = self._limits.passes or None
        self._next_look = time.perf_counter() + self.config.log_interval
        return None if resume is None else self._checkpoints.read(Path(resume), self.device)

    def _enter(self, index: int, phase: Phase, saved: Mapping[str, Any] | None) -> None:
        """Make the phase's parameters and optimiser; a resumed run replays the phases that are over."""
        state = self._state
        if saved is not None and not state.restored and index >= saved["phases_begun"]:  # it had ended between two phases
            state.take_weights(saved["weights"], saved["training"])
        self._team.check(phase)
        if saved is None or index >= saved["phases_begun"]:
            self._solve("start_phase", phase)
        else:  # replayed: that it was done counts already
            self.rule.start_phase(phase)
        self.rule.to(self.device)
        state.updater.start_phase(phase)
        self._team.enter(state.step, state.updater)
        state.step.phase, state.begun = phase, index + 1
        if index == 0 and saved is None:
            self._evaluator.try_protocols()
        if saved is not None and index == state.at.phase and not state.restored:
            state.take_weights(saved["weights"], saved["training"])

    def stop(self, reason: str = "asked to stop") -> None:
        """End the run after the step in progress, with a checkpoint to resume from. May be called from any thread."""
        self._stop.ask(reason)

    def _finish(self, saved: Mapping[str, Any] | None) -> None:
        """Take the weights that were selected, and test them: once, or not at all where the configuration says so."""
        state = self._state
        if saved is not None and not state.restored:  # all phases were over
            state.take_weights(saved["weights"], saved["training"])
        state.end_training()
        state.learning.end_run(steps=state.at.step, gradients=state.updater.received)
        if self._checkpoints.saved_epoch != state.at.epoch:
            self._save()
        self._selection.take(self._save)
        tested = self._world.from_first(only_read(self.rule, *PREDICTING)(self._evaluator.test))
        self.run.result.update(tested | state.costs() | self._compiled.costs())
        check_losses(tested, state.at.step)
        protocols = partial(self._evaluator.protocols, self._trained_features, self._supply.resident)
        self.run.result.update(self._world.from_first(only_read(self.rule, "features")(protocols)))
        self._evaluator.keep_predictions(self.run.folder)

    def _trained_features(self, batches: Loader) -> Split:
        """A split's features once the rule is trained, unless the run is asked to stop."""

        def look(share: float) -> None:
            if self._stop.asked:
                raise BpfreeError(f"{self._stop.asked}; bpfree evaluate computes them")

        return self._supply.features(batches, look)

    def _save(self, weights: Mapping[str, Any] | None = None) -> None:
        self._state.learning.look(steps=self._state.at.step)
        path = self._checkpoints.save(weights)
        if path is not None:
            self._notify("checkpoint_saved", path=path)
