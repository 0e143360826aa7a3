"""Checks of the contract and of a step's conduct. Oracle: rules that were made to break one promise, and rules that keep all."""

from __future__ import annotations

import certify_cheaters as cheaters
import pytest

from bpfree import Rule
from bpfree.baselines import DFA, Backprop, Frozen, Linear
from bpfree.certify.checks.check import Check
from bpfree.certify.checks.contract import CHECKS

BY_NAME = {check.id: check for check in CHECKS}
SLOWEST = "memory-constant"
OTHERS = [check for check in CHECKS if check.id != SLOWEST]


@pytest.mark.parametrize(
    ("rule", "caught", "said"),
    [
        (cheaters.Doubles, {"config-roundtrip"}, "rule.scale=4.0 became 8.0"),
        (cheaters.IgnoresItsConfig, {"config-roundtrip"}, "rule.scale=1.0 became 3.0"),
        (cheaters.ExplainsNothing, {"config-roundtrip"}, "without a help text: scale"),
        (cheaters.WithoutCard, {"config-roundtrip"}, "no equation"),
        (cheaters.Crashes, {"networks-refused"}, "(Crashes.credit)"),
        (cheaters.SilentOnConvolutions, {"networks-refused"}, "nothing is learned"),
        (cheaters.DividesByDeviation, {"batch-shapes"}, "a batch of one example"),
        (cheaters.Squeezes, {"batch-shapes"}, "(Squeezes.credit)"),
        (cheaters.ReadsMemoryOrder, {"batch-shapes"}, "non-contiguous inputs"),
        (cheaters.ReadsColoursByMemoryOrder, {"batch-shapes"}, "channels-last inputs"),
        (cheaters.MixesTypes, {"bf16"}, "(MixesTypes.credit)"),
        (cheaters.SwallowsNaN, {"nan-reported"}, "ends as 'finished'"),
        (cheaters.FlipsModes, {"state-restored"}, "train mode of network.blocks.b1"),
        (cheaters.FlipsRequiresGrad, {"state-restored"}, "requires_grad of network.blocks.b1"),
        (cheaters.LeavesGradients, {"state-restored"}, ".grad on gain"),
        (cheaters.NeverMoves, {"updates-something", "networks-refused"}, "no parameter has moved"),
        (cheaters.ReadsItsLoss, {"no-host-sync"}, "(ReadsItsLoss.credit)"),
        (cheaters.PicksByMask, {"no-host-sync"}, "indexing by a mask"),
        (cheaters.MakesLists, {"no-host-sync"}, "tolist"),
    ],
)
def test_each_cheater_is_caught(rule: type[Rule], caught: set[str], said: str) -> None:
    cheaters.assert_caught(rule, OTHERS, caught, said)


def test_a_leak_is_found_with_its_attribute_and_its_bytes() -> None:
    """At least the loss itself, four bytes, and the graph's outputs stay behind each step."""
    failure = cheaters.failures(cheaters.outcomes(cheaters.Leaks, [BY_NAME[SLOWEST]]))[SLOWEST]
    assert "self.losses" in failure.where
    assert float(failure.what.split(" bytes per step")[0].split()[-1]) >= 4


def test_a_list_that_grows_is_found_though_it_holds_no_tensors() -> None:
    failure = cheaters.failures(cheaters.outcomes(cheaters.KeepsNumbers, [BY_NAME[SLOWEST]]))[SLOWEST]
    assert failure.where == "self.history"
    assert "201 items after 200 steps" in failure.what


HONEST = [
    Backprop,
    DFA,
    Frozen,
    Linear,
    cheaters.LocalHeads,
    cheaters.TwoPhases,
    cheaters.SetsUpOnce,
    cheaters.Averages,
    cheaters.RefusesKindly,
    cheaters.OnlyConvolutions,
]


@pytest.mark.parametrize("rule", HONEST)
def test_honest_rules_pass(rule: type[Rule]) -> None:
    assert cheaters.failures(cheaters.outcomes(rule, CHECKS)) == {}


def remark_of(rule: type[Rule], name: str) -> str:
    """What a check that passed says."""
    return str(cheaters.outcomes(rule, [BY_NAME[name]])[name])


@pytest.mark.parametrize(
    ("rule", "check", "said"),
    [
        (Frozen, "updates-something", "never updated: b1, b2"),
        (cheaters.BatchNormed, "batch-shapes", "batch norm"),
        (Linear, "networks-refused", "a linear classifier has no hidden blocks"),
        (Backprop, "networks-refused", "works on a multilayer perceptron, one with batch norm and dropout"),
        (Backprop, "nan-reported", "nan at step"),
    ],
)
def test_remarks_say_what_was_seen(rule: type[Rule], check: str, said: str) -> None:
    assert said in remark_of(rule, check)


def test_ids_are_unique_and_titles_are_statements() -> None:
    from bpfree.certify.checks import isolation, reproducibility

    checks: list[Check] = [*isolation.CHECKS, *reproducibility.CHECKS, *CHECKS]
    assert len({check.id for check in checks}) == len(checks)
    fixed = {check.id for check in checks if not check.waivable}
    assert {"labels-unseen", "permuted-labels", "same-seed", "resume", "two-instances", "global-generators", "state-restored"} <= fixed
    assert [check.id for check in checks if not check.quick] == ["permuted-labels"]
