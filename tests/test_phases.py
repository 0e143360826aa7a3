"""Phases, budgets and schedules: what ends when. Oracles: counts and closed forms."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_rules import config_of, rule_on

from bpfree import (
    Budget,
    OptimizerConfig,
    Phase,
    Rule,
    Run,
    ScheduleConfig,
    Step,
    Task,
    UsageError,
    hookimpl,
)
from bpfree.baselines import Backprop
from bpfree.errors import BpfreeError
from bpfree.network.network import evaluating
from bpfree.tasks.loading import Loader
from bpfree.training.alignment import AlignmentConfig
from bpfree.training.checkpoint import read_checkpoint
from bpfree.training.config import BudgetConfig
from bpfree.training.features import FeatureLoader, feature_split
from bpfree.training.meters import Clock
from bpfree.training.trainer import Interrupted, Trainer


@pytest.mark.parametrize("budget", [{"epochs": 2}, {"samples": 2000}, {"seconds": 0.3}])
def test_budgets_end_a_run(digits: Task, device: torch.device, budget: dict[str, Any]) -> None:
    run = Trainer(rule_on(digits), digits, config_of(device, budget=BudgetConfig(**budget))).fit()
    result = run.result
    if "epochs" in budget:
        assert result["train/samples"] == 2 * len(digits.train)
    if "samples" in budget:  # up to a batch more
        assert 2000 <= result["train/samples"] < 2000 + 64
    if "seconds" in budget:
        assert 0.3 <= result["train/seconds"] < 5
    assert run.status == "finished"
    assert "val/accuracy" in run.history[-1]


def test_one_limit_per_budget() -> None:
    with pytest.raises(UsageError, match="one limit"):
        BudgetConfig(epochs=1, seconds=2).resolve(100)
    assert BudgetConfig(samples=101).resolve(100) == Budget(epochs=2, samples=101)
    assert BudgetConfig().resolve(100) == Budget(epochs=10)


@pytest.mark.parametrize("name", ["linear", "cosine", "milestones", "StepLR", "constant"])
def test_schedules(digits: Task, device: torch.device, name: str) -> None:
    """Closed forms at the last step of each of four epochs (of 21 steps), base rate 0.1."""
    seen: list[float] = []

    class Watch:
        @hookimpl
        def step_end(self, run: Run, step: Step) -> None:
            if step.index % 21 == 0:
                seen.append(step.lr("b1"))

    options = {"step_size": 2, "gamma": 0.1} if name == "StepLR" else {}
    schedule = ScheduleConfig(name, milestones=[0.5], gamma=0.5, options=options, warmup=0.0)
    config = config_of(device, budget=BudgetConfig(epochs=4), optimizer=OptimizerConfig("sgd", lr=0.1), schedule=schedule)
    Trainer(rule_on(digits), digits, config, observers=[Watch()]).fit()
    progress = torch.tensor([20 / 84, 41 / 84, 62 / 84, 83 / 84], dtype=torch.float64)
    expected = {
        "constant": torch.full((4,), 0.1),
        "linear": 0.1 * (1 - progress),
        "cosine": 0.05 * (1 + torch.cos(torch.pi * progress)),
        "milestones": torch.tensor([0.1, 0.1, 0.05, 0.05]),
        "StepLR": torch.tensor([0.1, 0.1, 0.01, 0.01]),
    }[name]
    torch.testing.assert_close(torch.tensor(seen, dtype=torch.float64), expected.double())


class Solving(Backprop):
    """Solves its readout when the phase ends, as least-squares rules do."""

    def end_phase(self, phase: Phase, step: Step) -> None:
        with torch.no_grad():
            self.network.blocks["readout"].weight.fill_(7.0)


@pytest.mark.parametrize("select", ["last", "best-val"])
def test_what_end_phase_solves_is_evaluated_saved_and_tested(digits: Task, device: torch.device, tmp_path: Path, select: str) -> None:
    seen: list[float] = []

    class Watched(Solving):
        def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
            seen.append(float(self.network.blocks["readout"].weight[0, 0]))
            return super().predict(inputs, generator)

    rule = rule_on(digits, Watched)
    Trainer(rule, digits, config_of(device, select=select), folder=tmp_path).fit()
    assert 7.0 in seen[:-1]  # validated, before it was tested
    saved = read_checkpoint(tmp_path / "checkpoints" / "last.pt")["weights"]
    assert bool((saved["network.blocks.readout.weight"] == 7).all())


def plan_of(*phases: Phase, endless: bool = False) -> type[Rule]:
    class Planned(Backprop):
        def phases(self, budget: Budget) -> Iterable[Phase]:
            return itertools.cycle(phases) if endless else iter(phases)

    return Planned


@pytest.mark.parametrize(
    ("factory", "passes"),
    [
        (plan_of(Phase("open")), 3),
        (plan_of(Phase("p", epochs=1), endless=True), 3),
        (plan_of(Phase("a", epochs=2), Phase("b", epochs=2)), 4),
        (plan_of(Phase("a", epochs=2), Phase("solve", epochs=0)), 2),
    ],
    ids=["open", "endless", "two", "empty"],
)
def test_phases_of_all_kinds_end(digits: Task, device: torch.device, factory: type[Rule], passes: int) -> None:
    run = Trainer(rule_on(digits, factory), digits, config_of(device)).fit()
    assert len(run.history) == passes


def test_a_phase_in_seconds_leaves_the_later_ones_their_epochs(digits: Task, device: torch.device) -> None:
    seen: list[str] = []

    class Watch:
        @hookimpl
        def phase_start(self, run: Run, phase: Phase) -> None:
            seen.append(phase.name)

    factory = plan_of(Phase("a", seconds=0.2), Phase("b", epochs=2))
    Trainer(rule_on(digits, factory), digits, config_of(device), observers=[Watch()]).fit()
    assert seen == ["a", "b"]


def test_a_phase_in_seconds_may_end_in_the_middle_of_a_pass(digits: Task, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one whose passes are long would leave none of a budget in seconds to the later ones. A step takes 1/16 of a second here."""
    steps: list[str] = []

    class Halves(Backprop):
        def phases(self, budget: Budget) -> Iterable[Phase]:
            return [Phase(name, seconds=0.5 * (budget.seconds or 0)) for name in ("a", "b")]

        def credit(self, batch: Any, step: Step) -> dict[str, Tensor]:
            steps.append(step.phase.name)
            return super().credit(batch, step)

    monkeypatch.setattr(Clock, "seconds", property(lambda clock: len(steps) / 16, lambda clock, value: None))
    run = Trainer(rule_on(digits, Halves), digits, config_of(device, budget=BudgetConfig(seconds=1))).fit()
    assert steps == ["a"] * 8 + ["b"] * 8
    assert [metrics["steps"] for metrics in run.history] == [8, 16]


