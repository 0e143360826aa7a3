"""Scoring predictions, and features by protocols. The rule's ``predict`` and ``features`` never see a target."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bpfree import devices, seeds
from bpfree.errors import BpfreeError, UsageError
from bpfree.metric import Accumulator, Metric
from bpfree.network.network import evaluating
from bpfree.plugins import installed_plugins
from bpfree.record.folder import RunFolder
from bpfree.rule import Rule
from bpfree.step import Batch, Stage
from bpfree.tasks import metrics as built_in
from bpfree.tasks.linear import chunks, classes_of
from bpfree.tasks.loading import Loader, Resident
from bpfree.tasks.protocols import EvaluationProtocol, Setting, result_key
from bpfree.tasks.task import Examples, Split, Task, TaskSpec
from bpfree.training import environment
from bpfree.training.features import feature_loader, feature_split
from bpfree.training.predictions import Array, Collector, Predictions, write_predictions
from bpfree.training.setup import Setup

__all__ = [
    "Evaluator",
    "check_metrics",
    "check_protocols",
    "evaluate",
    "evaluate_features",
    "evaluate_samples",
    "flat_features",
    "sampled_by",
    "scored_by",
    "training_sample",
]

logger = logging.getLogger("bpfree")

NOT_FINITE = "not finite"

TRAIN_SAMPLE = 5000
"""Training examples that are scored where there is no validation split to take the number from."""


class Evaluator:
    """The evaluations of a run: training sample and validation split after epochs, the test split once.

    Its noise is a pure function of (seed, stream, split, epoch), so that evaluating changes nothing in training.

    Args:
        setup: the run's.
        look: called before each batch with the share of its split that is scored; what it raises ends the evaluation.

    Attributes:
        predictions: for each example of the test split, once it was scored, and where they can be had.
    """

    def __init__(self, setup: Setup, look: Callable[[float], None] = lambda share: None) -> None:
        self._look = look
        self._setup, self._rule, self._task, self._config, self._device = setup, setup.rule, setup.task, setup.config, setup.device
        task, config = setup.task, setup.config
        self._sample = training_sample(task)
        self._splits = {"train": task.train.subset(self._sample), "val": task.validation}
        self._protocols = check_protocols(config.evaluation.protocols, setup.rule)
        self._metrics = [metric for metric in scored_by(task.spec, config.evaluation.metrics) if metric.name != built_in.LOSS.name]
        self._loaders: dict[str, Loader] = {}
        self._features: dict[str, Loader] = {}
        self.predictions: Predictions | None = None

    def begin_stage(self, stage: Stage, seen: Sequence[Stage]) -> None:
        """Validate on what a stream has shown so far: training examples of this stage, and validation examples of all stages so far."""
        task = self._task
        if stage.train is not None:
            self._sample = stage.train[
                torch.randperm(len(stage.train), generator=torch.Generator().manual_seed(seeds.derive("train sample")))
            ]
            held = [each.validation for each in seen if each.validation is not None]
            self._sample = self._sample[: sum(map(len, held)) or TRAIN_SAMPLE]
            self._splits = {
                "train": task.train.subset(self._sample),
                "val": task.validation.subset(torch.cat(held)) if task.validation is not None and held else None,
            }
            self._loaders = {}

    def score_stages(self, seen: Sequence[Stage]) -> dict[str, list[float]]:
        """Score each stage seen so far by the primary metric, on validation, and on the test split if the run may use it."""
        name, found = self._task.spec.primary.name, dict[str, list[float]]()
        for split, examples in {"val": self._task.validation, "test": self._task.test if self._config.evaluation.test else None}.items():
            places = [stage.test if split == "test" else stage.validation for stage in seen]
            if examples is None or any(each is None or not len(each) for each in places):
                continue
            scored = [
                self._score(f"{split} of {stage.name}", examples.subset(each), seen[-1].index)
                for stage, each in zip(seen, places, strict=True)
                if each is not None
            ]
            found[split] = [next((value for key, value in each.items() if key.endswith(f"/{name}")), math.nan) for each in scored]
        return found

    def raw(self, split: Examples, share: Resident | None = None) -> Loader:
        """Make batches of a split in its original order."""
        return self._setup.batches(split, self._config.evaluation.batch_size, share=share)

    def _loader(self, name: str, split: Examples) -> Loader:
        if name not in self._loaders:
            self._loaders[name] = self.raw(split)
        return self._loaders[name]

    def take_features(self, train: Split, compute: Callable[[Loader], Split]) -> None:
        """Validate on features from now on: of the training split, and of the validation split as ``compute`` gives them."""
        size = self._config.evaluation.batch_size
        splits = {"train": train.subset(self._sample)}
        if self._task.validation is not None:
            splits["val"] = compute(self.raw(self._task.validation))
        self._features = {
            name: feature_loader(split, self._task.spec, batch_size=size, device=self._device) for name, split in splits.items()
        }

    def drop_features(self) -> None:
        """Validate on raw inputs again."""
        self._features = {}

    def _score(
        self,
        name: str,
        split: Examples | None,
        epoch: int,
        *,
        draws: int = 1,
        alternatives: bool = False,
        each_draw: bool = False,
        keep: Collector | None = None,
    ) -> dict[str, float]:
        if split is None:
            return {}
        read = name in self._features
        batches = self._features[name] if read else self._loader(name, split)
        seed = seeds.derive_in(self._config.stream, self._config.seed, "evaluation", name, epoch)
        generator = torch.Generator(self._device).manual_seed(seed)
        with environment.autocast(self._device, self._config.precision):
            further = {"alternatives": alternatives and not read, "on_features": read, "each_draw": each_draw}
            watched = _Watched(batches, self._look)
            known: dict[str, Any] = {"spec": self._task.spec, "metrics": self._metrics, **further}
            scores = evaluate(self._rule, watched, generator, draws=draws, keep=keep, **known)
        return {f"{name}/{key}": value for key, value in scores.items()}

    def validate(self, epoch: int) -> dict[str, float]:
        """Score a fixed sample of the training split (``train/loss`` and so on) and the validation split (``val/...``)."""
        with self._rule.quick_predictions():
            train = self._score("train", self._splits["train"], epoch)
            return train | self._score("val", self._splits["val"], epoch, alternatives=self._config.evaluation.alternatives)

    def test(self) -> dict[str, float]:
        """Score the test split: means over the draws of a stochastic rule, and each draw's primary metric (``test/accuracy_draw_1``).

        Nothing where the test split is not to be seen.
        """
        if not self._config.evaluation.test:
            return {}
        draws, alternatives = self._config.evaluation.draws or self._rule.draws, self._config.evaluation.alternatives
        kept = Collector(self._task.spec)
        scores = self._score("test", self._task.test, 0, draws=draws, alternatives=alternatives, each_draw=True, keep=kept)
        scores |= self._sampled()
        counted = not self._task.spec.metrics() or f"test/{self._task.spec.primary.name}" in scores
        self.predictions = kept.predictions() if counted else None  # scores that are no numbers say nothing of their examples
        return scores

    def _sampled(self) -> dict[str, float]:
        """Score the distribution of real targets that the rule predicts for the test split, if it has one."""
        metrics = sampled_by(self._rule, self._config.evaluation.metrics)
        if metrics and (why_not := self._rule.cannot_sample()):
            logger.warning("no interval is measured: %s", why_not)
            return {}
        if not metrics:
            return {}
        seed = seeds.derive_in(self._config.stream, self._config.seed, "evaluation", "samples")
        generator, batches = torch.Generator(self._device).manual_seed(seed), _Watched(self._loader("test", self._task.test), self._look)
        with environment.autocast(self._device, self._config.precision):
            scores = evaluate_samples(self._rule, batches, generator, metrics, draws=self._config.evaluation.samples, spec=self._task.spec)
        return {f"test/{key}": value for key, value in scores.items()}

    def keep_predictions(self) -> None:
        """Write the predictions into the run's folder, if it has one; a failure to write does not end the run."""
        folder = self._setup.run.folder
        if folder is None or self.predictions is None:
            return
        try:
            write_predictions(RunFolder(folder).predictions, self.predictions)
        except OSError as error:
            logger.warning("the predictions for the test split could not be written: %s", error)

    def try_protocols(self) -> None:
        """Refuse a rule without features before it is trained.

        Raises:
            UsageError: protocols are to score its features, and it gives none.
        """
        if self._protocols:
            few = self._task.train.subset(torch.arange(min(2, len(self._task.train))))
            try_features(self._rule, self.raw(few), self._config.precision)

    def protocols(self, compute: Callable[[Loader], Split], train: Resident | None = None) -> dict[str, float]:
        """Return what the configured protocols measure of the features: ``test/linear_probe/accuracy``, ``val/...`` and so on.

        Of the test split only where that is to be seen.

        A trained rule is worth more than a number about it: what fails here is left blank, with a warning.

        Args:
            compute: gives a split's features; what it raises ends the evaluation.
            train: the training split on the device, if it is there already.
        """
        splits = {"val": self._task.validation, "test": self._task.test if self._config.evaluation.test else None}
        if not self._protocols or all(split is None for split in splits.values()):
            return {}
        result: dict[str, float] = {}
        correct: dict[str, Array] = {}
        try:
            fitted = flat_features(compute(self.raw(self._task.train, train)))
            loaders = {f"{name}/": self._loader(name, split) for name, split in splits.items() if split is not None}
            features = {prefix: flat_features(compute(loader)) for prefix, loader in loaders.items()}
        except Exception as error:
            _warn(f"evaluation.protocols={list(self._protocols)}", error)
            return {}
        for name, protocol in self._protocols.items():
            try:
                setting = setting_of(name, self._task.spec, self._config.seed, self._device)
                result |= evaluate_features(name, protocol, fitted, features, setting, features.get("val/"), correct=correct)
            except Exception as error:
                _warn(f"the protocol {name!r}", error)
        if self.predictions is not None:
            self.predictions = replace(self.predictions, protocols=correct)
        return result


