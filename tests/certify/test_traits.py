"""Locality by intervention, reverse mode by observation. Oracles: back-propagation in eleven disguises, each of which must be caught;
honest rules, whose locality follows from what they read; the reach min(T, L - 1) of relaxed predictive coding; closed forms."""

from __future__ import annotations

import functools
from typing import Any

import certify_disguises as disguises
import pytest
import torch
from certify_cheaters import LocalHeads
from honest_rules import HONEST, Honest
from torch import Tensor

from bpfree import Batch, Rule, Step, Traits, always
from bpfree.baselines import DFA, Backprop, Frozen, Linear
from bpfree.certify import Finding, Measurements, Specimen, Subject, certify, examine
from bpfree.certify.checks import traits
from bpfree.certify.interventions import dependence, downstream_weights, name_of_dependence
from bpfree.certify.probe import Probe

CHECKS = {check.id: check for check in traits.CHECKS}


@functools.cache
def measured(rule: Any, *settings: str) -> Measurements:
    """Of a rule, for all tests here: what one has measured need not be measured again."""
    return Measurements(Subject(rule, settings))


def find(rule: Any, *ids: str, settings: tuple[str, ...] = ()) -> dict[str, Finding]:
    m = measured(rule, *settings)
    return {name: examine(m, CHECKS[name]) for name in ids or CHECKS}


@pytest.mark.parametrize("rule", [Backprop, DFA, Frozen, Linear, LocalHeads], ids=lambda rule: rule.__name__)
def test_honest_rules_are_what_they_say(rule: type[Rule]) -> None:
    for name, finding in find(rule).items():
        assert finding.status == "passed", f"{name}: {finding}"


@pytest.mark.parametrize("disguise", disguises.DISGUISES, ids=lambda rule: rule.__name__)
def test_back_propagation_in_disguise_is_caught(disguise: type[Rule]) -> None:
    """By its downstream weights, with the pair of blocks named; and it is called what it is."""
    m = measured(disguise)
    finding = examine(m, CHECKS["trait-downstream-weights"])
    assert finding.status == "failed"
    assert "'b1' changes with the weights of block 'readout'" in finding.what
    assert "certify_disguises" in finding.where
    assert "downstream_weights='all'" in finding.fix
    assert m.credit == "equivalent to back-propagation"
    smallest = min(m.downstream["dense"].at(i, j) or 0.0 for i in range(4) for j in range(i + 1, 5))
    assert smallest > 0.1  # far from rounding, which is below 1e-12


def test_the_call_that_carries_the_gradient_is_named() -> None:
    finding = find(disguises.Autograd, "trait-downstream-weights")["trait-downstream-weights"]
    assert "reverse-mode call at certify_disguises.py:" in finding.where
    by_hand = find(disguises.HandWritten, "trait-downstream-weights")["trait-downstream-weights"]
    assert "by forward mode or by hand" in by_hand.where


@pytest.mark.parametrize(
    ("disguise", "span"),
    [
        ("Autograd", 5),
        ("FuncGrad", 5),
        ("Vmapped", 5),
        ("RawEngine", 5),
        ("Checkpointed", 5),
        ("NestedFunctions", 5),
        ("NestedEngine", 5),
        ("Chained", 1),
    ],
)
def test_the_reverse_span_counts_the_blocks_of_the_widest_call(disguise: str, span: int) -> None:
    """Oracle: what these rules call. Five blocks; checkpoints and functions within functions are one call."""
    assert measured(getattr(disguises, disguise)).observations["dense"].total().span == span


@pytest.mark.parametrize("disguise", ["HandWritten", "ForwardBasis", "PhaseCopies"])
def test_without_reverse_mode_the_span_is_zero_and_locality_is_judged_by_weights(disguise: str) -> None:
    m = measured(getattr(disguises, disguise))
    assert m.span == 0
    assert examine(m, CHECKS["trait-reverse-span"]).status == "passed"
    assert (m.observations["dense"].total().forward_mode > 0) == (disguise == "ForwardBasis")


def test_reverse_mode_through_copies_is_alarming() -> None:
    finding = find(disguises.CopiedWeights, "trait-reverse-span")["trait-reverse-span"]
    assert finding.status == "failed"
    assert "unattributed reverse mode" in finding.what
    assert finding.where.startswith("certify_disguises.py:")


