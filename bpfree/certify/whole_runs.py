"""Whole runs as the examination: what a rule learns when the weights above a block are dirty, on the path of ``bpfree train``.

A reference run of the rule is recorded: same trainer, hooks, network, task, precision and batch size as for a user, with a short budget.
Each further run has the same seed, and differs in one block j: its parameters are dirty from before the rule is given its network until the
run ends (``twice.py``), other ones in each step, while its executions have the reference's values. Blocks above j are set to the
reference's weights before and after each step, so that what they send down is unchanged. A rule whose updates are no functions of the
weights of j ends, in every block below, with the reference's weights bit for bit.

A second kind of change shows *learning by execution*: executions of block j on other inputs than the first of a step have the values of
other weights. A rule that finds weights out by executing blocks on noise, on perturbed activations or with
perturbed parameters ends elsewhere then.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from typing import Any

from bpfree import runner
from bpfree.certify.arms import Arm, Reference, WholeRun
from bpfree.certify.subject import Subject
from bpfree.certify.watches import Enough, FirstSteps, Intervening, Recording, Watch, watched
from bpfree.errors import BpfreeError
from bpfree.rule import Rule
from bpfree.tasks.task import Task

__all__ = ["EPOCHS", "run_arm", "run_first_steps", "run_reference", "settings_of"]

EPOCHS = 10
"""The default budget of ``bpfree train``."""


def run_reference(subject: Subject, task: Task | None = None, *, epochs: int = EPOCHS, seed: int = 0) -> tuple[Reference, Rule]:
    """Train the rule as a user would, and record it; returns the trained rule too.

    Raises:
        BpfreeError: the run fails.
    """
    watch = Recording()
    _run(subject, watch, task, epochs=epochs, seed=seed)
    if not watch.reference.after:
        raise BpfreeError("the rule has taken no step", where=subject.name, fix="yield a Phase from Rule.phases")
    assert watch.rule is not None
    return watch.reference, watch.rule


def run_arm(
    subject: Subject, arm: Arm, reference: Reference, task: Task | None = None, *, draw: int, epochs: int = EPOCHS, seed: int = 0
) -> WholeRun:
    """Train the rule with one block changed, and compare.

    Args:
        subject: the rule.
        arm: what is changed.
        reference: of the same seed, task and budget.
        task: in place of the rule's default one.
        draw: seed of what is drawn for the change.
        epochs, seed: of the run.
    """
    watch = Intervening(arm, reference, draw)
    return watch.outcome(lambda: _run(subject, watch, task, epochs=epochs, seed=seed))


def run_first_steps(subject: Subject, task: Task, *, seed: int) -> dict[str, float]:
    """Return for each hidden block the cosine of its first update with the true gradient; empty where the network is no chain.

    Raises:
        Exception: whatever ends the run before that.
    """
    watch = FirstSteps()
    with suppress(Enough):
        _run(subject, watch, task, epochs=EPOCHS, seed=seed)
    return watch.cosines


def settings_of(subject: Subject, folder: str, epochs: int, seed: int) -> dict[str, Any]:
    """Return the settings of an examined run over the rule's own."""
    quiet = {"tracking.enabled": False, "pictures.every": 0, "pictures.curves": False}
    return {"output": folder, "seed": seed, "budget.epochs": epochs, "device": "cpu", "threads": 1, **quiet, **subject.own_network}


def _run(subject: Subject, watch: Watch, task: Task | None, *, epochs: int, seed: int) -> Any:
    folder = tempfile.mkdtemp(prefix="bpfree-")
    try:
        recipe = subject.resolve(settings_of(subject, folder, epochs, seed), None if task is None else task.spec)
        with watched(subject.rule, watch):
            return runner.run(recipe, quiet=True, task=task)
    finally:
        watch.close()
        shutil.rmtree(folder, ignore_errors=True)