@dataclass(frozen=True)
class _Watched:
    """Batches, with a call before each."""

    batches: Loader
    look: Callable[[float], None]

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(self.batches):
            self.look(number / len(self.batches))
            yield batch


def _warn(what: str, error: Exception) -> None:
    reason = str(error) if isinstance(error, BpfreeError) else f"{type(error).__name__}: {error}"
    logger.warning("skipping %s: %s", what, reason)


def training_sample(task: Task) -> Tensor:
    """Choose the training examples that are scored after epochs: positions (M,), as many as the validation split has."""
    count = len(task.validation) if task.validation is not None else TRAIN_SAMPLE
    return torch.randperm(len(task.train), generator=torch.Generator().manual_seed(seeds.derive("train sample")))[:count]


def scored_by(spec: TaskSpec, further: Iterable[str]) -> list[Metric]:
    """List the metrics that score a run's predictions: the primary one, the task's others, the loss, and further ones by name.

    Raises:
        UsageError: as of ``check_metrics``.
    """
    named = [metric for metric in check_metrics(further, spec) if not metric.of_samples]
    return [*spec.metrics(), *([built_in.LOSS] if spec.is_scored else []), *named]


def sampled_by(rule: Rule, further: Iterable[str]) -> list[Metric]:
    """List the metrics of the distribution that a rule predicts, perhaps once it is calibrated: those always measured, and named ones.

    Raises:
        UsageError: as of ``check_metrics``; or one was named, and the rule has no distribution.
    """
    named = [metric for metric in check_metrics(further, rule.spec) if metric.of_samples]
    if type(rule).sample is Rule.sample or rule.spec.targets != "real":
        if named:
            what = f"the metric {named[0].name} is of the distribution that a rule predicts: {rule.cannot_sample()}"
            raise UsageError(what, where="evaluation.metrics", fix="leave it out: it is measured wherever there is a distribution")
        return []
    return list({metric.name: metric for metric in (*built_in.SAMPLED.values(), *named)}.values())


