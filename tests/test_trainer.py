"""The trainer: seeds, evaluation, selection, divergence, and what it gives back. Oracles: identities between runs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from made_time import Time
from torch import Tensor
from training_rules import Exploding, Silent, assert_equal_bits, config_of, noisy, rule_on, weights

from bpfree import (
    Batch,
    OptimizerConfig,
    Rule,
    Run,
    Split,
    Step,
    Task,
    TaskSpec,
    Traits,
    UsageError,
    always,
    hookimpl,
)
from bpfree.baselines import DFA, Backprop, Frozen
from bpfree.network import VGGConfig, vgg
from bpfree.tasks.digits import DIGITS
from bpfree.training.checkpoint import read_checkpoint
from bpfree.training.config import BudgetConfig, EvaluationConfig, TrainConfig
from bpfree.training.trainer import Trainer
from bpfree.training.updater import ClipConfig


def test_the_callers_random_state_modes_and_settings_come_back(digits: Task, device: torch.device) -> None:
    rule = noisy(digits).eval()
    rule.network.blocks["b2"].train()
    modes = {name: module.training for name, module in rule.named_modules()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    Trainer(rule, digits, config_of(device, threads=1, deterministic=True)).fit()
    assert torch.equal(torch.rand(3), expected)
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == (threads, deterministic)
    assert {name: module.training for name, module in rule.named_modules() if name in modes} == modes
    assert all(p.requires_grad for p in rule.parameters())


def test_evaluation_is_not_counted_as_training_time(digits: Task, device: torch.device, clock: Time) -> None:
    """Oracle: a clock that a step moves by 1, and a prediction by 100."""

    class Slow(Backprop):
        def credit(self, batch: Batch, step: Step) -> Any:
            clock.now += 1
            return super().credit(batch, step)

        def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
            clock.now += 100
            return super().predict(inputs, generator)

    run = Trainer(rule_on(digits, Slow), digits, config_of(device)).fit()
    assert run.result["train/seconds"] == run.result["train/steps"] > 0
    assert clock.now >= run.result["train/steps"] + 100 * 2 * 3  # two splits are evaluated after each of three epochs


@pytest.mark.parametrize("factory", [Exploding, Silent])
def test_divergence_ends_a_run_as_diverged(digits: Task, device: torch.device, tmp_path: Path, factory: type[Rule]) -> None:
    run = Trainer(rule_on(digits, factory), digits, config_of(device, budget=BudgetConfig(epochs=9)), folder=tmp_path).fit()
    assert run.status == "diverged"
    assert "nan" in run.reason or "not finite" in run.reason
    assert "test/accuracy" not in run.result
    saved = read_checkpoint(tmp_path / "checkpoints" / "last.pt")  # the last good one
    assert all(bool(torch.isfinite(value).all()) for value in saved["weights"].values())


def test_validation_chooses_and_test_is_evaluated_once(digits: Task, device: torch.device, tmp_path: Path) -> None:
    """The tested weights are the best epoch's: a rule that ruins itself after its second epoch shows it."""

    class Ruined(Backprop):
        def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
            metrics = super().credit(batch, step)
            if step.epoch >= 2:
                for p in self.parameters():
                    p.grad = torch.ones_like(p)
            return metrics

    rule = rule_on(digits, Ruined)
    run = Trainer(rule, digits, config_of(device, select="best-val", budget=BudgetConfig(epochs=4)), folder=tmp_path).fit()
    scores = [metrics["val/accuracy"] for metrics in run.history]
    assert max(scores[:2]) > max(scores[2:])
    assert run.result["val/accuracy_selected"] == max(scores)
    assert run.result["test/accuracy"] > 0.3
    assert_equal_bits(weights(rule), read_checkpoint(tmp_path / "checkpoints" / "selected.pt")["weights"])
    with pytest.raises(UsageError, match="no best weights"):
        Trainer(rule, Task.from_source(DIGITS, validation=0), config_of(device, select="best-val"))


