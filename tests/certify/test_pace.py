"""Times of steps. Oracles: made-up laps; rules that take a known multiple of back-propagation's time, or wait, or have others work."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest

from bpfree import Batch, Step
from bpfree.baselines import Backprop
from bpfree.certify import Specimen, Subject, certify, pace
from bpfree.certify.pace import LEAST, Lap, measure_time, ratio
from bpfree.certify.show import render, step_times
from bpfree.certify.table import table

SPECIMEN = Specimen("dense", depth=4, width=128)


def laps(ratios: list[float], *, share: float = 1.0) -> list[tuple[Lap, Lap]]:
    return [(Lap(0.001 * r, 0.001 * r / share), Lap(0.001, 0.001 / share)) for r in ratios]


def test_the_ratio_is_the_median_of_pairs() -> None:
    """A machine that is slow for a while is slow for both of a pair."""
    assert ratio(laps([2.0] * LEAST)) == 2.0
    slow = [
        (Lap(ours.processor * by, ours.wall * by), Lap(theirs.processor * by, theirs.wall * by))
        for by in (1, 9)
        for ours, theirs in laps([2.0] * 20)
    ]
    assert ratio(slow) == 2.0
    assert ratio(laps([2.0] * 38 + [50.0, 0.1])) == 2.0  # single ones that were disturbed


def test_what_scatters_is_not_shown() -> None:
    """Oracle: quartiles of a uniform draw between 1 and 1.6, and between 1 and 5."""
    draw = random.Random(0)
    assert ratio(laps([draw.uniform(1, 1.6) for _ in range(80)])) == pytest.approx(1.3, abs=0.1)
    assert ratio(laps([draw.uniform(1, 5) for _ in range(80)])) is None
    assert ratio(laps([2.0] * (LEAST - 1))) is None
    assert ratio([]) is None


@pytest.mark.parametrize("share", [0.05, 1.5])
def test_a_processor_share_that_no_thread_at_work_has_is_not_shown(share: float) -> None:
    assert ratio(laps([2.0] * 40, share=share)) is None
    one_side = [(ours, Lap(theirs.processor, theirs.processor / share)) for ours, theirs in laps([2.0] * 40)]
    assert ratio(one_side) is None
    assert ratio(laps([2.0] * 40, share=0.3)) == 2.0  # a busy machine


def test_a_clock_that_stands_is_not_shown() -> None:
    assert ratio([(Lap(0.001, 0.001), Lap(0.0, 0.0))] * 40) is None


class Thrice(Backprop):
    """Takes three of back-propagation's steps."""

    def credit(self, batch: Batch, step: Step) -> Any:
        for _ in range(3):
            for p in self.parameters():
                p.grad = None
            metrics = super().credit(batch, step)
        return metrics


class TwoClocks:
    """In place of the module ``time``: stands still unless a step moves it."""

    wall = processor = 0.0

    def perf_counter(self) -> float:
        return self.wall

    def process_time(self) -> float:
        return self.processor


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> TwoClocks:
    """A step of back-propagation moves both by 1."""
    made, credit = TwoClocks(), Backprop.credit

    def timed(self: Backprop, batch: Batch, step: Step) -> Any:
        made.wall, made.processor = made.wall + 1, made.processor + 1
        return credit(self, batch, step)

    monkeypatch.setattr(pace, "time", made)
    monkeypatch.setattr(Backprop, "credit", timed)
    return made


def test_a_step_of_three_takes_three_times_as_long() -> None:
    """Whatever else the machine does: either about three, or not shown."""
    found = measure_time(Subject(Thrice), SPECIMEN)
    assert set(found) == {"train"}
    assert found["train"] is None or 2.0 < found["train"] < 4.5


def test_by_a_clock_that_only_steps_move_it_takes_exactly_that(clocks: TwoClocks) -> None:
    assert measure_time(Subject(Thrice), SPECIMEN) == {"train": 3.0}


@pytest.mark.parametrize(("pause", "shown"), [(30.0, None), (3.0, 1.0)])
def test_a_step_that_waits_is_not_shown(clocks: TwoClocks, pause: float, shown: float | None) -> None:
    """Where it waits for 30 times what it computes, its processor time says nothing of how long it takes."""

    class Waits(Backprop):
        def credit(self, batch: Batch, step: Step) -> Any:
            clocks.wall += pause
            return super().credit(batch, step)

    assert measure_time(Subject(Waits), SPECIMEN) == {"train": shown}


def test_time_is_given_for_each_phase_and_not_where_back_propagation_cannot_go() -> None:
    """On features, too."""
    found = measure_time(Subject("softhebb"), Specimen())
    assert set(found) == {"features", "readout"}
    assert measure_time(Subject("noprop-dt"), Specimen()) == {}


def test_what_was_not_measured_in_processor_time_is_not_shown() -> None:
    """As in certificates of earlier versions, which had no clock."""
    certificate = certify("linear", quick=True)
    assert certificate.properties["time"]["clock"] == "processor"
    old = dataclasses.replace(certificate, properties={**certificate.properties, "time": {"over_backprop": {"train": 74.0}}})
    assert step_times(old.properties) == {"train": None}
    (line,) = [line for line in render(old) if line.startswith("time of a step")]
    assert line.split(maxsplit=4)[4] == "unmeasured"
    assert "74" not in table([old])
    new = dataclasses.replace(
        certificate, properties={**old.properties, "time": {"over_backprop": {"a": 2.0, "b": None}, "clock": "processor"}}
    )
    (line,) = [line for line in render(new) if line.startswith("time of a step")]
    assert "a: 2, b: unmeasured times" in line
    assert " | 2.0, ? | " in table([new])
