"""The trainer: checks its arguments, and trains."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bpfree import devices, seeds
from bpfree.errors import BpfreeError, DiskError, UsageError, told
from bpfree.metric import recorded_metrics
from bpfree.options import checked
from bpfree.record.recorder import Recorder
from bpfree.redaction import redact
from bpfree.rule import Rule
from bpfree.run import Run, new_run_id
from bpfree.tasks.augment import Augmentation, check_augmentations
from bpfree.tasks.facts import facts_of
from bpfree.tasks.loading import Loading
from bpfree.tasks.task import Task
from bpfree.training import environment
from bpfree.training.budget import check_patience, why_not_early
from bpfree.training.callbacks import observers_of
from bpfree.training.config import AlignmentConfig, CalibrationConfig, TrainConfig
from bpfree.training.crossfit import check_folds
from bpfree.training.distributed import World
from bpfree.training.divergence import Diverged
from bpfree.training.evaluation import check_protocols, sampled_by, scored_by
from bpfree.training.guards import check_fit, check_made_to_learn
from bpfree.training.idle import idle_of_rule
from bpfree.training.norms import check_batches_of_one
from bpfree.training.observers import Observers
from bpfree.training.schedules import CLASSES, check_length, check_schedule, planned_steps
from bpfree.training.session import Session
from bpfree.training.setup import Setup
from bpfree.training.stopping import Interrupted, Stop
from bpfree.training.team import make_team

__all__ = ["Interrupted", "Trainer", "check_kinds"]

logger = logging.getLogger("bpfree")

NEVER = 10**9
"""Epochs between evaluations of a training of which nothing but the weights is wanted."""


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
        callbacks: functions that are called after each epoch, and objects with methods named as hooks (``bpfree.training.callbacks``).
        recorder: keeps the run's log in its folder, and has trackers read it; one without trackers if ``None``.
        run: what observers see of the run; made from the configuration if ``None``.
        recipe: the nested configuration that rebuilds rule and task, kept in checkpoints.
        augment: augmentations of the training batches.
        loading: how batches reach the device.

    Attributes:
        setup: all of it, as the parts of a run share it.

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
        callbacks: Iterable[Any] = (),
        recorder: Recorder | None = None,
        run: Run | None = None,
        recipe: Mapping[str, Any] | None = None,
        augment: Iterable[Augmentation] = (),
        loading: Loading | None = None,
    ) -> None:
        check_kinds(rule, task, config)
        config, world = checked(config or TrainConfig()), World.here()
        device = environment.device_of(rule, config.device, process=world.local_rank, processes=world.size, warn=True)
        name = f"{type(rule).__name__.lower()}-{task.spec.name}-s{config.seed}"
        run = run or Run(new_run_id(name), name, config=dataclasses.asdict(config))
        if folder is not None:
            run.folder = Path(folder)
        if not world.first:
            run.folder = None
        task = copy.copy(task)  # what a rule does to its spec does not change how the task scores it
        object.__setattr__(task, "spec", copy.copy(task.spec))
        self.rule, self.config, self.run = rule, config, run
        budget = config.budget.resolve(len(task.train))
        check_fit(rule, task)
        run.metrics = recorded_metrics([*scored_by(task.spec, config.evaluation.metrics), *sampled_by(rule, config.evaluation.metrics)])
        run.data = facts_of(task)
        team = make_team(rule, config, world)
        check_folds(rule, task, config, world.size)
        loaded, changed = loading or Loading(), tuple(augment)
        again = partial(_train, copy.deepcopy(rule), config, changed, loaded) if config.calibration.folds else None
        self.setup = Setup(rule, task, config, budget, device, team, run, recipe, loaded, changed, again)
        self._check()
        self._stop = Stop(world)
        called = observers_of(callbacks, self.end)
        self._observers = Observers([recorder or Recorder(), *observers, *called] if world.first else [], run)

    def __repr__(self) -> str:
        budget = ", ".join(f"{value:g} {name}" for name, value in dataclasses.asdict(self.setup.budget).items() if value is not None)
        about = f"{type(self.rule).__name__} on {self.setup.task.spec.name}: {budget}, batches of {self.config.batch_size}"
        return f"Trainer({about}, {self.setup.device}; {self.run.status})"

    def _check(self) -> None:
        rule, task, config, budget = self.rule, self.setup.task, self.config, self.setup.budget
        check_protocols(config.evaluation.protocols, rule)
        check_augmentations(self.setup.augment, task.spec, rule.traits.targets, type(rule).__name__)
        check_schedule(config.schedule)
        if config.accumulate > config.batch_size:
            what = f"accumulate={config.accumulate} needs at least as many examples per update, batch_size={config.batch_size}"
            raise UsageError(what, where="accumulate", fix="a larger batch_size, or fewer micro-batches")
        for key, reason in idle_of_rule(config, rule):
            raise UsageError(reason, where=key, fix="leave it out")
        if config.schedule.name in CLASSES:
            planned = planned_steps(rule, budget)
            for steps in [None] if planned is None else planned:
                check_length(config.schedule, steps)
        if task.validation is None and config.select == "best-val":
            raise UsageError(
                "without a validation split no best weights can be chosen", where="select", fix="select=last, or task.validation above 0"
            )
        if task.stages and config.select == "best-val":
            what = "in a stream the best epoch on validation may come before later stages were learned"
            raise UsageError(what, where="select", fix="select=last")
        check_patience(self.setup)
        check_made_to_learn(rule)
        check_batches_of_one(rule, task, budget, config.batch_size)

    def fit(self, resume: str | Path | None = None) -> Run:
        """Train until the budget is used, test once, and return the run (its ``status`` may be ``diverged``).

        Args:
            resume: a checkpoint to resume from.

        Raises:
            Interrupted: after a checkpoint was saved.
            BpfreeError: the checkpoint does not fit.
        """
        with self._surroundings():
            session = Session(self.setup, self._observers, self._stop, None if resume is None else Path(resume))
            with self._stop.on_signals(), self._status(session), devices.explained(self.setup.device, type(self.rule).__name__):
                session.train()
        return self.run

    def stop(self, reason: str = "asked to stop") -> None:
        """End the run after the step in progress, with a checkpoint to resume from; may be called from any thread."""
        self._stop.ask(reason)

    def end(self, reason: str = "asked to end") -> None:
        """End the training after the epoch in progress, then test as if the budget were used up; ``run.reason`` gets the reason.

        A rule of several phases, or that solves for parameters at the end, cannot end early and trains on, with a warning.
        """
        if why_not := why_not_early(self.setup):
            logger.warning("the training is not ended early (%s): %s", reason, why_not)
        else:
            self._stop.ending = reason

    @contextmanager
    def _surroundings(self) -> Iterator[None]:
        """Set grad mode, numerics and seeds of a run, and restore the caller's state in any case."""
        config, team, device = self.config, self.setup.team, self.setup.device
        with ExitStack() as stack:
            stack.enter_context(team.world.joined())
            stack.enter_context(torch.inference_mode(False))  # whatever the caller, or a plugin's import, has left behind
            stack.enter_context(torch.enable_grad())
            stack.enter_context(environment.numerics(threads=config.threads, deterministic=config.deterministic))
            stack.enter_context(devices.preserved_global_state(device))
            torch.manual_seed(seeds.derive_in(config.stream, config.seed, "global", *team.stream))
            yield

    @contextmanager
    def _status(self, session: Session) -> Iterator[None]:
        """Set the status with which the run ends, and notify the observers."""
        run = self.run
        run.status = "running"
        try:
            yield
            run.status = "finished"
        except Diverged as error:
            run.status, run.reason = "diverged", str(error)
            run.result.update(session.state.costs())
        except Interrupted as error:
            session.rescue()
            run.status, run.reason = "interrupted", error.what
            raise
        except KeyboardInterrupt:
            if session.at_rest and self.setup.world.size == 1:  # other processes do not know of it
                session.rescue()
            run.status, run.reason = "interrupted", f"{self._stop.asked or 'stopped'}, at once"
            raise
        except DiskError as error:  # the last checkpoint remains
            run.status, run.reason = "interrupted", error.what
            raise
        except BaseException as error:
            run.status, run.reason = "failed", error.what if isinstance(error, BpfreeError) else redact(told(error))
            raise
        finally:
            self._stop.forget()
            self._notify_end()

    def _notify_end(self) -> None:
        """Notify observers of the end; the run fails if one refuses it, or changes something, even then."""
        try:
            self._observers.notify("run_end")
        except BpfreeError as error:
            self.run.status, self.run.reason = "failed", error.what
            self._observers.notify_again("run_end")
            raise


