"""What a rule learns on the bundled digits, over seeds, beside its floor, its own-prediction twin and back-propagation."""

from __future__ import annotations

import dataclasses
import hashlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from bpfree.baselines import Backprop
from bpfree.certify import training_runs
from bpfree.certify.checks.places import place_of_error
from bpfree.certify.findings import CheckFailed
from bpfree.certify.subject import Subject
from bpfree.errors import BpfreeError, UsageError
from bpfree.rule import Rule
from bpfree.training.floor import Floor, Reading, chance_of, measure_floor, read_inputs

__all__ = ["ERRORS", "NOT_SHOWN", "SEEDS", "FloorScores", "LearningGain", "Lesson", "floor_of", "learn_lesson"]

SEEDS = 5
ERRORS = 2.0
"""Number of standard errors from which a difference counts."""
NOT_SHOWN = "not shown to learn more than its floor on this network"
"""Remark in the certificate of a rule that is not above its floor."""
PROBE = "linear-probe"
PROTOCOLS = "evaluation.protocols"


@dataclass(frozen=True)
class LearningGain:
    """Differences between accuracies, paired by seed.

    Attributes:
        difference: the mean.
        standard_error: of the mean, over seeds, on this test set.
    """

    difference: float
    standard_error: float

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> LearningGain:
        """Pair two lists of accuracies seed by seed."""
        pairs = [a - b for a, b in zip(ours, theirs, strict=True)]
        return cls(round(statistics.fmean(pairs), 4), round(statistics.stdev(pairs) / len(pairs) ** 0.5, 4))

    @property
    def above(self) -> bool:
        """Whether the difference is more than two standard errors."""
        return self.difference > ERRORS * self.standard_error

    @property
    def below(self) -> bool:
        """Whether the difference is less than minus two standard errors."""
        return self.difference < -ERRORS * self.standard_error

    def __str__(self) -> str:
        return f"{100 * self.difference:+.1f} points, standard error {100 * self.standard_error:.1f}"


@dataclass(frozen=True)
class FloorScores:
    """The floor of the practice network.

    Attributes:
        name: what is read: the inputs, a block of the untrained network, or all of them.
        penalty: of the readout's weights.
        validation, test: accuracies, one per seed.
    """

    name: str
    penalty: float
    validation: tuple[float, ...]
    test: tuple[float, ...]


@dataclass(frozen=True)
class Lesson:
    """Test accuracies on digits, by seed.

    Attributes:
        network: what the rule and its twin were trained on, in words.
        reference: what back-propagation was trained on.
        rule: own prediction.
        features: the trained rule's features, read by a converged linear probe; empty where it gives none.
        floor: the best converged readout of the untrained network and the inputs.
        inputs: converged readout of the inputs alone.
        twin: own-prediction twin: everything but the readout recipe as initialised.
        backprop: back-propagation.
        chance: of guessing.
        epochs: of each run.
    """

    network: str
    reference: str
    rule: tuple[float, ...]
    features: tuple[float, ...]
    floor: FloorScores
    inputs: tuple[float, ...]
    twin: tuple[float, ...]
    backprop: tuple[float, ...]
    chance: float
    epochs: int = training_runs.EPOCHS

    @property
    def over_floor(self) -> LearningGain:
        """Accuracy of the own prediction minus the floor."""
        return LearningGain.of(self.rule, self.floor.test)

    @property
    def over_twin(self) -> LearningGain:
        """Accuracy of the own prediction minus that of the own-prediction twin."""
        return LearningGain.of(self.rule, self.twin)

    @property
    def over_chance(self) -> LearningGain:
        """Accuracy of the own prediction minus chance."""
        return LearningGain.of(self.rule, [self.chance] * len(self.rule))

    @property
    def remark(self) -> str:
        """Remark for the certificate; empty if there is none."""
        return "" if self.over_floor.above else NOT_SHOWN

    def to_dict(self) -> dict[str, object]:
        """Return the lesson as plain values."""
        differences = {"floor": self.over_floor, "twin": self.over_twin, "chance": self.over_chance}
        return {
            "task": "digits",
            **dataclasses.asdict(self),
            "above_floor": self.over_floor.above,
            "remark": self.remark,
            "differences": {name: dataclasses.asdict(found) for name, found in differences.items()},
        }


