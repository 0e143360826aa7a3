"""Running a recipe, with its folder, its observers and its trainer; also resuming a run.

Where a launcher has started several processes, each of them runs the same recipe: the first one makes the folder and observes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bpfree.addons import names_of
from bpfree.code_files import CodeFile
from bpfree.code_lines import class_lines
from bpfree.config import recipe_of
from bpfree.errors import BpfreeError, DiskError, UsageError
from bpfree.files import replacing, write_text
from bpfree.hooks import hookimpl
from bpfree.leaves import Leaf, leaves_of, names_code
from bpfree.legacy import refuse_version_1
from bpfree.plugins import Plugins
from bpfree.program_run import ProgramRun, program_tags
from bpfree.recipe import CHANGEABLE, Recipe, changed
from bpfree.record.folder import RunFolder, read_run
from bpfree.record.recorder import Recorder
from bpfree.redaction import redact, redact_logs, redacted
from bpfree.rule import Rule
from bpfree.run import Run, new_run_id
from bpfree.summary import SummaryDisplay, summary
from bpfree.tasks.check import named
from bpfree.tasks.loading import Loading
from bpfree.tasks.task import Task
from bpfree.tracking.config import TrackingConfig
from bpfree.tracking.mlflow_tracker import settled
from bpfree.tracking.sending import Tracking, complete, makers
from bpfree.training.checkpoint import find_checkpoint, read_checkpoint
from bpfree.training.distributed import World
from bpfree.training.environment import flushing_denormals
from bpfree.training.stopping import paused_at
from bpfree.training.trainer import Trainer

__all__ = ["resume", "run"]

PLACES = {"task.path"}
"""Keys that say where data are; what they are is in the checkpoint's fingerprint."""

RESIDENT = {"auto": None, "yes": True, "no": False}


def run(
    recipe: Recipe,
    *,
    quiet: bool = False,
    label: str | None = None,
    observers: Iterable[Any] = (),
    task: Task | None = None,
    run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    until: int | None = None,
) -> Run:
    """Train and test according to a recipe.

    Args:
        recipe: a resolved configuration.
        quiet: no progress display.
        label: shown in the progress display in place of the run's name.
        observers: further ones.
        task: already loaded, when several runs share it.
        run_id: the run's identifier, and name of its folder. What an attempt left behind that was killed before its first checkpoint
            is replaced, and its run in the tracking store is continued.
        tags: further ones, beside or in place of the standard ones.
        until: epochs after which it is interrupted, with a checkpoint to resume from; a program, which has none, is not.

    Raises:
        UsageError: the run of this identifier has a checkpoint, from which it can be resumed.
        BpfreeError: whatever ends it before its result.
    """
    world = World.here()
    if recipe.is_program and world.size > 1:
        raise UsageError("a program trains in one process", where="WORLD_SIZE", fix="start it without a launcher")
    with world.joined():
        record = world.from_first(lambda: new_record(recipe, run_id))
        if recipe.is_program:
            return _run_program(recipe, record, quiet=quiet, label=label, observers=observers, task=task, further=tags or {})
        options: dict[str, Any] = {"quiet": quiet, "label": label, "observers": observers, "task": task}
        return _train(recipe, record, None, world, **options, further=tags or {}, until=until)


def new_record(recipe: Recipe, run_id: str | None) -> Run:
    """Make a run with its folder.

    Raises:
        UsageError: the run of this identifier has a checkpoint.
    """
    name = f"{recipe.trains}{'-twin' if recipe.settings.twin else ''}-{recipe.names['task']}-s{recipe.settings.seed}"
    record = Run(run_id or new_run_id(name), name, reopened=run_id is not None)
    record.folder = Path(recipe.settings.output) / record.id
    if run_id is not None:
        if run_id != record.folder.name or run_id == "..":
            raise UsageError("a run's identifier is the name of its folder", where=run_id, fix="use letters, digits, dots and hyphens")
        clear_attempt(record.folder)
    make_folder(record.folder, again=record.reopened)
    return record


def resume(
    place: str,
    *,
    output: str = "runs",
    changes: Iterable[Leaf] = (),
    quiet: bool = False,
    label: str | None = None,
    observers: Iterable[Any] = (),
    task: Task | None = None,
    tags: Mapping[str, str] | None = None,
    until: int | None = None,
    registry: Plugins | None = None,
) -> Run:
    """Resume an interrupted run, in its own folder and its own MLflow run.

    Args:
        place: a run's folder, its name under ``output``, or its checkpoint.
        output: folder of runs.
        changes: of the configuration; a longer budget, for example.
        quiet, label, observers, task: as in :func:`run`.
        tags: further ones, beside those that the run has.
        until: as in :func:`run`.
        registry: of names; the installed plugins by default. Code in a file is executed only if it is allowed there.

    Raises:
        BpfreeError: no such run, a corrupt checkpoint, or one that does not fit the changes.

    Returns:
        The run; as it ended, if it had finished and nothing is to change: the test split is scored once.
    """
    world = World.here()
    with world.joined():
        changes = [leaf for leaf in changes if leaf.key != "output"]
        found = world.from_first(lambda: find_run(place, output, changes, registry))
        if isinstance(found, Run):
            return found
        record, path, config, count = found
        recipe = recipe_of(config, changes, where=str(path), registry=registry)
        elsewhere = any(leaf.key == "tracking.uri" for leaf in changes)
        options: dict[str, Any] = {"quiet": quiet, "label": label, "observers": observers, "task": task, "until": until}
        return _train(recipe, record, path, world, **options, further=count | dict(tags or {}), elsewhere=elsewhere)


