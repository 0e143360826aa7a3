"""The trainer whose runs are recorded, for the command line and for Python: with log, configuration, trackers, plots and progress."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bpfree.addons import names_of
from bpfree.code_files import CodeFile
from bpfree.code_lines import class_lines
from bpfree.errors import BpfreeError, DiskError, UsageError
from bpfree.files import replacing, write_text
from bpfree.hooks import hookimpl
from bpfree.python_recipe import python_recipe, run_config
from bpfree.recipe import Recipe
from bpfree.record.folder import RunFolder, read_run
from bpfree.record.recorder import Recorder
from bpfree.redaction import redact, redact_logs, redacted
from bpfree.rule import Rule
from bpfree.run import Run, new_run_id
from bpfree.summary import SummaryDisplay, summary
from bpfree.tasks.augment import Augmentation
from bpfree.tasks.check import named
from bpfree.tasks.loading import Loading
from bpfree.tasks.task import Task
from bpfree.tracking.config import TrackingConfig, sqlite_uri
from bpfree.tracking.mlflow_tracker import settled
from bpfree.tracking.progress import ProgressDisplay
from bpfree.tracking.sending import Tracking, complete, makers
from bpfree.training import trainer
from bpfree.training.checkpoint import find_checkpoint
from bpfree.training.config import TrainConfig
from bpfree.training.environment import flushing_denormals

__all__ = [
    "RecipeFile",
    "Trainer",
    "common_tags",
    "known_run",
    "make_folder",
    "name_of",
    "plugin_observers",
    "recording",
    "remove_untrained",
    "standard_tags",
    "tests_before",
]

RESIDENT = {"auto": None, "yes": True, "no": False}


class Trainer(trainer.Trainer):
    """Trains a rule on a task; a run with a folder is recorded there, and tracked, like one of the command line.

    Args:
        rule: with its network; it is moved to the device and trained in place.
        task: its splits and spec.
        config: everything about training; a :class:`bpfree.RunConfig` also has ``tracking``, ``pictures`` and ``diagnostics``.
        folder: of the run: its log, configuration, checkpoints, plots and pictures; ``None``: nothing is written, and no tracker is asked.
        progress: show a summary and the progress: in place in a notebook or a terminal, in a few lines elsewhere.
        tracking: options of trackers such as MLflow, or whether there are any; ``None``: as ``config`` says, by default MLflow.
        callbacks: functions that are called after each epoch, and objects with methods named as hooks (docs/python.md).
        observers: objects whose hooks are marked with ``bpfree.hookimpl``.
        augment: augmentations of the training batches.
        loading: how batches reach the device; ``None``: as ``config`` says.
        label: shown in place of the run's name.
        recipe: from which rule and task were built; ``None``: it is found, as far as registered names and remembered builders tell.
        run: with its folder, where that has been prepared already.
        further: tags, beside or in place of the standard ones.

    Raises:
        UsageError: arguments of another kind, or settings that this rule or task excludes.
    """

    def __init__(
        self,
        rule: Rule,
        task: Task,
        config: TrainConfig | None = None,
        *,
        folder: str | Path | None = None,
        progress: bool = True,
        tracking: TrackingConfig | bool | None = None,
        callbacks: Iterable[Any] = (),
        observers: Iterable[Any] = (),
        augment: Iterable[Augmentation] = (),
        loading: Loading | None = None,
        label: str | None = None,
        recipe: Recipe | None = None,
        run: Run | None = None,
        further: Mapping[str, str] | None = None,
    ) -> None:
        trainer.check_kinds(rule, task, config)
        augment, buildable, self._prepared = tuple(augment), True, run is not None
        if recipe is None:
            recipe, buildable = python_recipe(rule, task, run_config(config, tracking), augment, loading)
        recipe = recipe.pinned(rule)
        run = run or _new_run(recipe, folder)
        self.folder = run.folder
        tracked = _beside(tracking if isinstance(tracking, TrackingConfig) else recipe.settings.tracking, self.folder)
        self._tracking = recording(recipe, tracked)
        if self.folder is not None:
            redact_logs()
            run.config = recipe.recorded_flat()
            run.parameters = recipe.telling()
            run.tags = redacted({**run.tags, **standard_tags(recipe, task, rule), **(further or {})})
            observers = [RecipeFile(recipe, rule.plan()), *drawing(recipe), *plugin_observers(recipe), *observers]
        if progress:
            told = summary(recipe, task, rule, run, places(tracked, self.folder))
            observers = [SummaryDisplay(told, label), ProgressDisplay(label=label), *observers]
        super().__init__(
            rule,
            task,
            recipe.settings,
            observers=[*(recipe.registry.get("diagnostics", name)() for name in recipe.settings.diagnostics), *observers],
            callbacks=callbacks,
            recorder=Recorder([] if self.folder is None else self._tracking),
            run=run,
            recipe=recipe.recorded() if buildable else None,
            augment=augment,
            loading=loading or Loading(RESIDENT[recipe.settings.data.resident], recipe.settings.data.workers, recipe.task.sampling),
        )

    @flushing_denormals()  # also in the threads that load data
    def fit(self, resume: str | Path | bool | None = None) -> Run:
        """Train until the budget is used, test once, and return the run (its ``status`` may be ``diverged``).

        Args:
            resume: a checkpoint or a run's folder to resume from; ``True``: the trainer's own folder.

        Returns:
            The run; as it ended, if it had finished with this budget: the test split is scored once.

        Raises:
            UsageError: the folder is in use, or holds a run that is not resumed.
            Interrupted: after a checkpoint was saved.
            BpfreeError: the checkpoint does not fit.
        """
        world = self.setup.world
        if self._prepared:  # the first process has found the checkpoint, which others need not see
            return super().fit(None if isinstance(resume, bool) else resume)
        with world.joined():
            if self.folder is None:
                return super().fit(world.from_first(lambda: _checkpoint(resume, None)))
            found = world.from_first(lambda: self._open(resume))
            if isinstance(found, Run):
                return found
            try:
                return super().fit(found)
            except BaseException:
                if world.first:
                    remove_untrained(self.folder)
                raise

    def _open(self, resume: str | Path | bool | None) -> Run | Path | None:
        """Prepare the run's folder, and return the checkpoint to resume from, if any; or the run as it ended, if nothing is to be done.

        Raises:
            UsageError: the folder is in use, or holds a run that is not resumed.
        """
        assert self.folder is not None
        place, before = RunFolder(self.folder), known_run(self.folder)
        if place.log.is_held():
            raise UsageError("a run in this folder is training", where=str(self.folder), fix="wait until it ends, or choose another folder")
        checkpoint = _checkpoint(resume, self.folder)
        if checkpoint is None:
            if before is not None or any(path.is_file() for path in (place.last, place.selected)):
                held = f"the folder holds a run already{'' if before is None else f': {before.name}, {before.status}'}"
                raise UsageError(held, where=str(self.folder), fix="resume it: fit(resume=True); or choose another folder")
            make_folder(self.folder, again=True)
            return None
        if checkpoint.parent.resolve() != place.checkpoints.resolve():
            raise UsageError("the checkpoint lies outside the run's folder", where=str(checkpoint), fix="give its run's folder to Trainer")
        if before is None:
            return checkpoint
        same = [before.config.get(key) == value for key, value in self.run.config.items() if key.startswith("budget.")]
        if before.status == "finished" and all(same):
            complete(self.folder)
            self.run = before
            return before
        self._continue(before)
        return checkpoint

    def _continue(self, before: Run) -> None:
        """Take up the identity of a run that is resumed."""
        assert self.folder is not None
        run, tested = self.run, self.config.evaluation.test
        run.id, run.name, run.history = RunFolder(self.folder).name_copy() or before.id, before.name, before.history
        run.tags = {**before.tags, **run.tags, "test_evaluations": str(tests_before(before) + tested)}
        for reader in self._tracking:
            reader.config = settled(reader.config, self.folder)


def _checkpoint(resume: str | Path | bool | None, folder: Path | None) -> Path | None:
    """Find the checkpoint that a run is to be resumed from.

    Raises:
        UsageError: there is none.
    """
    if resume is None or resume is False:
        return None
    if resume is not True:
        return find_checkpoint(resume)
    if folder is None:
        raise UsageError("the trainer has no folder to resume from", where="fit(resume=True)", fix="give the checkpoint's path")
    return find_checkpoint(folder)


def _new_run(recipe: Recipe, folder: str | Path | None) -> Run:
    """Name a run after what it trains."""
    run = Run(new_run_id(name := name_of(recipe)), name)
    if folder is not None:
        run.folder = Path(folder)
        if run.folder.exists() and not run.folder.is_dir():
            raise UsageError("the run's folder is a file", where=str(folder), fix="choose another folder")
    return run


def _beside(tracking: TrackingConfig, folder: Path | None) -> TrackingConfig:
    """Keep MLflow's default store in the working folder for a run's folder in it; else it is beside the folder of runs."""
    if folder is None or folder.parent != Path() or tracking.uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return tracking
    return dataclasses.replace(tracking, uri=sqlite_uri(Path.cwd() / "mlflow.db"))


def name_of(recipe: Recipe) -> str:
    """Name a run for people: what trains, on which task, with which seed."""
    return f"{recipe.trains}{'-twin' if recipe.settings.twin else ''}-{recipe.names['task']}-s{recipe.settings.seed}"


def known_run(folder: Path) -> Run | None:
    """Read a run from its log, if there is one."""
    try:
        return read_run(folder)
    except BpfreeError:
        return None


def tests_before(run: Run | None) -> int:
    """Count how often a run has seen the test split, by its log: 0 if it has not finished, whatever its settings are."""
    if run is None:
        return 0
    meant = bool(run.config.get("evaluation.test", True))
    counted = int(run.tags.get("test_evaluations", int(meant)))
    return counted - (meant and run.status != "finished")


def remove_untrained(folder: Path) -> None:
    """Remove the folder of a run that has not trained."""
    if {path.name for path in folder.iterdir()} <= {"config.yaml", "plan.txt", "code"}:
        shutil.rmtree(folder)


def make_folder(folder: Path, *, again: bool = False) -> None:
    """Make a folder for a run: a new one, unless the run starts again.

    Raises:
        BpfreeError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=again)
        probe = folder / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BpfreeError(
            f"cannot write to the output folder: {error.strerror}", where=str(folder.parent), fix="choose another with output=FOLDER"
        ) from error


