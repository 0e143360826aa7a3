"""Running a recipe, with its folder, its observers and its trainer; also resuming a run.

Where a launcher has started several processes, each of them runs the same recipe: the first one makes the folder and observes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bpfree.config import recipe_of
from bpfree.errors import BpfreeError, UsageError
from bpfree.hooks import hookimpl
from bpfree.leaves import Leaf, names_code
from bpfree.legacy import refuse_version_1
from bpfree.plugins import Plugins
from bpfree.program_run import ProgramRun, program_tags
from bpfree.recipe import CHANGEABLE, Recipe, changed
from bpfree.record.folder import RunFolder
from bpfree.record.recorder import Recorder
from bpfree.recorded import (
    RecipeFile,
    Trainer,
    common_tags,
    known_run,
    make_folder,
    name_of,
    plugin_observers,
    recording,
    remove_untrained,
    tests_before,
)
from bpfree.redaction import redact_logs, redacted
from bpfree.run import Run, new_run_id
from bpfree.tasks.task import Task
from bpfree.tracking.mlflow_tracker import settled
from bpfree.tracking.progress import ProgressDisplay
from bpfree.tracking.sending import complete
from bpfree.training.checkpoint import find_checkpoint, read_checkpoint
from bpfree.training.distributed import World
from bpfree.training.environment import flushing_denormals
from bpfree.training.stopping import paused_at

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
    callbacks: Iterable[Any] = (),
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
        callbacks: as those of :class:`bpfree.Trainer`.
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
        options: dict[str, Any] = {"quiet": quiet, "label": label, "observers": observers, "callbacks": callbacks, "task": task}
        return _train(recipe, record, None, world, **options, further=tags or {}, until=until)


def new_record(recipe: Recipe, run_id: str | None) -> Run:
    """Make a run with its folder.

    Raises:
        UsageError: the run of this identifier has a checkpoint.
    """
    name = name_of(recipe)
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
    callbacks: Iterable[Any] = (),
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
        quiet, label, observers, callbacks, task: as in :func:`run`.
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
        options: dict[str, Any] = {"quiet": quiet, "label": label, "observers": observers, "callbacks": callbacks, "task": task}
        return _train(recipe, record, path, world, **options, further=count | dict(tags or {}), elsewhere=elsewhere, until=until)


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
    callbacks: Iterable[Any],
    task: Task | None,
    further: Mapping[str, str],
    elsewhere: bool = True,
    until: int | None = None,
) -> Run:
    folder, settings = record.folder, recipe.settings
    assert folder is not None
    tracking, pause = settings.tracking if elsewhere else settled(settings.tracking, folder), Pause(until)
    failures = [ProgressDisplay(quiet=True, label=label)] if quiet else []
    try:
        with world.agreed():
            if world.first and tracking.to_mlflow:
                tracking.resolve_uri(folder.parent)  # refused before anything is loaded
            task = task or recipe.build_task()
            trainer = Trainer(
                recipe.build_rule(task.spec),
                task,
                progress=not quiet,
                label=label,
                tracking=tracking,
                callbacks=callbacks,
                observers=[*failures, *observers, pause],
                augment=recipe.augmentations(),
                recipe=recipe,
                run=record,
                further=further,
            )
        pause.stop = trainer.stop
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
    assert record.folder is not None
    tracking = recipe.settings.tracking
    seen = [RecipeFile(recipe, ""), ProgressDisplay(quiet=quiet, label=label), *observers, *plugin_observers(recipe)]
    try:
        redact_logs()
        if tracking.to_mlflow:
            tracking.resolve_uri(record.folder.parent)
        task = task or recipe.build_task()
        recorder = Recorder(recording(recipe, tracking))
        record.config = recipe.recorded_flat()
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
