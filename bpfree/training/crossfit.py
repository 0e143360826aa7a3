"""Calibration of a rule without a validation split: on training examples, each held out of a training of its own (cross-fitting).

The training examples are divided into K parts. For each part the rule is trained once more, from the same beginning, on all others, and
calibrates itself on the part, which it has not seen. What it chooses is the mean over the parts, weighted by their examples: of a mean
squared error, such as a residual variance, that is the mean over all training examples, each predicted out of sample.

The K rules have learned from fewer examples than the one that is tested, so that errors are rather a little too large than too small.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bpfree import seeds
from bpfree.errors import BpfreeError, UsageError
from bpfree.rule import Rule
from bpfree.run import Run
from bpfree.tasks.task import Task, folds
from bpfree.training.calibration import Calibration, calibrate, calibrates
from bpfree.training.config import TrainConfig
from bpfree.training.setup import Setup

__all__ = ["check_folds", "cross_fitted"]

logger = logging.getLogger("bpfree")


def check_folds(rule: Rule, task: Task, config: TrainConfig, processes: int) -> None:
    """Refuse cross-fitting where there is nothing to calibrate, or another way to do it.

    Raises:
        UsageError: the rule does not calibrate itself, there is a validation split, or the run is a stream or of several processes.
    """
    count, where = config.calibration.folds, "calibration.folds"
    if not count:
        return
    if not calibrates(rule):
        what = f"{type(rule).__name__} calibrates nothing on task {task.spec.name}"
        raise UsageError(what, where=where, fix="leave it out")
    if task.validation is not None:
        fix = "task.validation=0, which trains on all examples; or leave it out"
        raise UsageError("the rule calibrates itself on the validation split, so there is nothing to cross-fit", where=where, fix=fix)
    if task.stages or processes > 1:
        what = f"{'a stream' if task.stages else 'a run of several processes'} is not cross-fitted"
        raise UsageError(what, where=where, fix="task.validation=0.1, which holds examples out")
    folds(task.train, count, config.seed)


def cross_fitted(setup: Setup, *, step: int) -> Calibration:
    """Calibrate the run's rule on all training examples, each held out of a training of its own.

    Args:
        setup: of the run, with ``again``.
        step: of the run.

    Returns:
        The calibration, whose buffers the rule has; ``values`` are means, and ``folds`` and ``operations`` of the further trainings.
    """
    began, config = time.perf_counter(), setup.config
    parts, found = folds(setup.task.train, config.calibration.folds, config.seed), list[tuple[Rule, Calibration]]()
    operations = 0.0
    for number, held in enumerate(parts):
        logger.info("cross-fitting, part %d of %d", number + 1, len(parts))
        rule, run = _without(setup, held)
        operations += run.result.get("train/operations", 0.0)
        seed = seeds.derive_in(config.stream, config.seed, "calibration", number)
        generator = torch.Generator(setup.device).manual_seed(seed)
        data = setup.task.train.subset(held)
        found.append((rule, calibrate(rule, data, generator, step=step, precision=config.precision)))
    shares = [len(held) / len(setup.task.train) for held in parts]
    before, after = _pooled(setup.rule, found, shares)
    Calibration(step, before=before, after=after).put(setup.rule)
    generator = torch.Generator(setup.device).manual_seed(seeds.derive_in(config.stream, config.seed, "calibration", "finish"))
    own = calibrate(setup.rule, setup.task.train, generator, step=step, precision=config.precision, method="finish_calibration")
    values = _means([each.values for _, each in found], shares) | own.values
    values |= {"folds": float(len(parts)), **({"operations": operations} if operations else {})}
    return Calibration(step, time.perf_counter() - began, values, own.before | before, after | own.after)


def _without(setup: Setup, held: Tensor) -> tuple[Rule, Run]:
    """Train from the beginning on the training examples that are not at ``held`` (M,)."""
    assert setup.again is not None
    task = setup.task
    kept = torch.ones(len(task.train), dtype=torch.bool)
    kept[held] = False
    rule, run = setup.again(replace(task, train=task.train.subset(kept.nonzero().flatten()), parts={}, _fingerprint=[]))
    if run.status != "finished":
        what = f"a training without a part of the examples ended as {run.status}: {run.reason}"
        raise BpfreeError(what, where="calibration.folds", fix="calibration.folds=0, or a smaller optimizer.lr")
    return rule, run


def _pooled(rule: Rule, found: Sequence[tuple[Rule, Calibration]], shares: Sequence[float]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the calibrated buffers of the run's rule, and means of those of the others."""
    names = sorted({name for _, each in found for name in each.after})
    own, others = dict(rule.named_buffers()), [dict(each.named_buffers()) for each, _ in found]
    before = {name: own[name].detach().clone() for name in names}
    after = {}
    for name in names:
        mean = torch.stack([share * buffers[name].double() for share, buffers in zip(shares, others, strict=True)]).sum(0)
        after[name] = (mean if own[name].is_floating_point() else mean.round()).to(own[name].dtype)
    return before, after


def _means(values: Sequence[Mapping[str, float]], shares: Sequence[float]) -> dict[str, float]:
    return {name: sum(share * each[name] for share, each in zip(shares, values, strict=True)) for name in values[0]}