def places(tracking: TrackingConfig, folder: Path | None) -> list[str]:
    """List where a run is recorded besides its folder: its trackers, MLflow with the address of its store."""
    if folder is None or not tracking.enabled:
        return []
    return [f"mlflow, {tracking.resolve_uri(folder.parent)}" if name == "mlflow" else name for name in tracking.to]


class RecipeFile:
    """Keeps configuration, the rule's plan and copies of files of code in the run's folder once the run begins.

    A run that is refused changes nothing.

    Args:
        recipe: the configuration.
        plan: the rule's; may be empty.
    """

    def __init__(self, recipe: Recipe, plan: str) -> None:
        self._recipe, self._plan = recipe, plan

    @hookimpl(tryfirst=True)
    def run_start(self, run: Run) -> None:
        """Write the files.

        Raises:
            DiskError: the folder cannot be written.
        """
        if run.folder is None:
            return
        try:
            self._write(run, RunFolder(run.folder))
        except OSError as error:
            what = f"cannot write the run's configuration: {error.strerror or error}"
            raise DiskError(
                what, where=str(run.folder), fix="make the folder writable, with room on its disk, and start or resume again"
            ) from error

    def _write(self, run: Run, place: RunFolder) -> None:
        write_text(place.config, self._recipe.to_yaml())
        if self._plan:
            run.artifacts["plan.txt"] = place.plan
            write_text(place.plan, f"{redact(self._plan.rstrip())}\n")
        for file in self._recipe.code_files():
            path = copy_of(file, place.code)
            run.artifacts[f"code/{path.name}"] = path


