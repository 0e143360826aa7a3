"""The hook interface: what a plugin can register, and what an observer can see.

*Registration* hooks are called once and return mappings from names to objects. *Lifecycle* hooks are called during a run; they
observe: what is trained and reported is compared around each of them, and a change fails the run. They see the run read-only, but
for ``run.artifacts`` and ``run.tracking``. The trainer's loop, with the places where they are called::

    run_start(run)
    for phase in rule.phases(budget):
        phase_start(run, phase)
        for epoch in phase:
            for batch in loader:
                rule.learn(batch, step)
                step_end(run, step)                   # skipped when no observer implements it
            evaluation (validation split)
            epoch_end(run, metrics, rule)
            checkpoint_saved(run, path)
        phase_end(run, phase)
    rule.calibrate(validation split)                  # where a rule chooses something; weights are fixed
    evaluation (test split, once; protocols on features)
    run_end(run)

A plugin is a module (or object) named by an entry point in the group ``bpfree``. It states the interface version it was
written for as ``bpfree_api = 2`` and implements hooks as functions marked with ``bpfree.hookimpl``::

    import bpfree

    bpfree_api = 2

    @bpfree.hookimpl
    def bpfree_rules():
        return {"my-rule": MyRule}

An implementation may leave out arguments that it does not need. Of a program (``bpfree_programs``) ``run_start``, ``phase_start``,
``epoch_end`` and ``run_end`` are called, where they ask for no rule, phase or step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from pathlib import Path

    from torch.optim import Optimizer

    from bpfree.addons import AddonKind
    from bpfree.kinds import Maker
    from bpfree.metric import Metric
    from bpfree.network.builders import NetworkBuilder
    from bpfree.program import Program
    from bpfree.rule import Rule
    from bpfree.run import Run
    from bpfree.step import Phase, Step
    from bpfree.tasks.augment import Augmentation
    from bpfree.tasks.protocols import EvaluationProtocol
    from bpfree.tasks.task import DataSource

__all__ = ["API_VERSION", "OLDEST_API", "hookimpl", "hookspec"]

API_VERSION = 2
"""Version of this interface. It moves when a plugin written for the previous one would no longer work."""
OLDEST_API = 1
"""The oldest version whose plugins still work, by the translation in ``interface_v1``; goes with it after one release."""

hookspec = pluggy.HookspecMarker("bpfree")
hookimpl = pluggy.HookimplMarker("bpfree")


# --- registration ---------------------------------------------------------------------------------------------------


@hookspec
def bpfree_rules() -> Mapping[str, type[Rule]]:  # type: ignore[empty-body]
    """Register learning rules by name."""


@hookspec
def bpfree_networks() -> Mapping[str, NetworkBuilder]:  # type: ignore[empty-body]
    """Register builders of networks by name."""


@hookspec
def bpfree_tasks() -> Mapping[str, DataSource]:  # type: ignore[empty-body]
    """Register data sets by name."""


@hookspec
def bpfree_programs() -> Mapping[str, Program]:  # type: ignore[empty-body]
    """Register other trainers by name, which a study can have as rows (``program: NAME``) beside rules."""


@hookspec
def bpfree_augmentations() -> Mapping[str, Augmentation]:  # type: ignore[empty-body]
    """Register augmentations of training batches by name."""


@hookspec
def bpfree_protocols() -> Mapping[str, EvaluationProtocol]:  # type: ignore[empty-body]
    """Register protocols that score features by name, switched on with ``evaluation.protocols=[name]``."""


@hookspec
def bpfree_metrics() -> Mapping[str, Metric]:  # type: ignore[empty-body]
    """Register metrics of predictions by name, switched on with ``evaluation.metrics=[name]``."""


@hookspec
def bpfree_optimizers() -> Mapping[str, type[Optimizer]]:  # type: ignore[empty-body]
    """Register optimisers by name, chosen with ``optimizer=name``: subclasses of ``torch.optim.Optimizer``, over parameters and options.

    One whose ``step`` needs a closure says so with a class attribute ``needs_closure = True``; the closure computes the rule's credit again
    and gives its metric ``loss``.
    """


@hookspec
def bpfree_addons() -> Mapping[str, AddonKind]:  # type: ignore[empty-body]
    """Register add-ons to the updates of any rule by name, switched on with ``optimizer.addons=[name]``."""


@hookspec
def bpfree_diagnostics() -> Mapping[str, Callable[[], Any]]:  # type: ignore[empty-body]
    """Register factories of lifecycle observers by name, switched on with ``diagnostics=[name]``."""


@hookspec
def bpfree_presets() -> Mapping[str, Mapping[str, Any]]:  # type: ignore[empty-body]
    """Register settings of a row of a study by name: ``{"noprop/mnist": {"rule": "noprop-dt", "rule.T": 10}}``.

    Names begin with what they are for, or with the plugin's. The study ``quickstart`` has a row for each preset
    ``quickstart/NAME``: a plugin marks one rule with it, small enough for a minute on one core with the digits.
    """


@hookspec
def bpfree_studies() -> Mapping[str, str | PathLike[str]]:  # type: ignore[empty-body]
    """Register study files (YAML, see ``docs/studies.md``) by name."""


@hookspec
def bpfree_trackers() -> Mapping[str, Maker]:  # type: ignore[empty-body]
    """Register makers of trackers by name, switched on with ``tracking.to=[name]``.

    Each is called with the run and the options ``tracking.*``, and returns a :class:`bpfree.Tracker`.
    """


@hookspec
def bpfree_executors() -> Mapping[str, Maker]:  # type: ignore[empty-body]
    """Register makers of executors by name, chosen with ``bpfree study run --executor name``.

    Each is called with a :class:`bpfree.study.executor.Request` and the executor's own options, and returns a
    :class:`bpfree.Executor`.
    """


# --- lifecycle ------------------------------------------------------------------------------------------------------


@hookspec
def run_start(run: Run) -> None:
    """Observe the start of a run, or its resumption (``run.resumed``); its configuration and folder are known."""


@hookspec
def phase_start(run: Run, phase: Phase) -> None:
    """Observe the start of a phase; parameters that it adds exist."""


@hookspec
def step_end(run: Run, step: Step) -> None:
    """Observe a step that has been taken; keep this cheap, because it is inside the timed loop."""


@hookspec
def epoch_end(run: Run, metrics: Mapping[str, float], rule: Rule) -> None:
    """Observe the end of a pass over the training split, with all its metrics, after the evaluation; not timed.

    The rule may only be read: a change fails the run.
    """


@hookspec
def progress(run: Run, metrics: Mapping[str, float]) -> None:
    """Observe the end of a logging interval within an epoch, with the means of its step metrics."""


@hookspec
def checkpoint_saved(run: Run, path: Path) -> None:
    """Observe that a checkpoint is on disk."""


@hookspec
def phase_end(run: Run, phase: Phase) -> None:
    """Observe the end of a phase."""


@hookspec
def run_end(run: Run) -> None:
    """Observe the end of the run: its ``status`` is finished, diverged, interrupted or failed, and ``run.result`` holds the test."""
