"""The examination by whole runs: reading, the alignment of first steps, and whether predictions need the hidden blocks."""

from __future__ import annotations

import secrets
import statistics
from dataclasses import dataclass, field
from typing import Any

import torch

from bpfree.certify import training_runs
from bpfree.certify.arms import Reference
from bpfree.certify.child import in_child
from bpfree.certify.loop import predict
from bpfree.certify.reading import Reading, first_inputs, measure_reading
from bpfree.certify.subject import Subject
from bpfree.certify.whole_runs import EPOCHS, run_first_steps, run_reference, settings_of
from bpfree.errors import BpfreeError
from bpfree.rule import Rule, Traits
from bpfree.tasks.task import Task

__all__ = ["Needed", "WholeExamination", "examine_whole_runs"]

DRAWS = 5
ALIGNED = 0.3
"""Mean cosine with the true gradient that excludes "no transport"; honest rules that are tried stay below 0.1."""
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
        alignment: cosine of the first update with the true gradient, by hidden block, one for each draw of the rule's parameters.
        unaligned: why there is none.
        needed: whether predictions need the hidden blocks; ``None``: no hidden block learns, or it was not measured.
        unneeded: why it was not measured.
        last_hidden: name of the hidden block below the readout.
        traits: what the rule declares on this network.
        open: what could not be shut off from the examined rule.
        trouble: why nothing was measured.
    """

    reading: Reading = field(default_factory=Reading)
    alignment: dict[str, list[float]] = field(default_factory=dict)
    unaligned: str = ""
    needed: Needed | None = None
    unneeded: str = ""
    last_hidden: str = ""
    traits: Traits | None = None
    open: tuple[str, ...] = ()
    trouble: str = ""

    @property
    def least_aligned(self) -> float | None:
        """The smallest mean cosine of the hidden blocks but the last; ``None`` without one."""
        means = [statistics.fmean(values) for name, values in self.alignment.items() if name != self.last_hidden]
        return min(means, default=None)

    @property
    def contradicts_itself(self) -> bool:
        """Whether no transport was seen, and yet the first update of every hidden block but the last follows the true gradient."""
        seen = self.reading.found("reads", "executes", "at construction", "unmeasured")
        return not seen and bool(self.reading.cells) and (self.least_aligned or 0.0) > ALIGNED

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "reading": self.reading.to_dict(),
            "first_update_alignment": {name: [round(value, 4) for value in values] for name, values in self.alignment.items()},
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
    try:
        data = task or _task_of(subject)  # here, because the child has no data folder

        def work() -> WholeExamination:
            torch.set_num_threads(1)
            return _examine(subject, data, drawn)

        done = in_child(work, stay=subject.names_code)
    except BpfreeError as error:
        return WholeExamination(trouble=error.what)
    done.result.open = done.open
    return done.result


def _task_of(subject: Subject) -> Task:
    """Load the rule's default task, or the one that takes its place for other targets than classes."""
    usual = subject.targets == "classes" and subject.own_task is None
    return subject.resolve(settings_of(subject, "runs", EPOCHS, 0)).build_task() if usual else training_runs.task_of(subject)


def _examine(subject: Subject, task: Task, draw: int) -> WholeExamination:
    reference, rule = run_reference(subject, task)
    found = WholeExamination(last_hidden=(rule.network.hidden or [""])[-1], traits=rule.traits)
    found.reading = measure_reading(subject, reference, task, draw=draw)
    found.reading.task = task.spec.name
    found.alignment, found.unaligned = _first_alignment(subject, task)
    found.needed, found.unneeded = _needed(reference, rule, task)
    return found


def _needed(reference: Reference, rule: Rule, task: Task) -> tuple[Needed | None, str]:
    """Compare predictions before and after the hidden blocks are put back to where they began, which changes the rule.

    Returns:
        The comparison, or why there is none; neither where no hidden block has learned.
    """
    hidden = [name for name in rule.network.hidden if name in reference.initial and reference.moved(name)]
    if not hidden:
        return None, ""
    try:
        inputs = first_inputs(task.test, task, EXAMPLES)
        trained = predict(rule, inputs)
        with torch.no_grad():
            for name in hidden:
                for key, p in rule.network.blocks[name].named_parameters():
                    if key in reference.initial[name]:
                        p.copy_(reference.initial[name][key])
        fresh = predict(rule, inputs)
    except Exception as error:  # it has predicted in its run, or other checks have said so
        return None, f"predictions with fresh hidden blocks fail: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if task.spec.targets == "classes" and trained.dim() > 1:
        same = trained.argmax(1) == fresh.argmax(1)
    else:
        same = (trained - fresh).flatten(1).norm(dim=1) <= CLOSE * trained.flatten(1).norm(dim=1)
    return Needed(round(float(same.float().mean()), 4), len(trained)), ""


def _first_alignment(subject: Subject, task: Task) -> tuple[dict[str, list[float]], str]:
    """Return for each hidden block the cosine of its first update with the true gradient, for each draw; or why there is none."""
    found: dict[str, list[float]] = {}
    for seed in range(DRAWS):
        try:
            cosines = run_first_steps(subject, task, seed=seed)
        except Exception as error:
            return {}, f"a run of another seed fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        for name, cosine in cosines.items():
            found.setdefault(name, []).append(cosine)
    return {name: values for name, values in found.items() if len(values) == DRAWS}, ""
