"""Labels of the evaluation stay unseen, and each example is predicted for itself."""

from __future__ import annotations

import gc
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from bpfree.certify import training_runs
from bpfree.certify.checks.check import Check
from bpfree.certify.checks.frozen_noise import FrozenNoise
from bpfree.certify.checks.guard import guarded
from bpfree.certify.checks.places import place_of
from bpfree.certify.findings import CheckFailed, Unmeasured
from bpfree.certify.loop import predict, small_rule, trained
from bpfree.certify.measurements import Measurements
from bpfree.network.network import evaluating
from bpfree.rule import Rule
from bpfree.tasks.spec import has_own_loss
from bpfree.tasks.task import Examples, Split, Task, TaskSpec
from bpfree.tasks.trees import select
from bpfree.training.evaluation import Evaluator
from bpfree.training.floor import chance_of

__all__ = ["CHECKS"]

EXAMPLES, EPOCHS = 160, 4
RECUTS = {"halves": (6, 6), "odd sizes": (5, 3, 1, 2, 1), "single examples": (1,) * 12}
TOLERANCE = 1e-4
PERMUTATIONS, STANDARD_ERRORS = 3, 4


# --- labels ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RecordingSpec(TaskSpec):
    """A task's spec that keeps the scores that are compared with targets; no frame is added between evaluation and rule."""

    scores: list[Tensor] = field(default_factory=list, compare=False)

    def correct(self, scores: Tensor, targets: Tensor) -> Tensor:
        self.scores.append(scores.detach().clone())
        return super().correct(scores, targets)


def _evaluations(task: Task) -> list[Examples]:
    """Return the splits whose labels the rule may not see: the task's, and those it was cut from."""
    return [split for whole in (task, training_runs.digits()) for split in (whole.validation, whole.test) if split is not None]


@contextmanager
def _permuted(splits: list[Examples]) -> Iterator[None]:
    """Put permuted labels in the same memory, so that a rule that has found the tensors finds other labels in them."""
    saved = [(split.targets, split.targets.clone()) for split in splits if split.targets is not None]
    try:
        for targets, true in saved:
            order = torch.randperm(len(true), generator=torch.Generator().manual_seed(len(true)))
            targets.copy_((true[order] + 1) % 10)
        yield
    finally:
        for targets, true in saved:
            targets.copy_(true)


def _predictions(m: Measurements, rule: Rule, task: Task) -> list[Tensor]:
    """Return all scores of an evaluation of the validation and the test split, as a run makes it."""
    setup = training_runs.trainer(m.subject, task, rule=rule).setup
    spec, recorder = rule.spec, RecordingSpec(**{item.name: getattr(rule.spec, item.name) for item in fields(TaskSpec)})
    rule.spec = recorder
    try:
        evaluator = Evaluator(replace(setup, task=replace(task, spec=recorder)))
        evaluator.validate(1)
        evaluator.test()
    finally:
        rule.spec = spec
    return recorder.scores


def _unique_task(seed: int) -> Task:
    """Return digits that no other object of the process has: a little noise is added to them."""
    task = training_runs.cut(training_runs.digits(), EXAMPLES)
    generator = torch.Generator().manual_seed(seed)

    def noised(split: Examples) -> Split:
        assert isinstance(split, Split)
        inputs = task.spec.normalise(split.inputs)
        return Split(inputs + 0.01 * torch.randn(inputs.shape, generator=generator), split.targets)

    held = None if task.validation is None else noised(task.validation)
    return Task(task.spec.plain(), noised(task.train), held, noised(task.test))


def _learned(m: Measurements, task: Task) -> Rule:
    """Return a rule that was built beside the task, and trained for a few steps."""
    rule = small_rule(m.subject, m.kind, task.spec)
    training_runs.train(m.subject, task, rule=rule, epochs=EPOCHS)
    return rule


def _in_this_world(m: Measurements, seed: int) -> list[Tensor]:
    """Return predictions, after checking that they are the same with other labels in the task's memory."""
    task = _unique_task(seed)
    rule = _learned(m, task)
    true = _predictions(m, rule, task)
    with _permuted(_evaluations(task)):
        moved = _predictions(m, rule, task)
    if not _same(true, moved):
        raise CheckFailed(
            "predictions change when the labels of the evaluation splits are permuted",
            where=place_of(m.subject.rule, "predict"),
            fix="compute predictions from the inputs alone: look for targets neither in callers' frames nor in what refers to the inputs",
        )
    return true


