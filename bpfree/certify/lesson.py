"""The rule, its frozen twin and back-propagation on the bundled digits, over seeds."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from functools import lru_cache

from bpfree.baselines import Backprop
from bpfree.certify import practice
from bpfree.certify.subject import Subject
from bpfree.errors import UsageError

__all__ = ["SEEDS", "Lesson", "learn_lesson"]

SEEDS = 3


@dataclass(frozen=True)
class Lesson:
    """Test accuracies on digits, by seed.

    Attributes:
        network: what the rule and its twin were trained on, in words.
        reference: what back-propagation was trained on.
        rule, twin, backprop: accuracies, one per seed.
        epochs: of each run.
    """

    network: str
    reference: str
    rule: tuple[float, ...]
    twin: tuple[float, ...]
    backprop: tuple[float, ...]
    epochs: int = practice.EPOCHS

    @property
    def difference(self) -> tuple[float, float]:
        """Rule less twin, paired by seed: mean and standard error."""
        pairs = [a - b for a, b in zip(self.rule, self.twin, strict=True)]
        return statistics.mean(pairs), statistics.stdev(pairs) / len(pairs) ** 0.5

    def to_dict(self) -> dict[str, object]:
        """Plain values."""
        difference, error = self.difference
        return {"task": "digits", **dataclasses.asdict(self), "difference": round(difference, 4), "standard_error": round(error, 4)}


def learn_lesson(subject: Subject) -> Lesson:
    """Train the rule, its twin and back-propagation on the same network, over seeds."""
    spec = practice.digits().spec
    network = practice.build(subject, spec).network
    words = f"{', '.join(f'{name} {tuple(p.shape)}' for name, p in network.blocks.named_parameters() if p.dim() > 1)}"
    reference = words
    try:
        Backprop(network, spec)
    except UsageError:
        reference = "mlp of two hidden layers of 16 units"
    rules = [_accuracy(subject, seed) for seed in range(SEEDS)]
    twins = [_accuracy(subject, seed, twin=True) for seed in range(SEEDS)]
    return Lesson(words, reference, tuple(rules), tuple(twins), tuple(_ceiling(subject, seed, reference == words) for seed in range(SEEDS)))


def _accuracy(subject: Subject, seed: int, *, twin: bool = False) -> float:
    return practice.train(subject, seed=seed, twin=twin).result["test/accuracy"]


def _ceiling(subject: Subject, seed: int, same_network: bool) -> float:
    if not same_network:
        return _plain_ceiling(seed)
    spec = practice.digits().spec
    network = practice.build(subject, spec, seed=seed).network.requires_grad_(True)
    return practice.train(subject, rule=Backprop(network, spec), seed=seed).result["test/accuracy"]


@lru_cache(maxsize=SEEDS)
def _plain_ceiling(seed: int) -> float:
    return _accuracy(Subject("backprop"), seed)