def check_metrics(names: Iterable[str], spec: TaskSpec) -> list[Metric]:
    """Return the registered metrics of these names, if they can measure this task, without those that the task has anyway.

    Raises:
        UsageError: an unknown name, or a metric of other targets.
    """
    where, own = "evaluation.metrics", {metric.name for metric in spec.metrics()} | {built_in.LOSS.name}
    found: list[Metric] = []
    for name in names:
        metric: Metric = installed_plugins().get("metrics", name, where=where)
        if metric.kinds and spec.targets not in metric.kinds:
            raise UsageError(
                f"the metric {name} is of {' or '.join(metric.kinds)}, but task {spec.name!r} has {spec.targets!r} targets",
                where=where,
                fix=f"leave {name} out of {where}",
            )
        if metric.name not in own:
            found.append(metric)
            own.add(metric.name)
    return found


def check_protocols(names: Iterable[str], rule: Rule) -> dict[str, EvaluationProtocol]:
    """Return the protocols of these names, if they can work with this rule and its task.

    Raises:
        UsageError: an unknown name, targets other than classes, or a rule that does not define its features.
    """
    where = "evaluation.protocols"
    found: dict[str, EvaluationProtocol] = {name: installed_plugins().get("protocols", name, where=where) for name in names}
    spec = rule.spec
    for name, protocol in found.items():
        if spec.targets not in protocol.kinds:
            raise UsageError(
                f"the protocol {name} scores {' or '.join(protocol.kinds)}, but task {spec.name!r} has {spec.targets!r} targets",
                where=where,
                fix=f"leave {name} out of {where}",
            )
    if found and not rule.network.chain and type(rule).features is Rule.features:
        raise UsageError(
            f"{type(rule).__name__} gives no features: its network is no chain of blocks",
            where=where,
            fix=f"{where}=[], or override features",
        )
    return found


