"""Rules that predict a distribution of real targets, and calibration without a validation split.

Oracle: a rule that adds normal noise of a deviation that it measures, whose intervals and scores are known in closed form.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from training_rules import config_of, weights

import bpfree
from bpfree import BudgetConfig, Examples, Split, Task, TaskSpec, UsageError
from bpfree.baselines import Backprop
from bpfree.network import MLPConfig, mlp
from bpfree.sklearn import LocalRegressor
from bpfree.tasks.task import folds
from bpfree.training.config import CalibrationConfig
from bpfree.training.trainer import Trainer

NOISE = 0.5
SPEC = TaskSpec("line", (3,), 1, "real", scale=1.0)


class Noisy(Backprop):
    """Predicts, and believes in normal errors of one variance, which it measures."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.register_buffer("variance", torch.zeros(()))

    def calibrate(self, data: Examples, generator: torch.Generator) -> dict[str, float]:
        inputs, targets = data.batch(torch.arange(len(data)))
        assert targets is not None
        error = self.network(self.spec.normalise(inputs.to(generator.device))) - targets.to(generator.device)
        self.variance.copy_(error.square().mean())
        return {"variance": float(self.variance), "examples": float(len(data))}

    def sample(self, inputs: Any, draws: int, generator: torch.Generator) -> Tensor:
        assert not self.training
        made = self.network(inputs)
        noise = torch.randn(draws, *made.shape, generator=generator, device=made.device)
        return made + self.variance.sqrt() * noise

    def cannot_sample(self) -> str:
        return super().cannot_sample() or ("" if self.variance else "its variance was not measured")


def line(count: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, generator=generator)
    return Split(x, x[:, :1] - x[:, 1:2] + NOISE * torch.randn(count, 1, generator=generator))


def built(spec: TaskSpec = SPEC) -> Noisy:
    torch.manual_seed(0)
    return Noisy(mlp(spec, MLPConfig(depth=1, width=16)), spec)


@pytest.fixture
def task() -> Task:
    return Task(SPEC, line(300, 0), line(400, 1), line(1500, 2))


def settings(device: torch.device, **options: Any) -> Any:
    return config_of(device, budget=BudgetConfig(epochs=12), batch_size=16, **options)


def test_a_distribution_is_scored_at_the_end(task: Task, device: torch.device, tmp_path: Path) -> None:
    rule = built()
    run = Trainer(rule, task, settings(device), folder=tmp_path).fit()
    result, deviation = run.result, math.sqrt(run.result["calibration/variance"])
    assert result["test/coverage_90"] == pytest.approx(0.9, abs=0.04)
    assert result["test/interval_width_90"] == pytest.approx(2 * 1.645 * deviation, rel=0.06)
    assert result["test/crps"] == pytest.approx(deviation / math.sqrt(math.pi), rel=0.1)
    assert run.metrics["crps"] == {"greater": False, "share": False, "unit": ""}
    assert not any("crps" in key for each in run.history for key in each)

    saved = bpfree.load(tmp_path, rule=built(), spec=SPEC)
    x = task.test.inputs[:600]  # type: ignore[attr-defined]
    drawn = saved.sample(x, 50, seed=3)
    assert drawn.shape == (50, 600, 1)
    assert torch.equal(drawn, saved.sample(x, 50, seed=3))
    low, high = saved.predict_interval(x, 0.5)
    middle = saved.predict(x)
    torch.testing.assert_close(high - middle, torch.full_like(middle, 0.6745 * deviation), rtol=0, atol=0.25 * deviation)
    assert float((high - low).mean()) == pytest.approx(2 * 0.6745 * deviation, rel=0.03)
    with pytest.raises(UsageError, match="no interval"):
        saved.predict_interval(x, 0.999, draws=99)