def find_run(
    place: str, output: str, changes: Sequence[Leaf], registry: Plugins | None = None
) -> Run | tuple[Run, Path, dict[str, Any], dict[str, str]]:
    """Find a run to resume, with its checkpoint, its configuration before the changes, and its tags; or the run as it ended.

    Raises:
        BpfreeError: no such run, or one that does not fit the changes.
    """
    path = find_checkpoint(place, output=output)
    refuse_version_1(path.parent.parent, "resumed")
    saved = read_checkpoint(path)
    recipe = recipe_of(saved["config"], changes, where=str(path), registry=registry)
    moved = [leaf for leaf in changes if names_code(leaf)]  # code is where, and as, the changes name it
    refuse_changes(changed(recipe_of(saved["config"], moved, spec=recipe.spec(), where=str(path), registry=registry), recipe))
    folder, about = path.parent.parent, (saved.get("training") or {}).get("run")
    if about is not None and not isinstance(about, Mapping):
        raise BpfreeError("the checkpoint is not as bpfree writes it: training.run", where=str(path), fix="use another checkpoint")
    before = known_run(folder)
    if path.parent != RunFolder(folder).checkpoints or (before and about and about["id"] not in ids_of(folder)):
        raise UsageError("the checkpoint lies outside its run's folder", where=str(path), fix="resume the run by its folder or name")
    if before and before.status == "finished" and len(moved) == len(changes):
        complete(folder)
        return before
    if about is None:
        fix = "use last.pt, or start a new run (of a study's finished cells only the weights are kept)"
        raise BpfreeError("the checkpoint holds weights only: a run cannot be resumed from it", where=str(path), fix=fix)
    own = RunFolder(folder).name_copy() or (before.id if before else about["id"])
    record = Run(own, about["name"], folder=folder, tags=before.tags if before else {}, history=before.history if before else [])
    count = {"test_evaluations": str(tests_before(before) + recipe.settings.evaluation.test)}
    return record, path, saved["config"], count


def known_run(folder: Path) -> Run | None:
    """Read a run from its log, if there is one."""
    try:
        return read_run(folder)
    except BpfreeError:
        return None


def ids_of(folder: Path) -> set[str]:
    """Return every identifier that a run has had: a copy gets one of its own."""
    return {str(event.get("id")) for event, _ in RunFolder(folder).log.read() if event["event"] in ("begin", "copied")}


def refuse_changes(keys: Iterable[str]) -> None:
    """Refuse changes that would make it another run; it may train longer, elsewhere, or be observed differently.

    Args:
        keys: of the settings that changed.

    Raises:
        UsageError: some keys would make it another run.
    """
    other = [key for key in keys if key.split(".")[0] not in CHANGEABLE and key not in PLACES]
    if other:
        raise UsageError("a run cannot be resumed with other settings than it began with", where=", ".join(other), fix="start a new run")


def has_finished(place: str, *, output: str = "runs") -> bool:
    """Tell whether a run has ended: then ``resume`` without changes returns it unchanged.

    Raises:
        UsageError: no such run.
    """
    before = known_run(find_checkpoint(place, output=output).parent.parent)
    return before is not None and before.status == "finished"


def tests_before(run: Run | None) -> int:
    """Count how often a run has seen the test split, by its log: 0 if it has not finished, whatever its settings are."""
    if run is None:
        return 0
    meant = bool(run.config.get("evaluation.test", True))
    counted = int(run.tags.get("test_evaluations", int(meant)))
    return counted - (meant and run.status != "finished")


def clear_attempt(folder: Path) -> None:
    """Remove what an attempt without a checkpoint left in a run's folder, except its log, which the next attempt continues.

    Raises:
        UsageError: it has a checkpoint.
    """
    place = RunFolder(folder)
    if place.last.is_file():
        raise UsageError("the run has a checkpoint", where=str(folder), fix="resume it, or remove its folder")
    for path in place.files():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


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