def test_one_forgotten_detach_is_found_with_its_pair() -> None:
    found = find(disguises.OneTooMany)
    assert "'b4' changes with the weights of block 'readout'" in found["trait-downstream-weights"].what
    assert "downstream_weights=1" in found["trait-downstream-weights"].fix
    assert "measured is 'neighbours'" in found["trait-dependence"].what
    assert "crosses 2 blocks (b1, b2)" in found["trait-reverse-span"].what
    assert "reverse_span=2" in found["trait-reverse-span"].fix


def test_weights_copied_when_a_phase_begins_are_found_on_a_single_phase_too() -> None:
    assert measured(disguises.PhaseCopies).downstream["dense"].reach() == 4


# --- lying traits -----------------------------------------------------------------------------------------------------


class TooModest(DFA):
    traits_of = always(
        Traits(dependence="all", downstream_weights="all", reverse_span="all", passes=3, supervision="readout", update="own-steps")
    )


class SaysNeighbours(Backprop):
    traits_of = always(Traits(dependence="neighbours", downstream_weights="all", reverse_span="all"))


def test_traits_that_say_too_much_fail_as_well() -> None:
    found = find(TooModest)
    assert found["trait-dependence"].status == "passed"
    assert "measured is 0" in found["trait-downstream-weights"].what
    assert "crosses 1 blocks" in found["trait-reverse-span"].what
    assert "declare passes=1" in found["trait-passes"].fix
    assert "update='grad'" in found["trait-update"].fix
    assert "b1, b2, b3, b4, readout" in found["trait-supervision"].what


def test_the_farthest_pair_is_named() -> None:
    finding = find(SaysNeighbours, "trait-dependence")["trait-dependence"]
    assert "'b1' changes with the parameters of block 'readout'" in finding.what


def test_truth_of_the_traits_cannot_be_waived() -> None:
    m = measured(SaysNeighbours)
    finding = examine(m, CHECKS["trait-dependence"], {"trait-dependence": "we like it so"})
    assert finding.status == "failed"
    assert "cannot be waived" in finding.what


class InPlace(Backprop):
    traits_of = always(Traits(update="in-place"))

    def learn(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        metrics = self.credit(batch, step)
        with torch.no_grad():
            for p in self.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad
                    p.grad = None
        return metrics


class BlockByBlock(Backprop):
    traits_of = always(Traits(update="own-steps"))

    def learn(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        metrics = self.credit(batch, step)
        for name in self.network.names:
            step.apply(name)
        return metrics


@pytest.mark.parametrize("rule", [InPlace, BlockByBlock], ids=lambda rule: rule.__name__)
def test_who_applies_updates_is_observed(rule: type[Rule]) -> None:
    """And the updates of rules that apply them themselves are measured all the same: this is back-propagation."""
    m = measured(rule)
    assert examine(m, CHECKS["trait-update"]).status == "passed"
    assert examine(m, CHECKS["trait-downstream-weights"]).status == "passed"
    cosines = m.observations["dense"].cosines()
    assert min(cosines.values()) > 1 - 1e-9


class Undeclared(InPlace):
    traits_of = always(Traits())


def test_updates_in_place_must_be_declared() -> None:
    assert "update='in-place'" in find(Undeclared, "trait-update")["trait-update"].fix


# --- shipped rules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 2, 3, 6])
def test_relaxed_predictive_coding_reaches_as_many_blocks_as_it_takes_steps(T: int) -> None:
    """Oracle: min(T, L - 1); an error moves one block per inference step."""
    m = measured("predictive-coding", f"rule.T={T}")
    for kind, matrix in m.downstream.items():
        assert matrix.reach() == min(T, len(matrix.blocks) - 1), kind
    assert examine(m, CHECKS["trait-downstream-weights"]).status == "passed"


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        ("predictive-coding", ("rule.path=generic",)),
        ("ipc", ("rule.T=3",)),
        ("epc", ("rule.path=generic",)),
        ("z-il", ("rule.path=generic",)),
        ("fixed-prediction", ("rule.T=2",)),
        ("forward-gradient", ("rule.perturb=weights",)),
        ("forward-gradient", ("rule.tangents=1",)),
        ("local-forward-gradient", ("rule.tangents=4",)),
        ("local-backprop", ("rule.greedy=false",)),
        ("noprop-dt", ("rule.updates=sequential",)),
        ("noprop-dt", ("rule.embedding=learned", "rule.state=noised")),
        ("noprop-dt", ("rule.state=own",)),
        ("softhebb", ("rule.order=successive",)),
    ],
)
def test_shipped_rules_tell_the_truth_at_other_settings_too(rule: str, settings: tuple[str, ...]) -> None:
    for name, finding in find(rule, settings=settings).items():
        assert finding.status == "passed", f"{name}: {finding}"