def test_what_has_no_distribution_says_why(task: Task, device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    plain = Backprop(mlp(SPEC, MLPConfig(depth=1, width=16)), SPEC)
    one = settings(device)
    one.budget = BudgetConfig(epochs=1)
    assert not any("crps" in key for key in Trainer(plain, task, one).fit().result)
    one.evaluation.metrics = ["crps"]
    with pytest.raises(UsageError, match="Backprop predicts values, without a distribution"):
        Trainer(plain, task, one)
    one.evaluation.metrics = []
    unmeasured = Trainer(built(), Task(SPEC, line(300, 0), None, line(99, 2)), one).fit()
    assert not any("crps" in key for key in unmeasured.result)
    assert "no interval is measured: its variance was not measured" in caplog.text
    with pytest.raises(UsageError, match="without a distribution"):
        plain.sample(torch.zeros(1, 3), 2, torch.Generator())


# --- calibration without a validation split -------------------------------------------------------------------------------


def test_what_is_cross_fitted_is_the_mean_of_what_is_held_out(device: torch.device) -> None:
    # Oracle: the same trainings by hand, each on what is left when a part is taken away.
    train, test = line(200, 0), line(50, 2)
    config = settings(device, calibration=CalibrationConfig(folds=4), deterministic=True)
    rule = built()
    run = Trainer(rule, Task(SPEC, train, None, test), config).fit()
    config.calibration = CalibrationConfig()
    squares, operations = 0.0, 0.0
    for held in folds(train, 4, config.seed):
        kept = torch.ones(200, dtype=torch.bool)
        kept[held] = False
        part = built()
        operations += Trainer(part, Task(SPEC, train.subset(kept.nonzero().flatten()), None, test), config).fit().result["train/operations"]
        left = train.subset(held)
        with torch.no_grad():
            squares += float((part.network(left.inputs.to(device)) - left.targets.to(device)).square().sum())  # type: ignore[union-attr]
    assert float(rule.variance) == pytest.approx(squares / 200, rel=1e-5)
    assert run.result["calibration/variance"] == pytest.approx(squares / 200, rel=1e-5)
    assert run.result["calibration/folds"] == 4
    assert run.result["calibration/operations"] == operations
    assert "calibration" not in run.tags
    plain = built()
    Trainer(plain, Task(SPEC, train, None, test), config).fit()
    for name, value in weights(plain.network).items():  # and the rule itself has learned from all examples, as it does alone
        assert torch.equal(value, weights(rule.network)[name]), name


@pytest.mark.parametrize(
    ("validation", "factory", "count", "told"),
    [
        (True, Noisy, 4, "on the validation split"),
        (False, Backprop, 4, "Backprop calibrates nothing"),
        (False, Noisy, 1, "cannot be divided into 1 parts"),
    ],
)
def test_where_there_is_nothing_to_cross_fit(validation: bool, factory: Any, count: int, told: str, device: torch.device) -> None:
    rule = factory(mlp(SPEC, MLPConfig(depth=1, width=16)), SPEC)
    task = Task(SPEC, line(60, 0), line(30, 1) if validation else None, line(30, 2))
    with pytest.raises(UsageError, match=told):
        Trainer(rule, task, settings(device, calibration=CalibrationConfig(folds=count)))


def test_a_regressor_has_intervals() -> None:
    # Oracle: the share of new targets inside, in the targets' own units.
    train, test = line(600, 3), line(2000, 1)
    y, truth = (7 + 100 * split.targets.numpy()[:, 0] for split in (train, test))  # type: ignore[union-attr]
    model = LocalRegressor(
        "noprop-dt", rule_options={"T": 2}, network_options={"width": 16, "depth": 1}, lr=0.003, epochs=6,
        settings={"calibration.folds": 3}, random_state=0, device="cpu",
    ).fit(train.inputs.numpy(), y)  # fmt: skip
    x = test.inputs.numpy()
    low, high = model.predict_interval(x, 0.8)
    assert np.mean((low <= truth) & (truth <= high)) == pytest.approx(0.8, abs=0.08)
    mean, deviation = model.predict(x, return_std=True)
    assert mean.shape == deviation.shape == (2000,)
    assert float(np.sqrt(np.mean((mean - truth) ** 2))) == pytest.approx(float(np.mean(deviation)), rel=0.25)
    assert model.sample_y(x[:4], 5).shape == (4, 5)
    assert np.array_equal(model.sample_y(x[:4], 5, random_state=1), model.sample_y(x[:4], 5, random_state=1))
    with pytest.raises(UsageError, match="without a distribution"):
        LocalRegressor("backprop", epochs=1, random_state=0, device="cpu").fit(x[:50], truth[:50]).predict_interval(x)
