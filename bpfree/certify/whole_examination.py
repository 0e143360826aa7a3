"""The examination by whole runs: reading, the alignment of first steps, and whether predictions need the hidden blocks."""

from __future__ import annotations

import secrets
import statistics
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bpfree.certify import training_runs
from bpfree.certify.child import in_child
from bpfree.certify.loop import predict
from bpfree.certify.probe import PLAIN, task_gradients
from bpfree.certify.reading import Reading, measure_reading
from bpfree.certify.subject import Subject, with_views
from bpfree.certify.whole_runs import EPOCHS, Reference, run_reference, settings_of
from bpfree.errors import BpfreeError
from bpfree.rule import Rule, Traits
from bpfree.step import Batch, Budget
from bpfree.tasks.task import Examples, Task
from bpfree.training.stepper import Stepper

__all__ = ["Needed", "WholeExamination", "examine_whole_runs"]

DRAWS = 5
EXAMPLES = 512
"""Examples on which predictions with fresh blocks are compared."""
CLOSE = 0.01
"""Relative difference up to which predictions that are no classes count as the same."""


@dataclass(frozen=True)
class Needed:
    """Predictions of the trained rule, and of the same with its hidden blocks as they were before training.

    Attributes:
        agreement: share of examples with the same prediction.
        examples: how many.
    """

    agreement: float
    examples: int


@dataclass
class WholeExamination:
    """What whole runs showed.

    Attributes:
        reading: whose weights are read.
        alignment: cosine of minus the first step's update with the true gradient, by hidden block, one for each draw of the rule's
            parameters.
        needed: whether predictions need the hidden blocks; ``None``: not measured.
        last_hidden: name of the hidden block below the readout.
        traits: what the rule declares on this network.
        open: what could not be shut off from the examined rule.
        trouble: why nothing was measured.
    """

    reading: Reading = field(default_factory=Reading)
    alignment: dict[str, list[float]] = field(default_factory=dict)
    needed: Needed | None = None
    last_hidden: str = ""
    traits: Traits | None = None
    open: tuple[str, ...] = ()
    trouble: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "reading": self.reading.to_dict(),
            "first_step_alignment": {name: [round(value, 4) for value in values] for name, values in self.alignment.items()},
            "fresh_blocks": None if self.needed is None else {"agreement": self.needed.agreement, "examples": self.needed.examples},
            "not_shut_off": list(self.open),
            "trouble": self.trouble,
        }


def examine_whole_runs(subject: Subject, task: Task | None = None, *, draw: int | None = None) -> WholeExamination:
    """Examine a rule by whole runs, in a process of its own.

    Args:
        subject: the rule.
        task: in place of the rule's default one.
        draw: seed of the dirty parameters; drawn here by default, so that no rule can know it before.
    """
    drawn = secrets.randbelow(2**31) if draw is None else draw

    def work() -> WholeExamination:
        torch.set_num_threads(1)
        return _examine(subject, task, drawn)

    try:
        done = in_child(work, stay=subject.names_code)
    except BpfreeError as error:
        return WholeExamination(trouble=error.what)
    done.result.open = done.open
    return done.result


def _examine(subject: Subject, task: Task | None, draw: int) -> WholeExamination:
    if task is None:
        usual = subject.targets == "classes" and subject.own_task is None
        task = subject.resolve(settings_of(subject, "runs", EPOCHS, 0)).build_task() if usual else training_runs.task_of(subject)
    reference, rule = run_reference(subject, task)
    found = WholeExamination(last_hidden=(rule.network.hidden or [""])[-1], traits=rule.traits)
    found.needed = _needed(reference, rule, task)
    found.reading = measure_reading(subject, reference, task, draw=draw)
    found.reading.task = task.spec.name
    found.alignment = _first_alignment(subject, task)
    return found


# --- predictions with fresh blocks -----------------------------------------------------------------------------------------


def _needed(reference: Reference, rule: Rule, task: Task) -> Needed | None:
    """Compare predictions before and after the hidden blocks are put back to where they began; the rule is changed."""
    split = task.test if task.test is not None else task.train
    hidden = [name for name in rule.network.hidden if name in reference.initial and reference.moved(name)]
    if not hidden or split is None:
        return None
    try:
        inputs = _inputs(split, task, EXAMPLES)
        trained = predict(rule, inputs)
        with torch.no_grad():
            for name in hidden:
                for key, p in rule.network.blocks[name].named_parameters():
                    if key in reference.initial[name]:
                        p.copy_(reference.initial[name][key])
        fresh = predict(rule, inputs)
    except Exception:  # a rule that cannot predict so has failed other checks
        return None
    if task.spec.targets == "classes" and trained.dim() > 1:
        same = trained.argmax(1) == fresh.argmax(1)
    else:
        same = (trained - fresh).flatten(1).norm(dim=1) <= CLOSE * trained.flatten(1).norm(dim=1)
    return Needed(round(float(same.float().mean()), 4), len(trained))


def _inputs(split: Examples, task: Task, count: int) -> Any:
    raw, _ = split.batch(torch.arange(min(count, len(split))))
    return task.spec.normalise(raw)


# --- the first step ---------------------------------------------------------------------------------------------------------


def _first_alignment(subject: Subject, task: Task) -> dict[str, list[float]]:
    """Return for each hidden block the cosine of the first step with the true gradient, over draws of the rule's own parameters."""
    found: dict[str, list[float]] = {}
    for seed in range(DRAWS):
        for name, cosine in _first_cosines(subject, task, seed).items():
            found.setdefault(name, []).append(cosine)
    return {name: values for name, values in found.items() if len(values) == DRAWS}


def _first_cosines(subject: Subject, task: Task, seed: int) -> dict[str, float]:
    recipe = subject.resolve(settings_of(subject, "runs", EPOCHS, seed), task.spec)
    rule = recipe.build_rule(task.spec).train()
    if not rule.network.chain:
        return {}
    rule.group_options = dict  # type: ignore[method-assign,assignment]  # rate 1 for all
    count = recipe.settings.batch_size
    raw, targets = task.train.batch(torch.arange(min(count, len(task.train))))
    batch = with_views(Batch(task.spec.normalise(raw), targets), subject.views)
    stepper = Stepper(rule, PLAIN, seed=seed)
    try:
        stepper.prepare(task.train)
        phase = next(iter(rule.phases(Budget(epochs=EPOCHS))))
        if phase.on_features:
            return {}
        with stepper.phase(phase):
            gradients = task_gradients(rule, batch)
            before = _flat(rule)
            stepper.take(batch)
            after = _flat(rule)
    except Exception:  # the run itself has shown what is wrong
        return {}
    moved = {name: after[name] - before[name] for name in rule.network.hidden if name in gradients}
    return {
        name: float(F.cosine_similarity(-update, gradients[name], dim=0))
        for name, update in moved.items()
        if bool(update.any()) and bool(gradients[name].any()) and bool(update.isfinite().all())
    }


def _flat(rule: Rule) -> dict[str, Tensor]:
    own = {name: [p.detach().flatten() for p in block.parameters()] for name, block in rule.network.blocks.items()}
    return {name: torch.cat(parts).clone() for name, parts in own.items() if parts}


def least_aligned(alignment: dict[str, list[float]], last: str) -> float | None:
    """Return the smallest mean cosine of the hidden blocks but the last; ``None`` without one."""
    means = [statistics.fmean(values) for name, values in alignment.items() if name != last]
    return min(means, default=None)
