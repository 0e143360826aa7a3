"""The floor of a comparison: how far a converged linear readout gets without any learned feature.

It reads the standardised inputs, the output of each block of the untrained network, and all of these together. Each is solved to a
gradient below 1e-4 (:mod:`bpfree.tasks.linear`) on the training split of the rows that it stands beside. The penalty, and which of the
sources is the floor, are chosen by the mean over seeds on validation; the chosen one is tested once.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from bpfree.errors import UsageError
from bpfree.network.network import evaluating
from bpfree.network.statistics import cumulative_statistics
from bpfree.rule import Rule
from bpfree.tasks.linear import DEFAULT_PENALTY, LinearMap, Readout, choose_penalty, make_readout
from bpfree.tasks.protocols import Setting, fit_nearest_centroid
from bpfree.tasks.task import Examples, Split, Task

__all__ = ["ALL", "INPUTS", "Floor", "Reading", "chance_of", "fill_statistics", "measure_floor", "read_inputs"]

INPUTS, ALL = "inputs", "inputs and all blocks"
"""Names of the sources that are not blocks."""
MOST_NUMBERS = 2**28
"""Entries of one source's features of the training split (1 GiB): larger ones are not read, and the floor is reported as "at least". For
real targets their products with each other may not be more either."""
BATCH = 256

Look = Callable[[str], None]


@dataclass(frozen=True)
class Reading:
    """Scores of a converged readout of one source.

    Attributes:
        source: ``inputs``, a block's name, or all of them together.
        penalty: of its weights.
        validation: score of each seed, greater is better: accuracy (0 to 1), or minus the loss; empty without a validation split.
        test: scores on the test split; empty where it was not tested.
        examples: per seed, of each test example: whether it is right (0 or 1), or its loss.
        gradient: the largest entry that a solution was left with.
    """

    source: str
    penalty: float
    validation: tuple[float, ...] = ()
    test: tuple[float, ...] = ()
    examples: tuple[Tensor, ...] = field(default=(), repr=False, compare=False)
    gradient: float = 0.0

    @property
    def rank(self) -> float:
        """Mean score on validation; minus infinity without one."""
        return statistics.fmean(self.validation) if self.validation else -math.inf


@dataclass(frozen=True)
class Floor:
    """The floor of rows that share a task and a network.

    Attributes:
        best: the reading that is the floor.
        readings: all of them, in the order inputs, blocks, all together; only the inputs' and the best are tested.
        skipped: sources that are too large to be read: then the floor is at least ``best``.
        real: whether scores are minus a loss.
        chosen: whether there was a validation split to choose by; otherwise penalty and source are defaults.
    """

    best: Reading
    readings: tuple[Reading, ...]
    skipped: tuple[str, ...] = ()
    real: bool = False
    chosen: bool = True

    @property
    def name(self) -> str:
        """Name of the source that the floor reads."""
        return self.best.source

    @property
    def linear(self) -> Reading:
        """The reading of the inputs alone."""
        return self.readings[0]

    @property
    def test(self) -> tuple[float, ...]:
        """The floor's test scores by seed."""
        return self.best.test


# --- features -------------------------------------------------------------------------------------------------------