def try_features(rule: Rule, batches: Loader, precision: str) -> None:
    """Compute a few features, to refuse a rule without any before training; random states are restored.

    Raises:
        UsageError: it gives none.
    """
    try:
        with devices.preserved_global_state(batches.device):
            feature_split(rule, batches, precision=precision).inputs.reshape(len(batches.split), -1)
    except Exception as error:
        raise UsageError(
            f"{type(rule).__name__} gives no features that evaluation protocols can score: {type(error).__name__}: {error}",
            where="evaluation.protocols",
            fix="evaluation.protocols=[], or correct the rule's features",
        ) from error


def flat_features(split: Split) -> Split:
    """Return a split of features (N, ...) as protocols take it, (N, F), without a copy.

    Raises:
        BpfreeError: a feature is not finite.
    """
    inputs = split.inputs.reshape(len(split), -1).float()
    if not all(bool(rows.isfinite().all()) for _, rows in chunks(inputs, inputs.device)):
        raise BpfreeError("features are not finite")
    return Split(inputs, split.targets)


def setting_of(name: str, spec: TaskSpec, seed: int, device: torch.device) -> Setting:
    """Make the setting that a protocol gets with the features."""
    return Setting(spec.outputs, seeds.derive(seed, "protocol", name), device, spec.targets)