@flushing_denormals()  # also in the threads that load data and make rules
def _train(
    recipe: Recipe,
    record: Run,
    checkpoint: Path | None,
    world: World,
    *,
    quiet: bool,
    label: str | None,
    observers: Iterable[Any],
    task: Task | None,
    further: Mapping[str, str],
    elsewhere: bool = True,
    until: int | None = None,
) -> Run:
    folder, settings = record.folder, recipe.settings
    assert folder is not None
    tracking = settings.tracking if elsewhere else settled(settings.tracking, folder)
    try:
        redact_logs()
        with world.agreed():
            if world.first and tracking.to_mlflow:
                tracking.resolve_uri(folder.parent)  # refused before anything is loaded
            task = task or recipe.build_task()
            rule = recipe.build_rule(task.spec)
            recipe, pause = recipe.pinned(rule), Pause(until)
            told = [] if quiet else [SummaryDisplay(summary(recipe, task, rule, record, places(tracking, folder)), label)]
            trainer = Trainer(
                rule,
                task,
                recipe.settings,
                observers=[
                    RecipeFile(recipe, rule.plan()),
                    *told,
                    *standard_observers(recipe, quiet=quiet, label=label),
                    *observers,
                    pause,
                ],
                recorder=Recorder([Tracking(tracking, makers(tracking, recipe.registry))] if tracking.enabled else []),
                run=record,
                recipe=recipe.recorded(),
                augment=recipe.augmentations(),
                loading=Loading(RESIDENT[recipe.settings.data.resident], recipe.settings.data.workers, recipe.task.sampling),
            )
    except BaseException:
        if checkpoint is None and world.first:
            remove_untrained(folder)
        raise
    pause.stop = trainer.stop
    record.config = {leaf.key: leaf.value for leaf in leaves_of(recipe.recorded(), "", "")}
    record.parameters = recipe.telling()
    record.tags = redacted({**record.tags, **standard_tags(recipe, task, rule), **further})
    try:
        return trainer.fit(checkpoint)
    except BaseException:
        if world.first:
            remove_untrained(folder)
        raise


@flushing_denormals()
def _run_program(
    recipe: Recipe,
    record: Run,
    *,
    quiet: bool,
    label: str | None,
    observers: Iterable[Any],
    task: Task | None,
    further: Mapping[str, str],
) -> Run:
    from bpfree.tracking.progress import ProgressDisplay

    assert record.folder is not None
    tracking = recipe.settings.tracking
    modules = [module for name, module in recipe.registry.manager.list_name_plugin() if module is not None]
    seen = [RecipeFile(recipe, ""), ProgressDisplay(quiet=quiet, label=label), *observers, *modules]
    try:
        redact_logs()
        if tracking.to_mlflow:
            tracking.resolve_uri(record.folder.parent)
        task = task or recipe.build_task()
        recorder = Recorder([Tracking(tracking, makers(tracking, recipe.registry))] if tracking.enabled else [])
        record.config = {leaf.key: leaf.value for leaf in leaves_of(recipe.recorded(), "", "")}
        record.parameters = recipe.telling()
        record.tags = redacted({**common_tags(recipe, task), **program_tags(recipe), **further})
        return ProgramRun(recipe, task, record, seen, recorder).fit()
    except BaseException:
        remove_untrained(record.folder)
        raise


class Pause:
    """Interrupts a run after an epoch, if it is to pause there.

    Args:
        until: epochs; ``None``: never.
    """

    stop: Callable[[str], None]

    def __init__(self, until: int | None) -> None:
        self._until = until

    @hookimpl
    def epoch_end(self, run: Run) -> None:
        """Ask the run to stop, which ends it with a checkpoint of this epoch."""
        if self._until is not None and run.epoch >= self._until:
            self.stop(paused_at(self._until))


def places(tracking: TrackingConfig, folder: Path) -> list[str]:
    """List where a run is recorded besides its folder: its trackers, MLflow with the address of its store."""
    if not tracking.enabled:
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


def standard_observers(recipe: Recipe, *, quiet: bool, label: str | None) -> list[Any]:
    """Make the observers: pictures, plots, progress display, the configured diagnostics, and every plugin that observes."""
    from bpfree.tracking.pictures import Pictures
    from bpfree.tracking.plots import Plots
    from bpfree.tracking.progress import ProgressDisplay

    settings = recipe.settings
    diagnostics = [recipe.registry.get("diagnostics", name)() for name in settings.diagnostics]
    modules = [module for name, module in recipe.registry.manager.list_name_plugin() if module is not None]
    plots = [Plots()] if settings.pictures.curves else []
    return [*diagnostics, Pictures(settings.pictures), *plots, ProgressDisplay(quiet=quiet, label=label), *modules]


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
        **({"classes": named(task.spec, range(task.spec.outputs))} if task.spec.class_names else {}),
        "seed": str(recipe.settings.seed),
        "test_evaluations": str(int(recipe.settings.evaluation.test)),
        "validation": str(recipe.task.validation),
        **({"unused": ", ".join(recipe.unused)} if recipe.unused else {}),
        **({"quick": "True"} if recipe.settings.quick else {}),
    }
