"""How far feedback and forward weights agree. Oracles: angles by hand, and the files of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from bpfree_feedback import agreement
from bpfree_feedback.fixed import FeedbackAlignment
from feedback_kit import VECTORS, batch_for, dense

import bpfree
from bpfree import Stepper, Task
from bpfree.network import MLPConfig


@pytest.mark.parametrize(
    ("other", "angle", "ratio"),
    [([2.0, 0.0], 0.0, 2.0), ([0.0, 3.0], 90.0, 3.0), ([-1.0, 0.0], 180.0, 1.0), ([1.0, 1.0], 45.0, math.sqrt(2)), ([0.0, 0.0], 90.0, 0.0)],
)
def test_angle_and_ratio_by_hand(other: list[float], angle: float, ratio: float) -> None:
    found = agreement.measure({"b1": (torch.tensor([1.0, 0.0]), torch.tensor(other))})["b1"]
    assert found == pytest.approx((angle, ratio), abs=1e-5)


def test_small_angles_are_resolved() -> None:
    """Oracle: 1e-5 radians, whose cosine is 1 in single precision."""
    found = agreement.measure({"b1": (torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1e-5]))})["b1"]
    assert found[0] == pytest.approx(math.degrees(1e-5), rel=1e-3)


def test_metrics_of_sampled_steps() -> None:
    rule = FeedbackAlignment(dense(), VECTORS, FeedbackAlignment.Config(measure_every=2))
    stepper = Stepper(rule)
    seen = [set(stepper.take(batch_for(rule.network))) for _ in range(3)]
    layers = {f"{name}/feedback_{kind}" for name in ("b2.0", "b2.2", "readout") for kind in ("angle", "ratio")}
    assert seen == [{"loss", *layers}, {"loss"}, {"loss", *layers}]


def test_epochs_are_kept_and_drawn(tmp_path: Path) -> None:
    agreement.keep(tmp_path, 1, {"b2": (80.0, 1.0), "readout": (70.0, 0.5)})
    agreement.keep(tmp_path, 2, {"b2": (75.0, 1.1), "readout": (60.0, 0.4)})
    path = agreement.keep(tmp_path, 2, {"b2": (74.0, 1.1), "readout": (60.0, math.inf)})  # of a resumed run
    content = json.loads(path.read_text())
    assert content["angle"] == {"1": {"b2": 80.0, "readout": 70.0}, "2": {"b2": 74.0, "readout": 60.0}}
    drawn = agreement.draw(path, "a run").read_text()
    assert "angle to the forward weights" in drawn
    assert "readout, epoch 1: 0.5" in drawn
    assert "inf" not in drawn.replace("information", "")


def test_a_run_keeps_both_for_each_epoch(digits: Task, tmp_path: Path) -> None:
    """Oracle: the angle of the weights as they are after the run."""
    rule = FeedbackAlignment(bpfree.mlp(digits.spec, MLPConfig(depth=2, width=8)), digits.spec)
    settings = bpfree.TrainConfig(budget=bpfree.BudgetConfig(epochs=2), device="cpu")
    run = bpfree.Trainer(rule, digits, settings, folder=tmp_path / "run", progress=False, tracking=False).fit()
    content = json.loads((run.folder / "feedback.json").read_text())
    assert list(content["angle"]) == ["1", "2"]
    expected = agreement.measure(rule.feedback_pairs())
    assert content["angle"]["2"]["readout"] == pytest.approx(expected["readout"][0], rel=1e-4)
    assert (run.folder / "plots" / "feedback.svg").exists()
    assert "readout/feedback_ratio" in " ".join(run.history[0])


def test_metrics_are_whole_where_gradients_are_accumulated() -> None:
    """Oracle: the step from the whole batch."""
    found = []
    for parts in (1, 3):
        rule = FeedbackAlignment(dense(), VECTORS)
        torch.manual_seed(0)
        for name in rule.layers:
            torch.nn.init.normal_(rule.feedback[name])
        found.append(Stepper(rule).take(batch_for(rule.network, 9), parts=parts))
    assert float(found[1]["readout/feedback_angle"]) == pytest.approx(float(found[0]["readout/feedback_angle"]))
    assert float(found[1]["b2.0/feedback_ratio"]) == pytest.approx(float(found[0]["b2.0/feedback_ratio"]))