def _train(rule: Rule, config: TrainConfig, augment: tuple[Augmentation, ...], loading: Loading, task: Task) -> tuple[Rule, Run]:
    """Train a copy of a rule on another task, without a test or anything that is written."""
    quiet = dataclasses.replace(config.evaluation, test=False, every=NEVER, alternatives=False, protocols=[])
    further = dataclasses.replace(config, calibration=CalibrationConfig(), evaluation=quiet, alignment=AlignmentConfig())
    trainer = Trainer(copy.deepcopy(rule), task, further, augment=augment, loading=loading)
    return trainer.rule, trainer.fit()


def check_kinds(rule: Any, task: Any, config: Any) -> None:
    """Refuse arguments of another kind than the trainer takes.

    Raises:
        UsageError: names the argument, and what makes one of it.
    """
    wanted = (
        (rule, Rule, "rule", "build it: DFA(network, task.spec); or train by name: bpfree.train('dfa')"),
        (task, Task, "task", "bpfree.load_task('digits'), or bpfree.Task.of((x, y), (x_test, y_test))"),
        (config or TrainConfig(), TrainConfig, "config", "bpfree.TrainConfig(budget=bpfree.BudgetConfig(epochs=5))"),
    )
    for given, kind, name, fix in wanted:
        if not isinstance(given, kind):
            what = f"the class {given.__name__}" if isinstance(given, type) else f"a {type(given).__name__}"
            raise UsageError(f"{name} is {what}, not a {kind.__name__}", where=f"Trainer({name}=...)", fix=fix)
