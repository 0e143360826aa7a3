"""The learning check. Oracles: made-up accuracies; rules that learn, that go the wrong way and that do nothing; the floor's own module."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from made_certificates import certificate, completed

from bpfree import Batch, Card, Rule, Step
from bpfree.baselines import Backprop, Frozen
from bpfree.certify import Case, Certificate, Measurements, Subject, cases, certify, training_runs
from bpfree.certify.checks.learning import CHECKS
from bpfree.certify.findings import CheckFailed, NotShown
from bpfree.certify.learning import NOT_SHOWN, SEEDS, FloorScores, Lesson, floor_of
from bpfree.certify.page import write_page
from bpfree.certify.show import render
from bpfree.certify.table import table
from bpfree.cli.registry import certificate_row
from bpfree.plugins import installed_plugins
from bpfree.registry import state
from bpfree.registry.index import _short
from bpfree.training.floor import measure_floor

(CHECK,) = CHECKS


def lesson(rule: float, twin: float, floor: float = 0.9, *, scatter: float = 0.01, features: tuple[float, ...] = ()) -> Lesson:
    """Five seeds whose accuracies scatter around the given ones (with a standard error of 0.7 ``scatter``)."""

    def around(mean: float) -> tuple[float, ...]:
        return tuple(mean + by * scatter for by in (-2, -1, 0, 1, 2))

    scores = FloorScores("b1", 1e-3, around(floor), (floor,) * SEEDS)
    return Lesson("small", "small", around(rule), features, scores, (floor,) * SEEDS, (twin,) * SEEDS, (0.95,) * SEEDS, chance=0.11)


def outcome(made: Lesson) -> Any:
    """What the check says of a rule with these accuracies."""
    m = Measurements(Subject(Backprop))
    m.__dict__["lesson"] = made
    try:
        return CHECK.run(m)
    except (CheckFailed, NotShown) as error:
        return error


def test_above_the_floor_by_two_standard_errors_is_passed() -> None:
    """Oracle: the standard error of (-2, -1, 0, 1, 2) is 0.707."""
    assert lesson(0.93, 0.5).over_floor.standard_error == pytest.approx(0.00707, abs=1e-4)
    assert "beside the floor +3.0 points" in outcome(lesson(0.93, 0.5))
    assert lesson(0.93, 0.5).remark == ""
    assert isinstance(outcome(lesson(0.914, 0.5)), NotShown)  # 1.4 points are less than two errors
    assert isinstance(outcome(lesson(0.915, 0.5)), str)


def test_below_the_floor_is_not_shown_and_no_failure() -> None:
    for found in (lesson(0.8, 0.5), lesson(0.8, 0.8, scatter=0.01), lesson(0.15, 0.1, scatter=0.001)):
        said = outcome(found)
        assert isinstance(said, NotShown), said
        assert str(said).startswith(NOT_SHOWN)
        assert found.remark == NOT_SHOWN


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (lesson(0.11, 0.11), "neither above chance nor above its own-prediction twin"),
        (lesson(0.12, 0.12), "neither above chance"),
        (lesson(0.05, 0.06), "neither above chance"),
        (lesson(0.5, 0.6), "worse than its own-prediction twin"),
        (lesson(0.92, 0.97), "worse than its own-prediction twin"),
    ],
)
def test_what_learns_nothing_or_the_wrong_thing_fails(made: Lesson, why: str) -> None:
    said = outcome(made)
    assert isinstance(said, CheckFailed)
    assert why in said.what
    assert said.where.startswith("digits, 20 epochs, 5 seeds")


def test_above_the_twin_or_above_chance_is_enough_not_to_fail() -> None:
    """A twin below chance, and one that is as good as the rule."""
    assert isinstance(outcome(lesson(0.11, 0.05)), NotShown)
    assert isinstance(outcome(lesson(0.5, 0.5)), NotShown)


class Wrong(Backprop):
    """Back-propagation whose hidden blocks go the wrong way."""

    card = Card("climbs", equation="none")

    def credit(self, batch: Batch, step: Step) -> Any:
        metrics = super().credit(batch, step)
        for name in self.network.hidden:
            for p in self.network.blocks[name].parameters():
                if p.grad is not None:
                    p.grad.neg_()
        return metrics


def learning(rule: type[Rule]) -> Case:
    return next(case for case in cases(rule, full=True) if case.check.id == "learning")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_back_propagation_on_sixteen_units_is_not_above_the_converged_readout_of_the_pixels() -> None:
    """As a test case it is skipped with its reason."""
    with pytest.raises(pytest.skip.Exception, match=r"not shown to learn more.*\(inputs\)"):
        learning(Backprop)()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rule_that_goes_the_wrong_way_fails() -> None:
    with pytest.raises(AssertionError, match="is worse than its own-prediction twin"):
        learning(Wrong)()


def test_a_control_is_not_asked() -> None:
    assert learning(Frozen).find().status == "not applicable"


def test_the_floor_is_the_floors_own_and_measured_once_for_each_network() -> None:
    """Oracle: ``measure_floor`` of the untrained networks of the same seeds."""

    def untrained(rule: str) -> list[Any]:
        return [training_runs.build(Subject(rule), training_runs.digits().spec, seed=seed) for seed in range(2)]

    expected = measure_floor(training_runs.digits(), untrained("dfa"))
    found = floor_of(untrained("dfa"))
    assert (found.name, found.best.penalty) == (expected.name, expected.best.penalty)
    assert found.test == pytest.approx(expected.test)
    assert floor_of(untrained("backprop")) is found, "it has the same network"
    other = untrained("dfa")
    with torch.no_grad():
        next(other[1].network.parameters()).mul_(2)
    assert floor_of(other) is not found


# --- told -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick() -> Certificate:
    return certify("linear", quick=True)


def full(made: Certificate, of: Lesson) -> Certificate:
    return dataclasses.replace(completed(made), properties={**made.properties, "learning": of.to_dict()})


@pytest.mark.slow
def test_the_certificate_has_all_numbers_by_seed(quick: Certificate) -> None:
    made = full(quick, lesson(0.8, 0.5, features=(0.85,) * SEEDS))
    learning = Certificate.from_dict(made.to_dict()).properties["learning"]
    for scores in (
        learning["rule"],
        learning["features"],
        learning["floor"]["test"],
        learning["twin"],
        learning["backprop"],
        learning["inputs"],
    ):
        assert len(scores) == SEEDS
    assert learning["above_floor"] is False
    assert learning["remark"] == NOT_SHOWN
    assert learning["differences"]["floor"]["difference"] == pytest.approx(-0.1)
    assert full(quick, lesson(0.95, 0.5)).properties["learning"]["above_floor"] is True


def test_it_is_certified_and_carries_the_remark_everywhere(quick: Certificate, tmp_path: Path) -> None:
    made = full(quick, lesson(0.8, 0.5))
    assert made.status == "certified"
    assert made.to_dict()["remark"] == NOT_SHOWN
    lines = list(render(made))
    assert any(line.startswith("learning") and "floor 90.0 % (b1), own-prediction twin 50.0 %" in line for line in lines)
    assert f"certified; {NOT_SHOWN}" in lines[-1]
    assert NOT_SHOWN in table([made])
    assert "| 80.0, 90.0, 50.0, 95.0 |" in table([made])
    assert f"certified; {NOT_SHOWN}; credit" in write_page(tmp_path / "page.html", made).read_text()
    assert state("linear", {"linear": made}, installed_plugins()) == f"certified; {NOT_SHOWN}"
    record = {"certificates": {"linear": _short(made)}}
    assert certificate_row("linear", record)[1] == f"certified; {NOT_SHOWN}"


def test_above_the_floor_there_is_no_remark(quick: Certificate) -> None:
    made = full(quick, lesson(0.95, 0.5))
    assert made.remark == ""
    assert NOT_SHOWN not in "\n".join(render(made)) + table([made])
    assert state("linear", {"linear": made}, installed_plugins()) == "certified"
    assert "remark" not in _short(made)


def test_certificates_without_a_floor_are_still_read(quick: Certificate) -> None:
    """As earlier versions wrote them."""
    learning = {"task": "digits", "network": "small", "rule": [0.8], "twin": [0.5], "backprop": [0.9], "epochs": 20}
    old = dataclasses.replace(quick, properties={**quick.properties, "learning": learning})
    assert Certificate.from_dict(old.to_dict()) == old
    assert old.remark == ""
    assert "| 80.0, -, 50.0, 90.0 |" in table([old])
    assert any("own-prediction twin 50.0 %" in line for line in render(old))
    assert certificate("dfa").remark == ""


@pytest.mark.slow
def test_a_rule_that_fails_as_its_twin_is_told_so() -> None:
    class NoTwin(Backprop):
        def freeze_features(self) -> None:
            raise ArithmeticError("cannot be frozen")

    (finding,) = certify(NoTwin, only=["learning"]).findings
    assert finding.status == "failed"
    assert finding.what == "as its own-prediction twin (twin=true) it fails: ArithmeticError: cannot be frozen"
