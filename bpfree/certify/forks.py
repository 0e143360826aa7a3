"""The examination of a finished run: forks from its own checkpoints, with dirty weights from there on.

A control fork must land on the run's own later checkpoint, bit for bit: that binds the examination to the run. So a rule that behaves
otherwise in short runs, on other tasks, or for its first thousand steps is examined where it was used.
"""

from __future__ import annotations

import datetime
import itertools
import random
import re
import secrets
import shutil
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bpfree import runner, sources
from bpfree.certify.arms import Arm, Reference, WholeRun
from bpfree.certify.certificate import Certificate
from bpfree.certify.checks.whole_runs import judge_reading
from bpfree.certify.child import in_child
from bpfree.certify.examination import examine_with, set_aside
from bpfree.certify.reading import Reading, control_of, read_matrix
from bpfree.certify.watches import Intervening, Recording, Watch, watched
from bpfree.config import parse_words, recipe_of
from bpfree.errors import BpfreeError, UsageError
from bpfree.hooks import API_VERSION
from bpfree.plugins import Plugins, installed_plugins
from bpfree.recipe import Recipe
from bpfree.record.folder import RunFolder, read_run
from bpfree.rule import Traits
from bpfree.tasks.task import Task
from bpfree.training import environment
from bpfree.training.checkpoint import read_checkpoint
from bpfree.training.stopping import Interrupted

__all__ = ["certify_run"]

QUIET = ["tracking.enabled=false", "pictures.every=0", "pictures.curves=false", "device=cpu"]
MOMENTS = 2


@dataclass
class _Fork:
    """What forks of a run between two of its checkpoints showed."""

    begin: int
    end: int
    reading: Reading
    lands: bool


def certify_run(place: Path, *, registry: Plugins | None = None, draw: int | None = None, moments: int = MOMENTS) -> Certificate:
    """Examine a run by forks from its checkpoints, on the CPU, with as many threads as it had.

    Args:
        place: the run's folder; it was trained with ``checkpoint.keep=all``.
        registry: of names; the installed plugins by default.
        draw: seed by which moments and dirty weights are drawn; a new one by default. The certificate records it.
        moments: how many pairs of consecutive checkpoints.

    Raises:
        UsageError: the run has not kept two consecutive checkpoints, or was trained on another device.
        BpfreeError: a checkpoint cannot be read, or what it names is not there.
    """
    began, place = time.perf_counter(), place.resolve()
    drawn = secrets.randbelow(2**31) if draw is None else draw
    plugins = registry or installed_plugins()
    pairs = _pairs(place)
    chosen = sorted(random.Random(drawn).sample(pairs, min(moments, len(pairs))))
    config, threads = read_checkpoint(_file(place, chosen[0][0]))["config"], _threads(place)
    recipe = recipe_of(config, [], where=str(place), registry=plugins)
    with set_aside():
        examined = _Forks(place, recipe, threads)  # here, because the child has no data folder
        traits = examined.traits
        done = in_child(lambda: [examined.between(begin, end, drawn) for begin, end in chosen], stay=True, threads=threads)
        forks = done.result
        findings = [examine_with("whole-run-reading", partial(_judged, fork, traits, place)) for fork in forks]
    worst = next((finding for finding in findings if finding.status != "passed"), findings[0])
    known = recipe.registry  # with what is in files of code
    owner = known.owner("rules", recipe.names["rule"])
    return Certificate(
        rule=recipe.names["rule"],
        plugin=owner.name,
        distribution=owner.distribution,
        version=owner.version,
        settings=[],
        config=dict(config),
        traits={**vars(traits), "targets": list(traits.targets)},
        kind="run",
        date=datetime.date.today().isoformat(),
        properties={"run": {"name": place.name, "draw": drawn, "not_shut_off": list(done.open), "forks": [_plain(fork) for fork in forks]}},
        findings=[worst],
        sources=sources.certificate_hashes(known, recipe.names["rule"]),
        environment={k: v for k, v in environment.describe(torch.device("cpu")).items() if v},
        seconds=round(time.perf_counter() - began, 1),
        api=API_VERSION,
    )