@pytest.mark.parametrize("rule", ["z-il", "fixed-prediction"])
def test_exact_predictive_coding_is_called_equivalent(rule: str) -> None:
    """Song et al. 2020: Z-IL's updates are back-propagation's."""
    assert measured(rule).credit == "equivalent to back-propagation"


# --- the measurement itself -------------------------------------------------------------------------------------------


def test_the_intervention_leaves_every_forward_value_alone() -> None:
    """Oracle: the plain outputs before each step, of the trajectory with and without the change."""
    subject, specimen = Subject(DFA), Specimen()
    matrix = downstream_weights(subject, specimen, dependence(subject, specimen))
    assert not matrix.reasons
    assert matrix.reach() == 0
    assert matrix.at(0, 4) == 0.0


def test_updates_of_plain_descent_are_minus_the_gradient() -> None:
    """Oracle: autograd; rate 1, no decay."""
    moments = Probe(Subject(Backprop), Specimen(), gradients=True).run()
    for moment in moments:
        for name, update in moment.updates.items():
            torch.testing.assert_close(update, -moment.gradients[name], rtol=1e-6, atol=1e-12)


def test_trajectories_repeat_themselves() -> None:
    probe = Probe(Subject("noprop-dt"), Specimen())
    for a, b in zip(probe.run(), probe.run(), strict=True):
        assert all(torch.equal(a.updates[name], b.updates[name]) for name in a.updates)


class Narrow(DFA):
    """On a network so narrow that no direction is invisible to its inputs."""

    @classmethod
    def specimen(cls, kind: str, depth: int, width: int) -> dict[str, Any] | None:
        return {"network.name": "mlp", "network.widths": [1] * depth, "network.activation": "tanh"} if kind == "dense" else None


def test_without_a_null_space_a_rule_is_not_called_local() -> None:
    m = measured(Narrow)
    finding = examine(m, CHECKS["trait-downstream-weights"])
    assert finding.status == "unmeasured"
    assert "as many independent directions" in finding.what
    assert m.credit == "unmeasured"


class Silent(DFA):
    def signals(self, traces: Any, batch: Batch, error: Tensor, step: Step) -> list[Tensor | None]:
        return [None for _ in traces[:-1]]


def test_blocks_without_an_update_are_listed() -> None:
    m = measured(Silent)
    assert m.silent == ["b1", "b2", "b3", "b4"]
    assert m.dependence_name == "upstream"


class Shy(disguises.Autograd):
    """Learns in single precision only, which is not what the probe looks at."""

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        if batch.inputs.dtype == torch.float64:
            return {}
        return super().credit(batch, step)


def test_a_rule_that_holds_still_while_it_is_probed_is_not_called_local() -> None:
    finding = find(Shy, "trait-downstream-weights")["trait-downstream-weights"]
    assert finding.status == "unmeasured"
    assert "learn in training" in finding.what


def test_an_update_changes_with_its_own_and_all_lower_blocks() -> None:
    """Oracle: a local loss's gradient contains its block's parameters and its input."""
    matrix = dependence(Subject(LocalHeads), Specimen())
    assert name_of_dependence(matrix) == "upstream"
    for i in range(5):
        for j in range(5):
            assert (matrix.at(i, j) != 0.0) == (j <= i), (i, j)


@pytest.mark.slow  # half a minute; whole runs of the same rules are among the quick tests
@pytest.mark.parametrize("known", HONEST, ids=lambda known: known.rule.__name__)
def test_what_rules_of_the_literature_declare_is_measured(known: Honest) -> None:
    """No false alarm: their traits are as their authors say, and a run on inputs that hold NaN is reported."""
    found = certify(known.rule, known.settings, only=[*CHECKS, "nan-reported"]).findings
    assert [str(finding) for finding in found if finding.status == "failed"] == []
    assert sum(finding.status == "unmeasured" for finding in found) <= 1