def _in_other_world(m: Measurements, seed: int) -> list[Tensor]:
    """Return the predictions of a rule built when the labels of the evaluation had been permuted."""
    task = _unique_task(seed)
    with _permuted(_evaluations(task)):
        return _predictions(m, _learned(m, task), task)


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _need_classes(m: Measurements) -> None:
    """Raise unless the rule learns classes of the digits.

    Raises:
        Unmeasured: it learns something else.
    """
    if m.subject.targets != "classes" or m.subject.own_task is not None:
        raise Unmeasured("it is measured on the classes of the digits, which the rule does not learn")


def labels_unseen(m: Measurements) -> str | None:
    """Check predictions with the labels of the evaluation permuted: after training, and before the rule was built."""
    _need_classes(m)
    seed = secrets.randbits(62)
    true = _in_this_world(m, seed)
    gc.collect()  # so that the rule cannot find the other world's task
    if not _same(true, _in_other_world(m, seed)):
        raise CheckFailed(
            "predictions differ if the labels of the evaluation splits were permuted before the rule was built: it has kept them",
            where=f"{place_of(m.subject.rule, '__init__')}, or prepare, or {place_of(m.subject.rule, 'predict')}",
            fix="learn from the batches and from the training split that prepare is given, and look for no other data",
        )
    return None


def permuted_labels(m: Measurements) -> str | None:
    """Check that what is learned from permuted training labels does not predict the true ones, on average over a few permutations."""
    _need_classes(m)
    found = [_from_permuted(m, seed) for seed in range(PERMUTATIONS)]
    accuracy = sum(float(confusion.trace()) for confusion in found) / PERMUTATIONS
    chance = chance_of(training_runs.digits()) or 1 / len(found[0])
    error = sum(_variance_of_chance(confusion, len(training_runs.digits().test)) for confusion in found) ** 0.5 / PERMUTATIONS
    bound = chance + STANDARD_ERRORS * error
    if accuracy > bound:
        raise CheckFailed(
            f"trained on permuted labels it reaches {accuracy:.1%} on the digits' test split, where chance is {chance:.1%}",
            where=f"above {bound:.1%}, which is chance and {STANDARD_ERRORS} standard errors",
            fix="find where true labels come from: only the batches' targets may teach",
        )
    return f"{accuracy:.1%} on the digits' test split; chance is {chance:.1%}, the bound {bound:.1%}"


def _from_permuted(m: Measurements, seed: int) -> Tensor:
    """Return the confusion matrix on the test split of a rule that was trained on permuted labels."""
    digits = training_runs.digits()
    assert isinstance(digits.train, Split)
    assert digits.train.targets is not None
    order = torch.randperm(len(digits.train), generator=torch.Generator().manual_seed(seed))
    task = replace(digits, train=Split(digits.train.inputs, digits.train.targets[order]), _fingerprint=[])
    rule = small_rule(m.subject, m.kind, task.spec, seed=seed)
    training_runs.train(m.subject, task, rule=rule, seed=seed)
    return _confusion(rule, digits)


def _confusion(rule: Rule, task: Task) -> Tensor:
    """Return (C, C) shares of the test examples, by true and by predicted class."""
    assert isinstance(task.test, Split)
    assert task.test.targets is not None
    made = predict(rule, task.spec.normalise(task.test.inputs)).argmax(1)
    counts = torch.zeros(task.spec.outputs, task.spec.outputs, dtype=torch.float64)
    counts.index_put_((task.test.targets, made), torch.ones((), dtype=torch.float64), accumulate=True)
    return counts / len(made)


def _variance_of_chance(confusion: Tensor, examples: int) -> float:
    """Return the variance of the accuracy under exchanged class names, but no less than that of independent examples.

    Examples of a class are predicted alike, so their number says little. Over all pairings of predicted with true classes the variance
    of the sum is ``sum d_ij^2 / (C - 1)``, with d the doubly centred matrix (Hoeffding 1951, A combinatorial central limit theorem).
    """
    centred = confusion - confusion.mean(0) - confusion.mean(1, keepdim=True) + confusion.mean()
    chance = 1 / len(confusion)
    return max(float(centred.pow(2).sum()) / (len(confusion) - 1), chance * (1 - chance) / examples)