def evaluate_features(
    name: str,
    protocol: EvaluationProtocol,
    train: Split,
    splits: Mapping[str, Split],
    setting: Setting,
    validation: Split | None,
    *,
    correct: dict[str, Array] | None = None,
) -> dict[str, float]:
    """Fit a protocol to the training split's features, and score those of other splits.

    Args:
        name: of the protocol.
        protocol: what to fit.
        train: of features, as ``flat_features`` gives them.
        splits: by the prefix of their metrics, such as ``test/``.
        setting: what the protocol gets beside the features.
        validation: what it may choose by.
        correct: takes up which examples of ``test/`` are classified right (N,), uint8, of a protocol that decides one by one
            (its score has ``decide``, as :class:`~bpfree.tasks.linear.LinearMap` has).

    Returns:
        ``test/linear_probe/accuracy`` and so on, what was chosen, as ``linear_probe/penalty``, and the floating-point operations of
        the fit, as ``linear_probe/operations``, where the protocol reports them.
    """
    key = result_key(name)
    score = protocol.fit(train, setting, validation)
    result = {f"{key}/{thing}": float(value) for thing, value in getattr(score, "chosen", {}).items()}
    operations = getattr(score, "operations", 0)
    result |= {f"{key}/operations": float(operations)} if operations else {}
    decide = getattr(score, "decide", None)
    if correct is not None and decide is not None and "test/" in splits and setting.targets != "real":
        correct[key] = (decide(splits["test/"].inputs).cpu() == classes_of(splits["test/"])).to(torch.uint8).numpy()
    return result | {f"{prefix}{key}/{metric}": float(value) for prefix, split in splits.items() for metric, value in score(split).items()}


@torch.no_grad()
def evaluate(
    rule: Rule,
    batches: Iterable[Batch],
    generator: torch.Generator,
    *,
    spec: TaskSpec | None = None,
    metrics: Sequence[Metric] | None = None,
    draws: int = 1,
    alternatives: bool = False,
    on_features: bool = False,
    each_draw: bool = False,
    keep: Collector | None = None,
) -> dict[str, float]:
    """Score all examples: the task's loss, and its metrics.

    Args:
        rule: in whatever mode; it predicts in eval mode and gets its own mode back.
        batches: an iterable that can be gone through ``draws`` times.
        generator: of a stochastic predictor.
        spec: the task's, by which predictions are scored; the rule's by default, which the rule may have changed.
        metrics: beside the loss; ``None``: the task's.
        draws: passes to average over; of several, the standard error of the primary metric is reported as ``accuracy_se``.
        alternatives: also score ``rule.alternatives`` by the primary metric, as ``<name>/accuracy``; and the means of ``rule.effort``.
        on_features: the batches hold the rule's features in place of its inputs.
        each_draw: also report the primary metric of each of several draws, as ``accuracy_draw_1`` and so on.
        keep: takes up what is predicted for each example.

    Returns:
        ``loss``, ``accuracy`` (shares from 0 to 1) and so on, by the metrics' names. Where an output is NaN or infinite there is only
        the loss, and a warning says so.
    """
    spec = rule.spec if spec is None else spec
    chosen = tuple(spec.metrics() if metrics is None else metrics)
    with evaluating(rule):
        predict = rule.read if on_features else rule.predict
        rounds = [
            _Pass(rule, spec, predict, chosen, keep).scores(batches, generator, alternatives and index == 0) for index in range(draws)
        ]
    _drop_what_is_not_finite(rounds)
    result = {name: statistics.fmean(r[name] for r in rounds if name in r) for name in rounds[0]}
    name = spec.primary.name
    if draws > 1 and name in result:
        result[f"{name}_se"] = statistics.stdev(r[name] for r in rounds) / draws**0.5
        if each_draw:
            result.update({f"{name}_draw_{number}": r[name] for number, r in enumerate(rounds, start=1)})
    return result