def learn_lesson(subject: Subject) -> Lesson:
    """Train the rule, its own-prediction twin and back-propagation on the same network, over seeds, and measure the floor beside them."""
    task = training_runs.digits()
    network = training_runs.build(subject, task.spec).network
    words = f"{', '.join(f'{name} {tuple(p.shape)}' for name, p in network.blocks.named_parameters() if p.dim() > 1)}"
    reference = words
    try:
        Backprop(network, task.spec)
    except UsageError:
        reference = "mlp of two hidden layers of 16 units"
    own = [_own(subject, seed) for seed in range(SEEDS)]
    probed = tuple(features for _, features in own if features is not None)
    floor = floor_of([training_runs.build(subject, task.spec, seed=seed) for seed in range(SEEDS)])
    return Lesson(
        network=words,
        reference=reference,
        rule=tuple(accuracy for accuracy, _ in own),
        features=probed if len(probed) == SEEDS else (),
        floor=FloorScores(floor.name, floor.best.penalty, floor.best.validation, floor.test),
        inputs=floor.linear.test,
        twin=tuple(_twin(subject, seed) for seed in range(SEEDS)),
        backprop=tuple(_ceiling(subject, seed, reference == words) for seed in range(SEEDS)),
        chance=chance_of(task) or 1 / task.spec.outputs,
    )


def _own(subject: Subject, seed: int) -> tuple[float, float | None]:
    """Return the accuracy of the rule's own prediction, and that of its features under the converged probe."""
    try:
        result = _train(subject, seed, protocols=[PROBE])
    except UsageError as error:
        if error.where != PROTOCOLS:
            raise
        result = _train(subject, seed)  # it gives no features
    return result["test/accuracy"], result.get("test/linear_probe/accuracy")


def _twin(subject: Subject, seed: int) -> float:
    """Train the own-prediction twin.

    Raises:
        CheckFailed: the rule fails as its twin, which a message of its own would not say.
    """
    try:
        return _train(subject, seed, twin=True)["test/accuracy"]
    except Exception as error:
        said = error.what if isinstance(error, BpfreeError) else f"{type(error).__name__}: {' '.join(str(error).split())}"
        fix = "let freeze_features leave a rule that trains, with fewer blocks that learn"
        raise CheckFailed(
            f"as its own-prediction twin (twin=true) it fails: {said}", where=place_of_error(error, subject.rule), fix=fix
        ) from error


def _ceiling(subject: Subject, seed: int, same_network: bool) -> float:
    if not same_network:
        return _plain_ceiling(seed)
    spec = training_runs.digits().spec
    network = training_runs.build(subject, spec, seed=seed).network.requires_grad_(True)
    return _train(subject, seed, rule=Backprop(network, spec))["test/accuracy"]


@lru_cache(maxsize=SEEDS)
def _plain_ceiling(seed: int) -> float:
    return _train(Subject("backprop"), seed)["test/accuracy"]


def _train(subject: Subject, seed: int, **options: Any) -> Mapping[str, float]:
    """Train, and score once at the end, since the runs of all seeds take most of a certificate's time."""
    return training_runs.train(subject, seed=seed, evaluate_every=training_runs.EPOCHS, **options).result


# --- the floor ------------------------------------------------------------------------------------------------------

_floors: dict[str, Floor] = {}
"""Floors measured in this process, by the networks' fingerprint."""


def floor_of(rules: Sequence[Rule]) -> Floor:
    """Measure the floor of a practice network on digits, once for each network.

    Args:
        rules: untrained, one for each seed.
    """
    key = _fingerprint(rules)
    if key not in _floors:
        _floors[key] = measure_floor(training_runs.digits(), rules, inputs=_inputs(len(rules)))
    return _floors[key]


def _fingerprint(rules: Sequence[Rule]) -> str:
    """Hash untrained networks by structure and weights, and by the rule's representation if it overrides the default one."""
    digest = hashlib.sha256()
    for rule in rules:
        digest.update(f"{type(rule).representations.__qualname__} {rule.network!r}".encode())
        for name, tensor in rule.network.state_dict().items():
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@lru_cache(maxsize=4)
def _inputs(seeds: int) -> Reading:
    return read_inputs(training_runs.digits(), seeds)