def _pieces(split: Split) -> Iterator[Tensor]:
    """Yield indices in pieces whose sizes differ by at most one; no piece is a single example unless the split is."""
    return iter(torch.arange(len(split)).tensor_split(-(-len(split) // BATCH)))


def tensors_of(split: Examples, task: Task) -> Split:
    """Return a split whose inputs a linear map can read.

    Raises:
        UsageError: its inputs are no single tensor of real numbers, or its targets are none that a linear map reads.
    """
    if not isinstance(split, Split) or not task.spec.takes_real_tensors:
        what = "the floor is that of a linear readout of inputs that are one tensor of real numbers"
        raise UsageError(what, where=f"task {task.spec.name}", fix="floor: false")
    return split


def _inputs(rule: Rule, raw: Tensor, device: torch.device) -> Tensor:
    """Prepare inputs as in training: normalised, and of the network's dtype."""
    inputs: Tensor = rule.spec.normalise(raw.to(device))
    return inputs.to(rule.network.dtype)


@torch.no_grad()
def fill_statistics(rule: Rule, train: Split, device: torch.device) -> None:
    """Fill the running statistics of an untrained network by one pass over the training inputs, without labels."""
    with evaluating(rule), cumulative_statistics(rule) as any_norm:
        for piece in _pieces(train) if any_norm else ():
            rule.representations(_inputs(rule, train.inputs[piece], device))


@torch.no_grad()
def _represent(rule: Rule, split: Split, device: torch.device, source: str) -> Split:
    """Return one source of an untrained rule as features (N, F)."""
    parts = []
    with evaluating(rule):
        for piece in _pieces(split):
            inputs = _inputs(rule, split.inputs[piece], device)
            found = rule.representations(inputs) if source != INPUTS else {}
            chosen = [inputs, *found.values()] if source == ALL else [inputs if source == INPUTS else found[source]]
            parts.append(torch.cat([part.flatten(1).float() for part in chosen], dim=1).cpu())
    return Split(torch.cat(parts), split.targets)


@torch.no_grad()
def _sizes(rule: Rule, split: Split, device: torch.device) -> dict[str, int]:
    """Return the number of features of each source of a rule except its inputs."""
    with evaluating(rule):
        found = rule.representations(_inputs(rule, split.inputs[:2], device))
    sizes = {name: part.flatten(1).shape[1] for name, part in found.items()}
    return {**sizes, ALL: math.prod(split.inputs.shape[1:]) + sum(sizes.values())} if sizes else {}


# --- reading --------------------------------------------------------------------------------------------------------


class _Source:
    """Readouts of one source, one for each seed, which share their penalty."""

    def __init__(self, name: str, task: Task, features: Sequence[Callable[[Split], Split]], device: torch.device) -> None:
        spec = task.spec
        self.name, self.task, self.features = name, task, features
        train, held = tensors_of(task.train, task), task.validation
        self.readouts: list[Readout] = [make_readout(of(train), spec.targets, spec.outputs, device) for of in features]
        self.held = None if held is None else [of(tensors_of(held, task)) for of in features]
        self.fitted: dict[float, list[LinearMap]] = {}
        self.scores: dict[float, tuple[float, ...]] = {}

    def fit(self, penalty: float) -> float:
        """Solve for a penalty, and return the mean score on validation."""
        self.fitted[penalty] = [readout.fit(penalty) for readout in self.readouts]
        if self.held is None:
            return 0.0
        pairs = zip(self.readouts, self.fitted[penalty], self.held, strict=True)
        self.scores[penalty] = tuple(readout.score(fitted, held) for readout, fitted, held in pairs)
        return statistics.fmean(self.scores[penalty])

    def read(self) -> Reading:
        """Choose the penalty, and return the scores that it reaches."""
        penalty = DEFAULT_PENALTY if self.held is None else choose_penalty(self.fit).penalty
        if penalty not in self.fitted:
            self.fit(penalty)
        worst = max(readout.worst for readout in self.readouts)
        return Reading(self.name, penalty, self.scores.get(penalty, ()), gradient=worst)

    def tested(self, reading: Reading, test: Split) -> Reading:
        """Score the chosen solutions on the test split."""
        scores, examples = [], []
        for readout, fitted, of in zip(self.readouts, self.fitted[reading.penalty], self.features, strict=True):
            split = of(test)
            scores.append(readout.score(fitted, split))
            examples.append(fitted.losses(split) if self.task.spec.targets == "real" else fitted.correct(split).to(torch.uint8))
        return Reading(reading.source, reading.penalty, reading.validation, tuple(scores), tuple(examples), reading.gradient)


def read_inputs(task: Task, seeds: int, device: torch.device | None = None, *, test: bool = True) -> Reading:
    """Read the standardised inputs, which are the same for every seed.

    Args:
        task: classes, soft labels or real targets.
        seeds: how often the result is repeated.
        device: where to compute; the CPU by default.
        test: whether the test split is scored.
    """
    device = device or torch.device("cpu")

    def features(split: Split) -> Split:
        return Split(task.spec.normalise(split.inputs).flatten(1).cpu(), split.targets)

    source = _Source(INPUTS, task, [features], device)
    reading = source.read()
    once = source.tested(reading, tensors_of(task.test, task)) if test else reading
    return Reading(INPUTS, once.penalty, once.validation * seeds, once.test * seeds, once.examples * seeds, once.gradient)


def measure_floor(
    task: Task,
    rules: Sequence[Rule],
    *,
    device: torch.device | None = None,
    inputs: Reading | None = None,
    test: bool = True,
    look: Look = lambda text: None,
) -> Floor:
    """Measure the floor of a network on a task.

    Args:
        task: classes, soft labels or real targets.
        rules: the untrained network, in a rule for each seed; the running statistics of their norms are filled here.
        device: where to compute; the CPU by default.
        inputs: the reading of the inputs, where it is known.
        test: whether the test split is scored.
        look: called with the name of each source before it is read.

    Returns:
        The best on validation of the inputs, each block and all together; without a validation split all together with the default
        penalty, or the inputs where that has too many features: a block of a deep network may be far below them.
    """
    device, train = device or torch.device("cpu"), tensors_of(task.train, task)
    look(INPUTS)
    readings = [inputs or read_inputs(task, len(rules), device, test=test)]
    best, kept, skipped = 0, None, list[str]()
    for rule in rules:
        fill_statistics(rule.to(device), train, device)
    for name, size in _sizes(rules[0], train, device).items():
        if size * (max(size, len(task.train)) if task.spec.targets == "real" else len(task.train)) > MOST_NUMBERS:
            skipped.append(f"{name} ({size:,} features)")
            continue
        look(name)
        source = _Source(name, task, [partial(_represent, rule, device=device, source=name) for rule in rules], device)
        readings.append(source.read())
        if name == ALL if task.validation is None else readings[-1].rank > readings[best].rank:
            best, kept = len(readings) - 1, source
    if kept is not None and test:
        readings[best] = kept.tested(readings[best], tensors_of(task.test, task))
    return Floor(readings[best], tuple(readings), tuple(skipped), task.spec.targets == "real", task.validation is not None)


def chance_of(task: Task) -> float | None:
    """Return the accuracy of guessing: the larger of one over the number of classes and the largest class's share of the test split.

    ``None`` for real targets.
    """
    if task.spec.targets == "real" or task.test.targets is None:
        return None
    classes = task.test.targets if task.test.targets.dim() == 1 else task.test.targets.argmax(1)
    return max(1 / task.spec.outputs, float(classes.bincount().max()) / len(classes))


def nearest_mean(task: Task, device: torch.device | None = None) -> float | None:
    """Return the test accuracy of the class whose mean of the inputs is nearest; ``None`` for other targets than classes."""
    if task.spec.targets != "classes":
        return None
    device = device or torch.device("cpu")

    def flat(split: Split) -> Split:
        return Split(task.spec.normalise(split.inputs).flatten(1).cpu(), split.targets)

    return fit_nearest_centroid(flat(tensors_of(task.train, task)), Setting(task.spec.outputs, 0, device))(
        flat(tensors_of(task.test, task))
    )["accuracy"]