def copy_of(file: CodeFile, folder: Path) -> Path:
    """Copy a file of code into the record, where it is never executed; copies of other files or versions stay."""
    path = folder / file.path.name
    if path.exists() and path.read_bytes() != file.source:
        path = folder / f"{file.path.stem}-{file.hash}.py"
    with replacing(path) as copy:
        copy.write(file.source)
    return path


def recording(recipe: Recipe, tracking: TrackingConfig) -> list[Tracking]:
    """Make the readers of a run's log: its trackers, if there are any."""
    return [Tracking(tracking, makers(tracking, recipe.registry))] if tracking.enabled else []


def drawing(recipe: Recipe) -> list[Any]:
    """Make the observers that draw pictures and curves."""
    from bpfree.tracking.pictures import Pictures
    from bpfree.tracking.plots import Plots

    pictures = recipe.settings.pictures
    return [Pictures(pictures), *([Plots()] if pictures.curves else [])]


def plugin_observers(recipe: Recipe) -> list[Any]:
    """List the modules of plugins, each of which may observe every recorded run."""
    return [module for _, module in recipe.registry.manager.list_name_plugin() if module is not None]


def standard_tags(recipe: Recipe, task: Task, rule: Rule) -> dict[str, str]:
    """Return the tags by which a run can be found, with the rule's traits and its lines of code."""
    lines = class_lines(type(rule))
    owner = recipe.registry.owner("rules", recipe.names["rule"])
    return {
        **common_tags(recipe, task),
        "plugin": owner.distribution,
        "plugin_version": owner.version,
        "optimizer": " + ".join([recipe.settings.optimizer.name, *names_of(recipe.settings.optimizer.addons)]),
        "twin": str(recipe.settings.twin),
        "select": recipe.settings.select,
        "reverse_span": str(rule.traits.reverse_span),
        "dependence": rule.traits.dependence,
        "downstream_weights": str(rule.traits.downstream_weights),
        "supervision": rule.traits.supervision,
        "own_network": str(rule.brings_network),
        **({} if lines is None else {"rule_lines": str(lines)}),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
    }


def common_tags(recipe: Recipe, task: Task) -> dict[str, str]:
    """Return the tags by which a run of a rule or a program can be found."""
    return {
        **recipe.names,
        "data_fingerprint": task.fingerprint(),
        "examples": task.counts(),
        **({"classes": named(task.spec, range(task.spec.outputs))} if task.spec.class_names else {}),
        "seed": str(recipe.settings.seed),
        "test_evaluations": str(int(recipe.settings.evaluation.test)),
        "validation": str(recipe.task.validation),
        **({"unused": ", ".join(recipe.unused)} if recipe.unused else {}),
        **({"quick": "True"} if recipe.settings.quick else {}),
    }