def test_samples_are_drawn_in_full_although_passes_drop_a_single_example(digits: Task, device: torch.device) -> None:
    part = Task(digits.spec, digits.train.subset(torch.arange(65)), digits.validation, digits.test)
    run = Trainer(rule_on(part), part, config_of(device, batch_size=16, budget=BudgetConfig(samples=650))).fit()
    assert 650 <= run.result["train/samples"] < 666


class ReadoutLater(Backprop):
    """A phase in which nothing happens to the readout, then one in which it alone learns: on features, or through the network."""

    on_features = True
    seen: list[torch.Size]

    def phases(self, budget: Budget) -> Iterable[Phase]:
        yield Phase("body", epochs=1, groups=("b1", "b2"), evaluate=False)
        yield Phase("readout", epochs=2, groups=("readout",), batch_size=32, on_features=self.on_features)

    def credit(self, batch: Any, step: Step) -> dict[str, Tensor]:
        if not step.phase.on_features:
            return super().credit(batch, step)
        self.seen.append(batch.inputs.shape[1:])
        loss = self.spec.loss(self.read(batch.inputs, step.generator), batch)
        loss.backward()
        return {"loss": loss.detach()}


@pytest.mark.parametrize("case", ["memory", "file", "augmented", "accumulated"])
def test_a_phase_on_features_is_the_phase_through_the_network(
    digits: Task, device: torch.device, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the same phase, each batch through the whole network."""
    from bpfree.tasks.augment import FLIP

    if case == "file":
        monkeypatch.setattr("bpfree.training.features.SHARE_OF_FREE", 0.0)
    results = []
    for on_features in (True, False):
        rule = rule_on(digits, ReadoutLater, norm="batch", depth=2)
        rule.on_features, rule.seen = on_features, []
        config = config_of(device, budget=BudgetConfig(epochs=3), accumulate=2 if case == "accumulated" else 1)
        augment = [FLIP] if case == "augmented" else []
        run = Trainer(rule, digits, config, folder=tmp_path / str(on_features), augment=augment).fit()
        results.append((run, rule.network.blocks["readout"].weight.detach()))
        if on_features:
            width = rule.network.shapes["b2"]
            assert set(rule.seen) == {width}
            assert len(rule.seen) == 2 * -(-len(digits.train) // 32) * config.accumulate
    (one, kept), (other, through) = results
    torch.testing.assert_close(kept, through, rtol=1e-4, atol=1e-5)
    assert [m["samples"] for m in one.history] == [m["samples"] for m in other.history]
    for name in ("train/loss", "val/loss"):
        assert name not in one.history[0]
        for a, b in zip(one.history[1:], other.history[1:], strict=True):
            assert a[name] == pytest.approx(b[name], rel=1e-4)
    assert one.result["test/loss"] == pytest.approx(other.result["test/loss"], rel=1e-4)
    assert not list((tmp_path / "True").glob("features-*"))


class Alternating(ReadoutLater):
    """The features change between two phases on features."""

    def phases(self, budget: Budget) -> Iterable[Phase]:
        for index in range(2):
            yield Phase(f"body {index}", epochs=1, groups=("b1", "b2"))
            yield Phase(f"readout {index}", epochs=1, groups=("readout",), on_features=self.on_features)


def test_features_are_computed_anew_for_each_phase(digits: Task, device: torch.device) -> None:
    """Oracle: the same phases, each batch through the whole network; what is validated between them too."""
    results = []
    for on_features in (True, False):
        rule = rule_on(digits, Alternating, norm="batch", depth=2)
        rule.on_features, rule.seen = on_features, []
        run = Trainer(rule, digits, config_of(device, budget=BudgetConfig(epochs=4))).fit()
        results.append((run.history, rule.network.blocks["readout"].weight.detach()))
    (one, kept), (other, through) = results
    torch.testing.assert_close(kept, through, rtol=1e-4, atol=1e-5)
    for a, b in zip(one, other, strict=True):
        assert (a["train/loss"], a["val/loss"]) == pytest.approx((b["train/loss"], b["val/loss"]), rel=1e-4)


def test_features_are_computed_once_per_split_on_the_clock_and_in_the_runs_precision(
    digits: Task, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: counts. The training split's time is training's, the validation split's is not, nor that of counting operations."""
    calls: list[tuple[int, bool, bool]] = []
    clocks: list[Clock] = []

    class Noted(Clock):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            clocks.append(self)

    monkeypatch.setattr("bpfree.training.state.Clock", Noted)
    rule = rule_on(digits, ReadoutLater, depth=2)
    rule.seen = []
    trainer = Trainer(rule, digits, config_of(device, budget=BudgetConfig(epochs=3), precision="bf16"))
    features = rule.features

    def watched(inputs: Tensor) -> Tensor:
        before = clocks[0].seconds
        calls.append((len(inputs), clocks[0].seconds > before, torch.is_autocast_enabled(device.type)))
        return features(inputs)

    rule.features = watched  # type: ignore[method-assign]
    trainer.fit()
    assert sum(count for count, running, _ in calls if running) == len(digits.train)
    assert digits.validation is not None
    assert sum(count for count, running, _ in calls if not running) == len(digits.validation) + trainer.config.batch_size
    assert all(half for *_, half in calls)


def test_phases_on_features_are_not_compared_with_true_gradients(digits: Task, device: torch.device) -> None:
    rule = rule_on(digits, ReadoutLater, depth=2)
    rule.seen = []
    run = Trainer(rule, digits, config_of(device, budget=BudgetConfig(epochs=3), alignment=AlignmentConfig(every=1))).fit()
    assert [any(name.startswith("alignment/") for name in metrics) for metrics in run.history] == [True, False, False]


def test_features_are_those_of_the_eval_mode(digits: Task, device: torch.device) -> None:
    """Whatever mode the rule is in. Oracle: the network in eval mode; without dropout and with running statistics."""
    rule = rule_on(digits, norm="batch", dropout=0.5).to(device)
    rule.train()
    rule.network(digits.spec.normalise(digits.train.inputs[:100].to(device)))
    raw = Loader(digits.train, digits.spec, batch_size=100, device=device, seed=1)
    batches = list(FeatureLoader(rule, raw).batches(0))
    again = torch.cat([batch.inputs.cpu() for batch in batches])
    assert torch.equal(torch.cat([batch.indices.cpu() for batch in batches]), raw.order(0).cpu())  # the positions of the examples
    kept = feature_split(rule, Loader(digits.train, digits.spec, batch_size=100, device=device)).inputs
    assert all(module.training for module in rule.modules())
    with evaluating(rule), torch.no_grad():
        expected = rule.network.features(digits.spec.normalise(digits.train.inputs.to(device))).cpu()
    torch.testing.assert_close(kept, expected)
    torch.testing.assert_close(again, expected[raw.order(0)])


def test_a_phase_on_features_whose_makers_learn_is_refused(digits: Task, device: torch.device) -> None:
    class Everything(ReadoutLater):
        def phases(self, budget: Budget) -> Iterable[Phase]:
            return [Phase("all", epochs=1, on_features=True)]

    with pytest.raises(BpfreeError, match="'all' is on features, which change while b1, b2 learn"):
        Trainer(rule_on(digits, Everything, depth=2), digits, config_of(device)).fit()


def test_a_run_stopped_while_features_are_computed_goes_on(digits: Task, device: torch.device, tmp_path: Path) -> None:
    """Oracle: the run that was not stopped."""

    def make() -> Trainer:
        rule = rule_on(digits, ReadoutLater, norm="batch", depth=2)
        rule.seen = []
        return Trainer(rule, digits, config_of(device, budget=BudgetConfig(epochs=3)), folder=tmp_path)

    whole = make()
    expected = whole.fit().result["test/loss"]
    trainer = make()
    features = trainer.rule.features

    def stopping(inputs: Any) -> Tensor:
        trainer.stop()
        return features(inputs)

    trainer.rule.features = stopping  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        trainer.fit()
    assert trainer.run.epoch == 1
    assert make().fit(tmp_path / "checkpoints" / "last.pt").result["test/loss"] == expected
