"""Running a program: its context, its record, and how it ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from importlib import metadata
from typing import Any

import torch

from bpfree import devices, interrupts, seeds
from bpfree.errors import BpfreeError, DiskError, UsageError, told
from bpfree.metric import recorded_metrics
from bpfree.program import Program
from bpfree.recipe import Recipe
from bpfree.record.folder import RunFolder
from bpfree.record.recorder import Recorder
from bpfree.redaction import redact
from bpfree.run import ReadOnly, Run
from bpfree.tasks.facts import facts_of
from bpfree.tasks.loading import Loader
from bpfree.tasks.task import Examples, Task, TaskSpec
from bpfree.training import environment
from bpfree.training.divergence import Diverged, check_losses
from bpfree.training.evaluation import scored_by, training_sample
from bpfree.training.meters import Clock
from bpfree.training.observers import Observers
from bpfree.training.predictions import Collector, write_predictions
from bpfree.training.stopping import Interrupted

__all__ = ["BLANK", "ProgramRun", "program_tags"]

BLANK = "operations, memory, features, alignment and floors are measured of rules alone"
"""Why numbers of a program are missing."""


class ProgramRun:
    """A run of a program, which uses it as its :class:`bpfree.program.ProgramContext`.

    Args:
        recipe: names the program.
        task: with its splits.
        run: the record.
        observers: of the run; those that ask for a rule, a phase or a step are not called.
        recorder: keeps its log.

    Attributes:
        task, options, settings, seed, threads, device, folder: as the context has them.
    """

    def __init__(self, recipe: Recipe, task: Task, run: Run, observers: Iterable[Any], recorder: Recorder) -> None:
        self.task, self.options, self.settings = task, recipe.options["program"], recipe.settings
        self.seed, self.threads, self.folder = recipe.settings.seed, recipe.settings.threads, run.folder
        self.device = environment.resolve_device(recipe.settings.device)
        program: Program = recipe.registry.get("programs", recipe.names["program"])
        self._program, self._run, self._tested = program, run, False
        self._metrics = scored_by(task.spec, recipe.settings.evaluation.metrics)
        self._observers, self._clock, self._load = Observers([recorder, *observers], run), Clock(self.device), environment.load()
        run.metrics = recorded_metrics(self._metrics)
        run.data = facts_of(task)

    @property
    def spec(self) -> TaskSpec:
        """The task's spec."""
        return self.task.spec

    # --- what a program calls -----------------------------------------------------------------------------------------------

    def arrays(self, split: str) -> tuple[Any, Any]:
        """Return a split's normalised inputs and its targets."""
        with self._clock.stopped():
            examples = {"train": self.task.train, "val": self.task.validation}.get(split)
            if examples is None:
                raise UsageError(
                    f"there is no split {split!r} to learn from", where=self._run.name, fix="train, or val above task.validation=0"
                )
            batches = list(self._batches(examples))
            inputs = torch.cat([batch.inputs for batch in batches]).numpy()
            targets = [batch.targets for batch in batches if batch.targets is not None]
            return inputs, torch.cat(targets).numpy() if targets else None

    def score(self, split: str, predict: Callable[[Any], Any]) -> dict[str, float]:
        """Score predictions for a split by the metrics of the run."""
        if split == "test" and self._tested:
            raise UsageError("the test split is scored once", where=self._run.name, fix="score it at the end")
        self._tested = self._tested or split == "test"
        examples = {
            "train": self.task.train.subset(training_sample(self.task)),
            "val": self.task.validation,
            "test": self.task.test if self.settings.evaluation.test else None,
        }[split]
        if examples is None:
            return {}
        with self._clock.stopped():
            return {f"{split}/{name}": value for name, value in self._scores(examples, predict, keep=split == "test").items()}

    def log(self, metrics: Mapping[str, float]) -> None:
        """Record the end of an epoch."""
        run = self._run
        with self._clock.stopped():
            run.epoch += 1
            costs = {"seconds": self._clock.report(), "processor_seconds": self._clock.report_processor() or 0.0}
            noted = {"epoch": float(run.epoch), "samples": float(run.epoch * len(self.task.train)), **costs, **_numbers(metrics)}
            run.history.append(noted)
            self._observers.notify("epoch_end", metrics=ReadOnly(noted))
            check_losses(noted, run.epoch)

    def _batches(self, examples: Examples) -> Loader:
        return Loader(examples, self.spec, batch_size=self.settings.evaluation.batch_size, device=torch.device("cpu"))

    def _scores(self, examples: Examples, predict: Callable[[Any], Any], *, keep: bool) -> dict[str, float]:
        def outputs(inputs: Any) -> torch.Tensor:
            made = predict(inputs.numpy() if isinstance(inputs, torch.Tensor) else inputs)
            return torch.as_tensor(made)

        sums = {metric.name: metric.begin(self.spec, outputs) for metric in self._metrics if metric.begin is not None}
        kept = Collector(self.spec)
        kept.begin_draw()
        for batch in self._batches(examples):
            made = outputs(batch.inputs)
            if bool(made.isnan().any()):
                raise Diverged("a prediction is NaN")
            kept.add(made, batch)
            for accumulator in sums.values():
                accumulator.add(made, batch)
        predictions = kept.predictions() if keep else None
        if predictions is not None and self.folder is not None:
            write_predictions(RunFolder(self.folder).predictions, predictions)
        return {name: accumulator.value() for name, accumulator in sums.items()}

    # --- its course -----------------------------------------------------------------------------------------------------------

    def fit(self) -> Run:
        """Run the program to its end, and return the run (its ``status`` may be ``diverged``).

        Raises:
            Interrupted: it was asked to stop.
            BpfreeError: whatever else ended it.
        """
        run = self._run
        with ExitStack() as stack:
            stack.enter_context(environment.numerics(threads=self.threads, deterministic=self.settings.deterministic))
            stack.enter_context(devices.preserved_global_state(self.device))
            torch.manual_seed(seeds.derive_in(self.settings.stream, self.seed, "global"))
            run.tags |= environment.describe(self.device)
            with self._status():
                self._observers.notify("run_start")
                self._observers.notify("phase_start")
                with self._clock.running(), _stopped_by_signals():
                    found = _numbers(self._program.train(self))
                if not run.history:
                    self.log(found)
                run.result.update(found | self._costs())
                check_losses(found, run.epoch)
        return run

    def _costs(self) -> dict[str, float]:
        measured = {
            "train/seconds": self._clock.report(),
            "train/processor_seconds": self._clock.report_processor(),
            "load_start": self._load,
            "load_end": environment.load(),
        }
        return {name: value for name, value in measured.items() if value is not None}

    @contextmanager
    def _status(self) -> Iterator[None]:
        """Set the status with which the run ends, and notify the observers."""
        run = self._run
        run.status = "running"
        try:
            yield
            run.status = "finished"
        except Diverged as error:
            run.status, run.reason = "diverged", str(error)
            run.result.update(self._costs())
        except (Interrupted, KeyboardInterrupt, DiskError) as error:
            run.status, run.reason = "interrupted", getattr(error, "what", "stopped at once")
            raise
        except BaseException as error:
            run.status, run.reason = "failed", error.what if isinstance(error, BpfreeError) else redact(told(error))
            raise
        finally:
            self._observers.notify("run_end")


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """End the body at a signal, at once: a program has no state that could be saved."""

    def end(number: int, frame: Any) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}", None)

    with interrupts.handling(end) if threading.current_thread() is threading.main_thread() else nullcontext():
        yield


def _numbers(metrics: Mapping[str, float]) -> dict[str, float]:
    """Convert a program's metrics to numbers.

    Raises:
        UsageError: they are none.
    """
    try:
        return {str(name): float(value) for name, value in metrics.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"a program gives metrics by name, not {metrics!r:.80}", fix="report it to the author of the program") from error


def program_tags(recipe: Recipe) -> dict[str, str]:
    """Return the tags by which a program's run can be found, and the versions of the packages that it computes with."""
    name = recipe.names["program"]
    program, owner = recipe.registry.get("programs", name), recipe.registry.owner("programs", name)
    return {
        "plugin": owner.distribution,
        "plugin_version": owner.version,
        "not_measured": BLANK,
        **{package: metadata.version(package) for package in program.packages},
    }