# --- predictions ----------------------------------------------------------------------------------------------------------


def _scores(rule: Rule, inputs: Any) -> Tensor:
    with FrozenNoise():
        return predict(rule, inputs).float()


def _recut(rule: Rule, inputs: Any, sizes: tuple[int, ...]) -> Tensor:
    bounds = [0, *accumulate(sizes)]
    return torch.cat([_scores(rule, select(inputs, torch.arange(start, end))) for start, end in pairwise(bounds)])


def prediction_per_example(m: Measurements) -> str | None:
    """Check that predictions are the same when examples are cut into other batches, with noise held fixed."""
    spec = m.spec
    rule = trained(m.build(), m.batches(16, 4), each=4)
    inputs = m.batches(sum(RECUTS["halves"]), 1, seed=2)[0].inputs
    whole = _scores(rule, inputs)
    count = sum(RECUTS["halves"])
    if spec.targets == "classes" and not has_own_loss(spec) and whole.shape != (count, spec.outputs):
        raise CheckFailed(
            f"predict returns {tuple(whole.shape)} for {count} examples of {spec.outputs} classes",
            where=place_of(type(rule), "predict"),
            fix=f"return scores (N, C), here {(count, spec.outputs)}, higher is better",
        )
    order = torch.arange(count).flip(0).roll(5)
    others = {cut: _recut(rule, inputs, sizes) for cut, sizes in RECUTS.items()}
    others["another order"] = _scores(rule, select(inputs, order))[order.argsort()]
    for cut, scores in others.items():
        _compare(rule, whole, scores, cut)
    return None


def _compare(rule: Rule, whole: Tensor, scores: Tensor, cut: str) -> None:
    difference = (scores - whole).abs().flatten(1).amax(1)
    allowed = TOLERANCE * (1 + whole.abs().max())
    if not bool((difference <= allowed).all()):
        worst = int(difference.nan_to_num(torch.inf).argmax())
        raise CheckFailed(
            f"example {worst}'s prediction moves by {float(difference[worst]):.3g} when the batch of {len(whole)} is cut into {cut}",
            where=place_of(type(rule), "predict"),
            fix="predict each example for itself: take statistics in training, and use the kept ones in eval mode",
        )


# --- state ----------------------------------------------------------------------------------------------------------------


def _state(rule: Rule) -> dict[str, Tensor | bool]:
    tensors = [*rule.named_parameters(), *rule.named_buffers()]
    values: dict[str, Tensor | bool] = {name: value.detach().clone() for name, value in tensors}
    grads = {f".grad of {name}": p.grad.clone() for name, p in rule.named_parameters() if p.grad is not None}
    modes = {f"mode of {name or 'the rule'}": part.training for name, part in rule.named_modules()}
    wanted = {f"requires_grad of {name}": p.requires_grad for name, p in rule.named_parameters()}
    return values | grads | modes | wanted


def _is_same(one: Tensor | bool | None, other: Tensor | bool | None) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())
    return one is other


def no_state_in_predict(m: Measurements) -> str | None:
    """Check that predictions change nothing that a checkpoint holds, nor grads and modes."""
    given = m.batches(16, 2)
    rule = trained(m.build(), given, each=2)
    for parameter in rule.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    with evaluating(rule):
        before = _state(rule)
        predict(rule, given[0].inputs)
        after = _state(rule)
    changed = [name for name in before | after if not _is_same(before.get(name), after.get(name))]
    if changed:
        raise CheckFailed(
            f"predict changes the rule's state: {', '.join(changed[:4])}{' and more' if len(changed) > 4 else ''}",
            where=place_of(type(rule), "predict"),
            fix="compute on copies, and keep what is learned to learn()",
        )
    return None


CHECKS = [
    Check("labels-unseen", "predictions do not depend on the labels of the evaluation", guarded(labels_unseen), waivable=False),
    Check("prediction-per-example", "predictions do not depend on how batches are cut", guarded(prediction_per_example), waivable=False),
    Check("no-host-state-in-predict", "predict leaves parameters, buffers, modes and grads as they were", guarded(no_state_in_predict)),
    Check("permuted-labels", "training on permuted labels gives chance", guarded(permuted_labels), quick=False, waivable=False),
]