def test_a_selected_loss_may_be_negative(device: torch.device) -> None:
    """It is reported as a loss, and the smallest is chosen, whatever its sign."""

    class Shifted(TaskSpec):
        def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
            return super().loss(outputs, batch) - 50

    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    parts = [Split(x[part], x[part, :1]) for part in (slice(0, 120), slice(120, 160), slice(160, 200))]
    task = Task(Shifted("shifted", (4,), 1, "real"), *parts)
    run = Trainer(rule_on(task), task, config_of(device, select="best-val", budget=BudgetConfig(epochs=2))).fit()
    assert run.result["val/loss_selected"] == min(metrics["val/loss"] for metrics in run.history) < 0
    assert "val/accuracy_selected" not in run.result


def test_the_whole_training_set_can_be_used(device: torch.device) -> None:
    whole = Task.from_source(DIGITS, validation=0)
    run = Trainer(rule_on(whole), whole, config_of(device)).fit()
    assert run.result["train/samples"] == 3 * len(whole.train)
    assert not any(name.startswith("val/") for name in run.history[-1])
    assert "train/accuracy" in run.history[-1]


def test_predict_sees_no_targets_and_no_training_mode(digits: Task, device: torch.device) -> None:
    class Curious(Backprop):
        seen: list[Any] = []

        def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
            self.seen.append((type(inputs), self.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
            return super().predict(inputs, generator)

    Trainer(rule_on(digits, Curious), digits, config_of(device)).fit()
    assert set(Curious.seen) == {(Tensor, False, False, False)}


def test_evaluating_more_often_changes_no_weight(digits: Task, device: torch.device) -> None:
    results = []
    for every in (1, 3):
        rule = noisy(digits)
        Trainer(rule, digits, config_of(device, evaluation=EvaluationConfig(every=every), deterministic=True)).fit()
        results.append(weights(rule))
    assert_equal_bits(*results)


def test_splits_do_not_depend_on_the_runs_seed_and_are_disjoint_and_stratified() -> None:
    one, other = Task.from_source(DIGITS), Task.from_source(DIGITS, split_seed=1)
    assert one.fingerprint() == Task.from_source(DIGITS).fingerprint() != other.fingerprint()
    assert torch.equal(one.test.inputs, other.test.inputs)
    assert one.validation is not None
    rows = [set(map(bytes, split.inputs.flatten(1).mul(16).byte().numpy())) for split in (one.train, one.validation, one.test)]
    assert not any(a & b for a, b in itertools.combinations(rows, 2))
    shares = torch.bincount(one.validation.targets) / (torch.bincount(one.train.targets) + torch.bincount(one.validation.targets))
    assert bool(((shares - 0.1).abs() < 0.02).all())


def test_gradient_accumulation_and_clipping_in_the_trainer(digits: Task, device: torch.device) -> None:
    """Accumulation gives the large batch's weights up to rounding (float32, 21 steps)."""
    results = []
    for parts in (1, 4):
        rule = rule_on(digits)
        config = config_of(
            device, accumulate=parts, clip=ClipConfig(norm=0.5), budget=BudgetConfig(epochs=1), optimizer=OptimizerConfig("sgd", lr=0.1)
        )
        Trainer(rule, digits, config).fit()
        results.append(weights(rule))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-3, atol=1e-5)


def test_rules_that_apply_themselves_exclude_what_the_core_cannot_offer(digits: Task) -> None:
    class Own(Backprop):
        traits_of = always(Traits(update="in-place"))

    with pytest.raises(UsageError, match="cannot be accumulated"):
        Trainer(rule_on(digits, Own), digits, TrainConfig(accumulate=2, device="cpu"))
    with pytest.raises(UsageError, match="no gradients to clip"):
        Trainer(rule_on(digits, Own), digits, TrainConfig(clip=ClipConfig(norm=1.0), device="cpu"))


def test_bf16_learns_as_fp32_does(digits: Task, device: torch.device) -> None:
    """Step by step on the weights of that step: a cast copy that grew stale would fall far behind."""
    losses = []
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        rule = Backprop(vgg(digits.spec, VGGConfig(channels=[8, 16], pool_after=[1, 2])), digits.spec)
        run = Trainer(rule, digits, config_of(device, precision=precision, budget=BudgetConfig(epochs=4))).fit()
        assert all(p.dtype == torch.float32 for p in rule.parameters())
        losses.append(run.history[-1]["rule/loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_the_twin_changes_nothing_but_the_readout(digits: Task, device: torch.device) -> None:
    rule = rule_on(digits, DFA)
    before = weights(rule)
    Trainer(rule, digits, config_of(device, twin=True)).fit()
    changed = {name for name, value in weights(rule).items() if not torch.equal(value, before[name])}
    assert changed == {"network.blocks.readout.weight", "network.blocks.readout.bias"}


def test_the_twin_of_a_rule_is_the_rule_frozen(digits: Task, device: torch.device) -> None:
    twin, frozen = rule_on(digits, DFA), rule_on(digits, Frozen)
    rate = OptimizerConfig(lr=0.002)
    Trainer(twin, digits, config_of(device, twin=True, deterministic=True, optimizer=rate)).fit()
    Trainer(frozen, digits, config_of(device, deterministic=True, optimizer=rate)).fit()
    for name, value in frozen.network.state_dict().items():
        torch.testing.assert_close(value, twin.network.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_an_observer_that_fails_is_dropped_and_the_run_goes_on(
    digits: Task, device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        @hookimpl
        def epoch_end(self, run: Run, metrics: Mapping[str, float]) -> None:
            raise RuntimeError("no")

    run = Trainer(rule_on(digits), digits, config_of(device), observers=[Broken()]).fit()
    assert run.status == "finished"
    assert [record.getMessage() for record in caplog.records] == ["observer Broken failed in epoch_end and is dropped; the run continues"]


def test_observers_with_wrong_hooks_are_refused(digits: Task) -> None:
    class Wrong:
        @hookimpl
        def epoch_end(self, nonsense: int) -> None: ...

    with pytest.raises(Exception, match="nonsense"):
        Trainer(rule_on(digits), digits, TrainConfig(device="cpu"), observers=[Wrong()])


def test_memory_of_a_step_grows_with_depth_for_backprop(digits: Task, device: torch.device) -> None:
    """Parameters, gradients, Adam's two moments: at least four times the parameters; and no data set in it."""
    run = Trainer(rule_on(digits, width=256), digits, config_of(device, budget=BudgetConfig(epochs=1))).fit()
    parameters = run.result["parameters"] * 4 / 2**20
    assert 4 * parameters < run.result["train/peak_memory_mb"] < 8 * parameters


def test_training_inside_a_profiler(digits: Task, device: torch.device) -> None:
    """Torch has one profiler at a time: the user's wins, and the memory of a step is then not known."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        run = Trainer(rule_on(digits), digits, config_of(device, budget=BudgetConfig(epochs=1))).fit()
    assert run.status == "finished"
    assert "train/peak_memory_mb" not in run.result
    assert "peak_memory_mb" not in run.history[0]


def test_micro_batches_are_never_of_one_example(digits: Task, device: torch.device) -> None:
    """1,295 examples leave a last batch of 15: eight parts of two would leave one, which batch norm refuses."""
    rule = rule_on(digits, norm="batch")
    assert Trainer(rule, digits, config_of(device, accumulate=8, budget=BudgetConfig(epochs=1))).fit().status == "finished"


def test_a_rule_that_fails_before_the_first_step_is_recorded(digits: Task, device: torch.device) -> None:
    class Unprepared(Backprop):
        def prepare(self, data: Any, generator: torch.Generator) -> None:
            raise ValueError("no prototype")

    trainer = Trainer(rule_on(digits, Unprepared), digits, config_of(device))
    with pytest.raises(ValueError, match="no prototype"):
        trainer.fit()
    assert (trainer.run.status, trainer.run.reason) == ("failed", "ValueError: no prototype")


def test_weights_that_are_not_finite_are_never_the_best(digits: Task, device: torch.device, tmp_path: Path) -> None:
    run = Trainer(
        rule_on(digits, Silent), digits, config_of(device, select="best-val", budget=BudgetConfig(epochs=9)), folder=tmp_path
    ).fit()
    assert run.status == "diverged"
    best = read_checkpoint(tmp_path / "checkpoints" / "selected.pt")["weights"]
    assert all(bool(torch.isfinite(value).all()) for value in best.values())
