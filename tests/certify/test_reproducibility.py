"""Checks of reproducibility. Oracle: rules that were made to break one promise, and rules that keep all of them."""

from __future__ import annotations

import random

import certify_cheaters as cheaters
import numpy as np
import pytest
import torch

from bpfree import Rule
from bpfree.baselines import DFA, Backprop, Frozen, Linear
from bpfree.certify.checks.draws import changed, first_draw, states
from bpfree.certify.checks.reproducibility import CHECKS
from bpfree.certify.findings import NotApplicable


@pytest.mark.parametrize(
    ("rule", "caught", "said"),
    [
        (cheaters.DrawsGlobally, {"global-generators"}, "(DrawsGlobally.noise)"),
        (cheaters.DrawsFromPython, {"global-generators", "same-seed", "two-instances", "resume"}, "(DrawsFromPython.noise)"),
        (cheaters.DrawsFromNumpy, {"global-generators", "same-seed", "two-instances", "resume"}, "(DrawsFromNumpy.noise)"),
        (cheaters.DrawsInPredict, {"global-generators"}, "(DrawsInPredict.predict)"),
        (cheaters.Forgetful, {"resume"}, "in no checkpoint: Forgetful.average"),
        (cheaters.Shares, {"two-instances", "resume"}, "shared by all instances: Shares.average"),
        (cheaters.Counts, {"same-seed", "two-instances", "resume"}, "Counts.made"),
        (cheaters.AlwaysTheSame, {"same-seed"}, "AlwaysTheSame.__init__"),
        (cheaters.ChangesSettings, {"caller-state"}, "anomaly detection"),
    ],
)
def test_each_cheater_is_caught(rule: type[Rule], caught: set[str], said: str) -> None:
    cheaters.assert_caught(rule, CHECKS, caught, said)


@pytest.mark.parametrize(
    "rule",
    [
        Backprop,
        DFA,
        Frozen,
        Linear,
        cheaters.LocalHeads,
        cheaters.NoisyPredictions,
        cheaters.Noisy,
        cheaters.TwoPhases,
        cheaters.OnlyConvolutions,
    ],
)
def test_honest_rules_pass(rule: type[Rule]) -> None:
    found = cheaters.outcomes(rule, CHECKS)
    remark = found.pop("resume")
    assert found == dict.fromkeys([check.id for check in CHECKS if check.id != "resume"])
    assert "interrupted after step 2" in remark


def test_rules_with_two_phases_are_interrupted_in_both() -> None:
    remark = cheaters.outcomes(cheaters.TwoPhases, [check for check in CHECKS if check.id == "resume"])["resume"]
    assert "in phase 'all'" in remark
    assert "in phase 'readout'" in remark


def test_a_specimen_with_dropout_is_not_asked_for_its_generators() -> None:
    found = cheaters.outcomes(cheaters.WithDropout, CHECKS)
    assert isinstance(found["global-generators"], NotApplicable)
    assert not cheaters.failures(found)


def test_the_callers_generators_and_settings_are_as_before() -> None:
    """Oracle: the states before. The checks keep what they ask of rules, even where the rules do not."""
    before, threads = states(), torch.get_num_threads()
    for rule in (cheaters.DrawsFromPython, cheaters.DrawsFromNumpy, cheaters.ChangesSettings):
        cheaters.outcomes(rule, CHECKS)
    assert changed(before) == []
    assert torch.get_num_threads() == threads
    assert not torch.is_anomaly_enabled()


def test_generators_that_moved_are_named() -> None:
    before = states()
    assert changed(before) == []
    torch.rand(1)
    random.random()
    np.random.rand()
    assert changed(before) == ["torch", "random", "numpy"]


def test_a_draw_with_a_generator_is_no_draw_from_the_global_one() -> None:
    generator = torch.Generator()
    assert first_draw(Backprop, lambda: torch.randn(3, generator=generator)) is None
    assert first_draw(Backprop, lambda: torch.randperm(3, generator=generator)) is None
    for draw in (
        lambda: torch.randn(3),
        lambda: torch.empty(3).uniform_(),
        lambda: torch.randperm(4),
        lambda: torch.dropout(torch.ones(3), 0.5, True),
    ):
        assert first_draw(Backprop, draw) is not None