@torch.no_grad()
def evaluate_samples(
    rule: Rule, batches: Iterable[Batch], generator: torch.Generator, metrics: Sequence[Metric], *, draws: int, spec: TaskSpec
) -> dict[str, float]:
    """Score the distribution of real targets that a rule predicts, by draws from it.

    Args:
        rule: in whatever mode; it draws in eval mode.
        batches: of the split.
        generator: of the draws.
        metrics: of samples.
        draws: for each example; as predictions that are not final, for which a rule may take fewer steps.
        spec: the task's.

    Returns:
        ``crps``, ``coverage_90`` and so on, by the metrics' names.
    """
    sums = [(metric.name, metric.begin(spec, lambda inputs: inputs)) for metric in metrics if metric.begin is not None]
    with evaluating(rule), rule.quick_predictions():
        for batch in batches:
            drawn = rule.sample(batch.inputs, draws, generator).float()
            for _, accumulator in sums:
                accumulator.add(drawn, batch)
    return {name: accumulator.value() for name, accumulator in sums}


class _Pass:
    """One pass over a split, whose sums stay on the device until its end."""

    def __init__(
        self,
        rule: Rule,
        spec: TaskSpec,
        predict: Callable[[Any, torch.Generator], Tensor],
        metrics: Sequence[Metric],
        keep: Collector | None,
    ) -> None:
        self._rule, self._spec, self._predict, self._metrics, self._keep = rule, spec, predict, metrics, keep
        self._sums: dict[str, Accumulator] = {}
        self._strange: dict[str, Tensor] = {}
        self._efforts: dict[str, Tensor] = {}
        self._examples = 0

    def scores(self, batches: Iterable[Batch], generator: torch.Generator, alternatives: bool) -> dict[str, float]:
        """Score the rule's own prediction by all metrics, its alternatives by the primary one, and what the prediction takes."""
        spec, keep = self._spec, self._keep
        metrics = ([built_in.LOSS] if spec.is_scored else []) + list(self._metrics)
        if not metrics:
            return {}
        if keep is not None:
            keep.begin_draw()
        for batch in batches:
            own = self._predict(batch.inputs, generator)
            if keep is not None:
                keep.add(own, batch)
            self._add("", own, batch, metrics, generator)
            for name, value in self._rule.alternatives(batch.inputs, generator).items() if alternatives and spec.metrics() else ():
                self._add(f"{name}/", value, batch, [spec.primary], generator)
            for name, value in self._rule.effort(batch.inputs, generator).items() if alternatives else ():
                total = devices.summed(value)
                self._efforts[name] = self._efforts[name] + total if name in self._efforts else total
            self._examples += len(batch)
        found = {name: accumulator.value() for name, accumulator in self._sums.items()}
        found |= {f"effort/{name}": float(total) / self._examples for name, total in self._efforts.items()}
        return found | {f"{prefix}{NOT_FINITE}": float(total) / self._examples for prefix, total in self._strange.items()}

    def _add(self, prefix: str, outputs: Tensor, batch: Batch, metrics: Sequence[Metric], generator: torch.Generator) -> None:
        for metric in metrics:
            key = prefix + metric.name
            if key not in self._sums:
                assert metric.begin is not None
                self._sums[key] = metric.begin(self._spec, lambda inputs: self._predict(inputs, generator))
            self._sums[key].add(outputs, batch)
        if self._metrics:  # minus infinity is a score: it never wins
            strange = devices.summed((~(outputs < math.inf)).reshape(len(outputs), -1).any(1))
            self._strange[prefix] = self._strange[prefix] + strange if prefix in self._strange else strange


def _drop_what_is_not_finite(rounds: list[dict[str, float]]) -> None:
    """Remove metrics that were computed over outputs that are not finite; the loss shows that itself."""
    for prefix in {key.removesuffix(NOT_FINITE) for key in rounds[0] if key.endswith(NOT_FINITE)}:
        share = max(scores.pop(prefix + NOT_FINITE, 0.0) for scores in rounds)
        if share:
            for scores in rounds:
                for name in [name for name in scores if name.rpartition("/")[0] == prefix.removesuffix("/") and name != "loss"]:
                    del scores[name]
            of = f"of {prefix.removesuffix('/')} " if prefix else ""
            logger.warning("outputs %sare NaN or infinite for %.2f %% of the examples, so they have no score", of, 100 * share)