def _plain(fork: _Fork) -> dict[str, Any]:
    return {"from_epoch": fork.begin, "to_epoch": fork.end, "lands_on_the_run": fork.lands, "reading": fork.reading.to_dict()}


def _judged(fork: _Fork, traits: Traits, place: Path) -> str:
    where = f"{place.name}, epochs {fork.begin} to {fork.end}"
    if not fork.lands:
        raise BpfreeError(
            "a fork without any change does not land on the run's own later checkpoint, so it says nothing of the run",
            where=where,
            fix="examine it with the versions and the data that it was trained with, on a processor of the same kind",
        )
    return f"epochs {fork.begin} to {fork.end}: {judge_reading(fork.reading, traits, where)}"


def _file(place: Path, epoch: int) -> Path:
    return RunFolder(place).checkpoints / f"epoch-{epoch:04d}.pt"


def _threads(place: Path) -> int:
    """Return the number of threads of a run.

    Raises:
        UsageError: it was not trained on the CPU.
    """
    tags = read_run(place).tags
    if tags.get("device", "cpu") != "cpu":
        what = f"the run was trained on {tags['device']}, and forks are made on the CPU, where they cannot land on its checkpoints"
        raise UsageError(what, where=str(place), fix="train it with device=cpu and checkpoint.keep=all")
    return int(tags.get("threads", "1"))


def _pairs(place: Path) -> list[tuple[int, int]]:
    """Return consecutive pairs of epochs whose checkpoints the run has kept."""
    names = (re.fullmatch(r"epoch-(\d+)\.pt", path.name) for path in RunFolder(place).checkpoints.glob("epoch-*.pt"))
    epochs = sorted(int(name[1]) for name in names if name)
    if len(epochs) < 2:
        what = "the run has not kept the checkpoints on its way, from which it could be forked"
        raise UsageError(what, where=str(place), fix="train it with checkpoint.keep=all")
    return list(itertools.pairwise(epochs))


class _Forks:
    """Trains a run again between two of its checkpoints.

    Args:
        place: the run's folder.
        recipe: its configuration.
        threads: of torch.
    """

    def __init__(self, place: Path, recipe: Recipe, threads: int) -> None:
        self._place, self._recipe, self._changes = place, recipe, parse_words([*QUIET, f"threads={threads}"])
        self._task: Task = recipe.build_task()
        self.traits = recipe.build_rule(self._task.spec).traits

    def between(self, begin: int, end: int, draw: int) -> _Fork:
        """Fork at the end of an epoch, without a change and with each, and compare at the end of another."""
        recording = Recording()
        landed = self._run(begin, end, recording)
        kept = read_checkpoint(_file(self._place, end))["weights"]
        lands = landed.keys() == kept.keys() and all(torch.equal(landed[name], value) for name, value in kept.items())
        reference: Reference = recording.reference

        def run(arm: Arm, drawn: int) -> WholeRun:
            watch = Intervening(arm, reference, drawn)
            return watch.outcome(lambda: self._run(begin, end, watch))

        control = control_of(reference, self._task, draw)
        reading = read_matrix(reference, run, draw=draw, control=control, since="start")
        reading.task = self._task.spec.name
        return _Fork(begin, end, reading, lands)

    def _run(self, begin: int, end: int, watch: Watch) -> dict[str, Any]:
        """Train from one checkpoint to another, and return the weights there."""
        with tempfile.TemporaryDirectory(prefix="bpfree-fork-") as folder:
            place = Path(folder, self._place.name)
            (place / "checkpoints").mkdir(parents=True)
            shutil.copy(_file(self._place, begin), place / "checkpoints" / "last.pt")
            kind = self._recipe.registry.get("rules", self._recipe.names["rule"])
            try:
                with watched(kind, watch):
                    try:
                        runner.resume(
                            str(place), changes=self._changes, quiet=True, task=self._task, until=end, registry=self._recipe.registry
                        )
                    except Interrupted:
                        watch.end()
            finally:
                watch.close()
            return dict(read_checkpoint(place / "checkpoints" / "last.pt")["weights"])
