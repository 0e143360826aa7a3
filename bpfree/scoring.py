"""Scoring a saved rule on a split of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bpfree import seeds
from bpfree.config import recipe_of
from bpfree.confusion import ClassScores, Confusion
from bpfree.errors import BpfreeError, UsageError
from bpfree.leaves import Leaf, names_code
from bpfree.metric import LOSS, Metric
from bpfree.plugins import Plugins
from bpfree.recipe import changed
from bpfree.rule import Rule
from bpfree.saved import load
from bpfree.tasks.check import check_split
from bpfree.tasks.loading import Loader
from bpfree.tasks.protocols import EvaluationProtocol
from bpfree.tasks.task import Split
from bpfree.training.checkpoint import find_checkpoint, read_checkpoint
from bpfree.training.config import TrainConfig
from bpfree.training.environment import autocast, flushing_denormals
from bpfree.training.evaluation import (
    check_protocols,
    evaluate,
    evaluate_features,
    evaluate_samples,
    flat_features,
    sampled_by,
    scored_by,
    setting_of,
)
from bpfree.training.features import feature_split
from bpfree.training.guards import only_read

__all__ = ["Scored", "score"]

OF_TRAINING = (
    *("accumulate.", "batch_size.", "budget.", "clip.", "evaluation.every.", "twin.", "optimizer."),
    *("schedule.", "select.", *(f"task.{name}." for name in ("augment", "class_weights", "mean", "normalise", "sampling", "std"))),
)
"""Beginnings of keys that say how a rule was trained."""


class Scored(NamedTuple):
    """The scores of a saved rule on a split.

    Attributes:
        about: checkpoint, rule, task, split, number of examples.
        values: by metric, as logged: shares from 0 to 1.
        metrics: the rule's predictions were scored by, by name, first the primary one.
        classes: counts and scores of each class or label; ``None`` for other targets.
    """

    about: dict[str, str | int]
    values: dict[str, float]
    metrics: dict[str, Metric]
    classes: ClassScores | None = None


@flushing_denormals()
def score(
    place: str, changes: Sequence[Leaf] = (), *, split: str = "validation", output: str = "runs", registry: Plugins | None = None
) -> Scored:
    """Score a saved rule on the ``validation``, ``test`` or ``train`` split.

    Args:
        place: a run's folder, its name under ``output``, or a checkpoint file.
        changes: of the run's configuration, such as another task.
        split: which examples.
        output: folder of runs.
        registry: of names; the installed plugins by default.

    Returns:
        What was scored, and by what; also by ``evaluation.protocols``, which are fitted to the features of the task's training split.

    Raises:
        BpfreeError: no such checkpoint, a task that it does not fit, or a split that the task does not have.
    """
    path = find_checkpoint(place, output=output, prefer="selected")
    content = read_checkpoint(path)
    recipe = recipe_of(content["config"], changes, where=str(path), registry=registry)
    moved = [leaf for leaf in changes if names_code(leaf)]
    before = recipe_of(content["config"], moved, where=str(path), registry=registry)
    idle = [key for key in changed(before, recipe) if f"{key}.".startswith(OF_TRAINING)]
    if idle:
        raise UsageError("these settings are of training, and would not change the score", where=", ".join(idle), fix="leave them out")
    spec = recipe.spec()
    if tuple(spec.input_shape) != tuple(content["task"]["input_shape"]) or spec.outputs != content["task"]["outputs"]:
        trained = content["task"]
        raise BpfreeError(
            f"the checkpoint was trained on {trained['name']}: inputs {tuple(trained['input_shape'])}, {trained['outputs']} outputs",
            where=f"task={spec.name} has inputs {tuple(spec.input_shape)} and {spec.outputs} outputs",
            fix="choose a task of the same shape",
        )
    saved = load(path, device=recipe.settings.device, changes=changes, registry=registry)
    device = saved.device
    rule = saved.rule
    task = recipe.build_task()
    examples = getattr(task, split)
    if examples is None:
        raise UsageError("the task has no validation split (task.validation=0)", fix="use --split test or --split train")
    check_split(saved.spec, examples, split)
    config = recipe.settings.evaluation
    protocols = check_protocols(config.protocols, rule)
    # Normalised as in training: a checkpoint is the same function on every task.
    options: dict[str, Any] = {"batch_size": config.batch_size, "device": device, "dtype": rule.network.dtype}
    loader = Loader(examples, saved.spec, **options)
    generator = torch.Generator(device).manual_seed(seeds.derive_in(recipe.settings.stream, recipe.settings.seed, "evaluation", "score"))
    metrics, confusion = scored_by(saved.spec, config.metrics), Confusion(saved.spec)
    with only_read(rule, "predict", "alternatives", "effort", "sample"), autocast(device, recipe.settings.precision):
        further = [metric for metric in metrics if metric.name != LOSS.name]
        known: dict[str, Any] = {"spec": saved.spec, "metrics": further, "alternatives": config.alternatives}
        scores = evaluate(rule, loader, generator, draws=config.draws or rule.draws, keep=confusion, **known)
        sampled = [] if rule.cannot_sample() else sampled_by(rule, config.metrics)
        if sampled:
            scores |= evaluate_samples(rule, loader, generator, sampled, draws=config.samples, spec=saved.spec)
    if protocols:
        train = loader if split == "train" else Loader(task.train, saved.spec, **options)
        held = loader if split == "validation" else None
        if held is None and task.validation is not None:
            held = Loader(task.validation, saved.spec, **options)
        with only_read(rule, "features"):
            scores |= _score_features(rule, protocols, train, loader, held, recipe.settings, path.parent)
    about: dict[str, str | int] = {
        "checkpoint": str(path),
        "rule": recipe.names["rule"],
        "task": task.spec.name,
        "split": split,
        "examples": len(examples),
    }
    return Scored(about, scores, {metric.name: metric for metric in (*metrics, *sampled)}, confusion.scores())


def _score_features(
    rule: Rule,
    protocols: Mapping[str, EvaluationProtocol],
    train: Loader,
    scored: Loader,
    validation: Loader | None,
    settings: TrainConfig,
    folder: Path,
) -> dict[str, float]:
    """Score protocols (``linear_probe/accuracy`` and so on) that fit on one split, choose by another, and score a third or the same."""
    known: dict[int, Split] = {}

    def compute(batches: Loader) -> Split:
        if id(batches) not in known:
            known[id(batches)] = flat_features(feature_split(rule, batches, precision=settings.precision, folder=folder))
        return known[id(batches)]

    fitted, splits, held = compute(train), {"": compute(scored)}, None if validation is None else compute(validation)
    result: dict[str, float] = {}
    for name, protocol in protocols.items():
        setting = setting_of(name, rule.spec, settings.seed, scored.device)
        result |= evaluate_features(name, protocol, fitted, splits, setting, held)
    return result
