"""Calibration. Oracles: a threshold that is found by trying, bits of runs without calibration, and rules that do more than choose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_rules import ONE, assert_equal_bits, config_of, failing, rule_on, weights, write_through_data

import bpfree
from bpfree import Rule, Split, Task
from bpfree.baselines import Backprop
from bpfree.tasks.digits import DIGITS
from bpfree.training.checkpoint import read_checkpoint
from bpfree.training.trainer import Trainer


class Threshold(Backprop):
    """Chooses the offset of class 0 that is best on validation, by trying; ``calls`` counts how often it is asked."""

    calls = 0

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.register_buffer("offset", torch.zeros(()))

    def calibrate(self, data: Split, generator: torch.Generator) -> dict[str, float]:
        assert not self.training
        assert not torch.is_grad_enabled()
        type(self).calls += 1
        torch.rand(2)
        inputs = self.spec.normalise(data.inputs.to(generator.device))
        assert data.targets is not None
        scores, targets = self.network(inputs), data.targets.to(generator.device)
        grid = torch.tensor([-3.0, 1.5, 3.0], device=scores.device)
        hits = torch.stack([(self._shifted(scores, offset).argmax(1) == targets).float().mean() for offset in grid])
        self.offset.copy_(grid[hits.argmax()])
        return {"offset": float(self.offset), "accuracy": float(hits.max())}

    def _shifted(self, scores: Tensor, offset: Tensor) -> Tensor:
        return torch.cat([scores[:, :1] + offset, scores[:, 1:]], 1)

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        return self._shifted(self.network(inputs), self.offset)


@pytest.fixture(autouse=True)
def _anew() -> None:
    Threshold.calls = 0


@pytest.mark.parametrize("select", ["last", "best-val"])
def test_a_rule_chooses_once_on_validation_and_is_saved_so(digits: Task, device: torch.device, tmp_path: Path, select: Any) -> None:
    config, rule = config_of(device, select=select, deterministic=True), rule_on(digits, Threshold)
    run = Trainer(rule, digits, config, folder=tmp_path).fit()
    assert Threshold.calls == 1
    assert run.result["calibration/offset"] in (-3.0, 1.5, 3.0)
    assert float(rule.offset) == run.result["calibration/offset"]
    assert run.result["calibration_seconds"] > 0
    plain = rule_on(digits)
    expected = Trainer(plain, digits, config).fit()
    assert_equal_bits(weights(rule.network), weights(plain.network))
    assert not any("calibration" in name for name in expected.result)

    loaded = bpfree.load(tmp_path / "checkpoints" / ("last.pt" if select == "last" else "selected.pt"), rule=rule_on(digits, Threshold))
    hits = loaded.predict(digits.test.inputs).argmax(1) == digits.test.targets
    assert float(hits.float().mean()) == pytest.approx(run.result["test/accuracy"])
    assert run.result["test/accuracy"] != expected.result["test/accuracy"]  # the offset tells

    again = Trainer(rule_on(digits, Threshold), digits, config, folder=tmp_path).fit(tmp_path / "checkpoints" / "last.pt")
    assert Threshold.calls == 1
    for name in ("calibration/offset", "calibration/accuracy", "calibration_seconds", "test/accuracy"):
        assert again.result[name] == run.result[name]
    reloaded = bpfree.load(tmp_path, rule=rule_on(digits, Threshold))
    assert float(reloaded.rule.offset) == run.result["calibration/offset"]  # type: ignore[arg-type]


@pytest.mark.parametrize("select", ["last", "best-val"])
def test_a_run_that_goes_on_trains_from_weights_as_training_left_them(
    digits: Task, device: torch.device, tmp_path: Path, select: Any
) -> None:
    options = {"select": select, "deterministic": True}
    Trainer(rule_on(digits, Threshold), digits, config_of(device, budget=ONE, **options), folder=tmp_path).fit()
    more, straight = rule_on(digits, Threshold), rule_on(digits, Threshold)
    longer = Trainer(more, digits, config_of(device, **options), folder=tmp_path).fit(tmp_path / "checkpoints" / "last.pt")
    whole = Trainer(straight, digits, config_of(device, **options)).fit()
    assert Threshold.calls == 3
    assert_equal_bits(weights(more), weights(straight))
    assert longer.history[-1]["val/accuracy"] == whole.history[-1]["val/accuracy"]
    assert longer.result["test/accuracy"] == whole.result["test/accuracy"]


def test_a_run_that_ended_before_its_calibration_calibrates_when_it_goes_on(digits: Task, device: torch.device, tmp_path: Path) -> None:
    class Once(Threshold):
        def calibrate(self, data: Split, generator: torch.Generator) -> dict[str, float]:
            if not self.calls:
                type(self).calls += 1
                raise KeyboardInterrupt
            return super().calibrate(data, generator)

    with pytest.raises(KeyboardInterrupt):
        Trainer(rule_on(digits, Once), digits, config_of(device, budget=ONE), folder=tmp_path).fit()
    run = Trainer(rule_on(digits, Once), digits, config_of(device, budget=ONE), folder=tmp_path).fit(tmp_path / "checkpoints" / "last.pt")
    assert Once.calls == 2
    assert run.status == "finished"
    assert run.result["train/steps"] == 21
    assert read_checkpoint(tmp_path / "checkpoints" / "last.pt")["weights"]["offset"] == run.result["calibration/offset"]


def _train_on_validation(rule: Rule) -> Any:
    write_through_data(rule)
    return {}


def _make_buffer(rule: Rule) -> Any:
    rule.register_buffer("made", torch.zeros(1))
    return {}


@pytest.mark.parametrize(
    ("cheat", "said"),
    [
        (_train_on_validation, "calibrate changed the parameter network.blocks.b1"),
        (_make_buffer, "neither make nor reshape"),
        (lambda rule: {"t": torch.zeros(1)}, "plain numbers"),
        (lambda rule: None, "plain numbers"),
    ],
)
def test_calibrate_chooses_and_does_nothing_else(digits: Task, device: torch.device, cheat: Callable[[Rule], Any], said: str) -> None:
    class Cheats(Backprop):
        def calibrate(self, data: Split, generator: torch.Generator) -> dict[str, float]:
            result: dict[str, float] = cheat(self)
            return result

    trainer = Trainer(rule_on(digits, Cheats), digits, config_of(device, budget=ONE))
    assert said in failing(trainer)
    assert "test/accuracy" not in trainer.run.result


def test_without_validation_defaults_stay_and_the_run_says_so(device: torch.device) -> None:
    whole = Task.from_source(DIGITS, validation=0)
    run = Trainer(rule_on(whole, Threshold), whole, config_of(device, budget=ONE)).fit()
    assert Threshold.calls == 0
    assert not any("calibration" in name for name in run.result)
    assert run.tags["calibration"] == "not calibrated: no validation split"
    assert "calibration" not in Trainer(rule_on(whole), whole, config_of(device, budget=ONE)).fit().tags
