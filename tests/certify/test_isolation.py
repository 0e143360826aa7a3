"""Checks of isolation. Oracle: rules that were made to break one promise, and rules that keep all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import certify_cheaters as cheaters
import pytest
import torch
from torch import Tensor

from bpfree import Card, Rule
from bpfree.baselines import DFA, Backprop, Frozen, Linear
from bpfree.certify import Measurements, examine, training_runs
from bpfree.certify.checks.frozen_noise import HANDLERS, FrozenNoise
from bpfree.certify.checks.isolation import CHECKS, _variance_of_chance
from bpfree.certify.subject import Subject

QUICK = [check for check in CHECKS if check.quick]
PERMUTED = [check for check in CHECKS if check.id == "permuted-labels"]


@pytest.mark.parametrize(
    ("rule", "caught", "said"),
    [
        (cheaters.PeeksAtFrames, {"labels-unseen"}, "PeeksAtFrames.predict"),
        (cheaters.PeeksAtReferrers, {"labels-unseen"}, "PeeksAtReferrers.predict"),
        (cheaters.KeepsLabels, {"labels-unseen"}, "KeepsLabels.__init__"),
        (cheaters.KeepsReferences, {"labels-unseen"}, "KeepsReferences.predict"),
        (cheaters.CentresTheBatch, {"prediction-per-example"}, "CentresTheBatch.predict"),
        (cheaters.RemembersTheLastBatch, {"prediction-per-example"}, "RemembersTheLastBatch.predict"),
        (cheaters.CountsPredictions, {"no-host-state-in-predict"}, "seen"),
        (cheaters.AdaptsInPredict, {"no-host-state-in-predict"}, "mode of network"),
    ],
)
def test_each_cheater_is_caught_by_its_check_and_by_no_other(rule: type[Rule], caught: set[str], said: str) -> None:
    cheaters.assert_caught(rule, QUICK, caught, said)


@pytest.mark.parametrize(
    "rule", [Backprop, DFA, Frozen, Linear, cheaters.LocalHeads, cheaters.NoisyPredictions, cheaters.BatchNormed, cheaters.OnlyConvolutions]
)
def test_honest_rules_pass(rule: type[Rule]) -> None:
    assert cheaters.outcomes(rule, QUICK) == dict.fromkeys([check.id for check in QUICK])


def test_labels_are_as_they_were_afterwards() -> None:
    digits = training_runs.digits()
    before = [split.targets.clone() for split in (digits.train, digits.validation, digits.test)]
    cheaters.outcomes(cheaters.KeepsLabels, QUICK[:1])
    for split, targets in zip((digits.train, digits.validation, digits.test), before, strict=True):
        assert torch.equal(split.targets, targets)


def test_who_reads_true_labels_from_the_disk_is_caught_by_permuted_training_labels() -> None:
    """Labels in memory were never looked at, so the quick checks say nothing; with permuted ones it is right all the same."""
    assert not cheaters.failures(cheaters.outcomes(cheaters.KnowsTheDigits, QUICK))
    failure = cheaters.outcomes(cheaters.KnowsTheDigits, PERMUTED)["permuted-labels"]
    assert "reaches 100.0%" in failure.what


@pytest.mark.parametrize("rule", [Backprop, cheaters.LocalHeads])
def test_honest_rules_are_at_chance_on_permuted_labels(rule: type[Rule]) -> None:
    assert "chance is 10.3%" in cheaters.outcomes(rule, PERMUTED)["permuted-labels"]


def test_the_variance_of_chance_is_that_of_random_pairings() -> None:
    """Oracle: the accuracy under random names of the classes, drawn many times."""
    torch.manual_seed(0)
    confusion = torch.rand(6, 6, dtype=torch.float64).pow(4)
    confusion /= confusion.sum()
    drawn = torch.stack([confusion[:, torch.randperm(6)].trace() for _ in range(20000)])
    assert _variance_of_chance(confusion, 10**9) == pytest.approx(float(drawn.var()), rel=0.05)


DRAWS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "randn": lambda n, g: torch.randn(n, 7, generator=g),
    "randn_like": lambda n, g: torch.randn_like(torch.empty(n, 7)),
    "rand": lambda n, g: torch.rand((n, 7), generator=g),
    "rand_like": lambda n, g: torch.rand_like(torch.empty(n, 7)),
    "normal": lambda n, g: torch.normal(torch.ones(n, 7), 2.0, generator=g),
    "normal_": lambda n, g: torch.empty(n, 3, 7).normal_(1.0, 2.0, generator=g),
    "uniform_": lambda n, g: torch.empty(n, 7).uniform_(-1, 3, generator=g),
    "exponential_": lambda n, g: torch.empty(n, 7).exponential_(2.0, generator=g),
    "bernoulli": lambda n, g: torch.bernoulli(torch.full((n, 7), 0.3), generator=g),
    "bernoulli_": lambda n, g: torch.empty(n, 7).bernoulli_(0.3, generator=g),
    "randint": lambda n, g: torch.randint(2, 9, (n, 7), generator=g),
    "randint_like": lambda n, g: torch.randint_like(torch.empty(n, 7), 2, 9),
    "multinomial": lambda n, g: torch.multinomial(torch.tensor([0.1, 0.2, 0.7]).expand(n, 3), 2, generator=g),
    "numbers": lambda n, g: torch.randn(n, generator=g),
}


@pytest.mark.parametrize("name", DRAWS)
def test_frozen_noise_is_the_same_for_all_examples_in_batches_of_any_size(name: str) -> None:
    """Two draws in a row differ, and both are what a batch of one gets."""

    def drawn(count: int) -> tuple[Tensor, Tensor]:
        with FrozenNoise():
            generator = torch.Generator().manual_seed(0)
            return DRAWS[name](count, generator), DRAWS[name](count, generator)

    (single, second), (many, _) = drawn(1), drawn(9)
    assert many.shape[0] == 9
    assert all(torch.equal(row, single[0]) for row in many)
    assert name in ("bernoulli", "bernoulli_", "multinomial") or not torch.equal(single, second)


@pytest.mark.parametrize(
    ("name", "mean", "deviation"),
    [
        ("randn", 0, 1),
        ("rand", 0.5, 12**-0.5),
        ("normal", 1, 2),
        ("normal_", 1, 2),
        ("uniform_", 1, 4 * 12**-0.5),
        ("exponential_", 0.5, 0.5),
        ("bernoulli", 0.3, 0.21**0.5),
        ("bernoulli_", 0.3, 0.21**0.5),
        ("randint", 5, 2),
    ],
)
def test_frozen_noise_has_its_distribution(name: str, mean: float, deviation: float) -> None:
    """Oracle: mean and deviation in closed form, over 500 draws of 7 numbers, to five standard errors."""
    with FrozenNoise():
        values = torch.cat([DRAWS[name](1, torch.Generator()).flatten()[-7:].double() for _ in range(500)])
    assert float(values.mean()) == pytest.approx(mean, abs=5 * deviation / 3500**0.5)
    assert float(values.std()) == pytest.approx(deviation, rel=0.1)


def test_frozen_noise_draws_classes_by_their_weights() -> None:
    weights = torch.tensor([[0.1, 0.2, 0.7]])
    for again in (False, True):
        with FrozenNoise():
            drawn = torch.cat([torch.multinomial(weights, 1, again).flatten() for _ in range(2000)])
        shares = drawn.bincount(minlength=3) / len(drawn)
        torch.testing.assert_close(shares, weights[0], atol=0.05, rtol=0)


def test_frozen_noise_knows_the_usual_draws() -> None:
    names: dict[str, Any] = {function.__name__: function for function in HANDLERS}
    assert {"randn", "rand", "randn_like", "rand_like", "normal", "randint", "multinomial", "bernoulli"} <= names.keys()


def test_the_keeper_of_labels_does_find_them() -> None:
    """The cheater would be no test if it found nothing."""
    digits = training_runs.digits()
    rule = training_runs.build(Subject(cheaters.KeepsLabels), digits.spec)
    scores = rule.predict(digits.spec.normalise(digits.test.inputs), torch.Generator())
    assert torch.equal(scores.argmax(1), digits.test.targets)


class WrongShape(Backprop):
    card = Card("forgets the classes", equation="none")

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        return super().predict(inputs, generator).amax(1)


def test_scores_of_another_shape_are_named() -> None:
    finding = examine(Measurements(Subject(WrongShape)), next(check for check in CHECKS if check.id == "prediction-per-example"))
    assert finding.status == "failed"
    assert "predict returns (" in finding.what
    assert "return scores (N, C)" in finding.fix
