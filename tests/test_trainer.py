"""The trainer: budgets, seeds, resuming, divergence, and what it gives back. Oracles: identities between runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bpfree import (
    Batch,
    BpfreeError,
    Budget,
    OptimizerConfig,
    Phase,
    Rule,
    Run,
    ScheduleConfig,
    Step,
    Task,
    Trainer,
    Traits,
    UsageError,
    hookimpl,
)
from bpfree.baselines import DFA, Backprop, Frozen
from bpfree.network import MLPConfig, VGGConfig, mlp, vgg
from bpfree.tasks.digits import DIGITS
from bpfree.training.checkpoint import read_checkpoint
from bpfree.training.config import BudgetConfig, CheckpointConfig, EvaluationConfig, TrainConfig
from bpfree.training.trainer import Interrupted
from bpfree.training.updater import ClipConfig


def rule_on(task: Task, factory: type[Rule] = Backprop, **sizes: Any) -> Rule:
    torch.manual_seed(0)
    return factory(mlp(task.spec, MLPConfig(**{"depth": 2, "width": 32, **sizes})), task.spec)


def config_of(device: torch.device, **options: Any) -> TrainConfig:
    budget = options.pop("budget", BudgetConfig(epochs=3))
    return TrainConfig(**{"device": str(device), "budget": budget, "log_interval": 0.01, **options})


def weights(rule: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in rule.state_dict().items()}


def assert_equal_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


class StopAfter:
    """An observer that asks the trainer to stop after so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.trainer: Trainer | None = None

    @hookimpl
    def step_end(self, run: Run, step: Step) -> None:
        if step.index == self.steps and self.trainer is not None:
            self.trainer.stop("the test asked")


class NoisyPhases(DFA):
    """Uses everything that a checkpoint must hold: both kinds of generator, dropout, batch norm, phases, growth, own groups."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.gain = nn.Parameter(torch.zeros(spec.outputs))

    def phases(self, budget: Budget) -> Iterable[Phase]:
        yield Phase("all", epochs=1)
        yield Phase("readout", epochs=1, groups=("readout", "rule"), batch_size=32, optimizer=OptimizerConfig("sgd", lr=0.05, momentum=0.9))
        yield Phase("grown", epochs=2, reset=("b1",), schedule=ScheduleConfig("cosine"))

    def start_phase(self, phase: Phase) -> None:
        if phase.name == "grown":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(7)
                self.extra = nn.Linear(self.spec.outputs, self.spec.outputs)

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        device = batch.inputs.device
        noise = torch.randn(batch.inputs.shape, generator=step.generator, device=device)
        keyed = torch.randn(batch.inputs.shape, generator=step.generator_for("b1"), device=device)
        metrics = super().credit(Batch(batch.inputs + 0.1 * noise + 0.1 * keyed, batch.targets), step)
        if hasattr(self, "extra"):
            loss = self.spec.loss(self.extra(self.network(batch.inputs).detach()) + self.gain, batch)
            loss.backward()
        return metrics


def noisy(task: Task) -> Rule:
    torch.manual_seed(0)
    return NoisyPhases(mlp(task.spec, MLPConfig(depth=2, width=32, norm="batch", dropout=0.2)), task.spec)


def test_same_seed_same_bits_and_another_seed_other_bits(digits: Task, device: torch.device) -> None:
    results = []
    for seed in (0, 0, 1):
        rule = noisy(digits)
        Trainer(rule, digits, config_of(device, seed=seed, deterministic=True)).fit()
        results.append(weights(rule))
    assert_equal_bits(results[0], results[1])
    assert any(not torch.equal(results[0][name], results[2][name]) for name in results[0])


@pytest.mark.parametrize("at", [1, 20, 21, 25, 55, 70, 100])
def test_interrupted_anywhere_and_resumed_ends_with_the_same_bits(digits: Task, device: torch.device, tmp_path: Path, at: int) -> None:
    """Steps 1 to 21 are the first phase's epoch, to 62 the second's (batches of 32), to 104 the third's two; metrics agree too."""
    config = config_of(device, deterministic=True)
    straight = noisy(digits)
    expected = Trainer(straight, digits, config).fit()
    interrupted = noisy(digits)
    watch = StopAfter(at)
    watch.trainer = Trainer(interrupted, digits, config, folder=tmp_path / "run", observers=[watch])
    with pytest.raises(Interrupted, match="the test asked"):
        watch.trainer.fit()
    assert watch.trainer.run.status == "interrupted"
    resumed = noisy(digits)
    run = Trainer(resumed, digits, config, folder=tmp_path / "run").fit(tmp_path / "run" / "checkpoints" / "last.pt")
    assert_equal_bits(weights(resumed), weights(straight))
    untimed = [{k: v for k, v in m.items() if k not in ("seconds", "samples_per_second", "step_ms", "peak_memory_mb")} for m in run.history]
    wanted = [
        {k: v for k, v in m.items() if k not in ("seconds", "samples_per_second", "step_ms", "peak_memory_mb")} for m in expected.history
    ]
    assert untimed == wanted
    assert run.result["test/accuracy"] == expected.result["test/accuracy"]


def test_resuming_a_finished_run_gives_its_result_again(digits: Task, device: torch.device, tmp_path: Path) -> None:
    rule = noisy(digits)
    first = Trainer(rule, digits, config_of(device), folder=tmp_path).fit()
    again = noisy(digits)
    second = Trainer(again, digits, config_of(device), folder=tmp_path).fit(tmp_path / "checkpoints" / "last.pt")
    assert_equal_bits(weights(rule), weights(again))
    assert second.result["test/accuracy"] == first.result["test/accuracy"]


def test_a_longer_budget_goes_on_from_the_last_checkpoint(digits: Task, device: torch.device, tmp_path: Path) -> None:
    straight = rule_on(digits)
    Trainer(straight, digits, config_of(device, budget=BudgetConfig(epochs=4), deterministic=True)).fit()
    rule = rule_on(digits)
    Trainer(rule, digits, config_of(device, budget=BudgetConfig(epochs=2), deterministic=True), folder=tmp_path).fit()
    more = rule_on(digits)
    Trainer(more, digits, config_of(device, budget=BudgetConfig(epochs=4), deterministic=True), folder=tmp_path).fit(
        tmp_path / "checkpoints" / "last.pt"
    )
    assert_equal_bits(weights(more), weights(straight))


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


def test_evaluation_is_not_counted_as_training_time(digits: Task, device: torch.device) -> None:
    import time

    class Slow(Backprop):
        def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
            time.sleep(0.2)
            return super().predict(inputs, generator)

    run = Trainer(rule_on(digits, Slow), digits, config_of(device)).fit()
    assert run.result["train/seconds"] < 0.2 * 2 * 3  # two splits are evaluated after each of three epochs


class Exploding(Backprop):
    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        metrics = super().credit(batch, step)
        if step.index == 30:
            with torch.no_grad():
                next(self.parameters()).fill_(float("nan"))
        return metrics


class Silent(Exploding):
    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        return super().credit(batch, step) and {}


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
        traits = Traits(update="in-place")

    with pytest.raises(UsageError, match="cannot be accumulated"):
        Trainer(rule_on(digits, Own), digits, TrainConfig(accumulate=2, device="cpu"))
    with pytest.raises(UsageError, match="no gradients to clip"):
        Trainer(rule_on(digits, Own), digits, TrainConfig(clip=ClipConfig(norm=1.0), device="cpu"))


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


def test_the_frozen_twin_changes_nothing_but_the_readout(digits: Task, device: torch.device) -> None:
    rule = rule_on(digits, DFA)
    before = weights(rule)
    Trainer(rule, digits, config_of(device, frozen_twin=True)).fit()
    changed = {name for name, value in weights(rule).items() if not torch.equal(value, before[name])}
    assert changed == {"network.blocks.readout.weight", "network.blocks.readout.bias"}


def test_the_frozen_twin_of_a_rule_is_the_rule_frozen(digits: Task, device: torch.device) -> None:
    twin, frozen = rule_on(digits, DFA), rule_on(digits, Frozen)
    rate = OptimizerConfig(lr=0.002)
    Trainer(twin, digits, config_of(device, frozen_twin=True, deterministic=True, optimizer=rate)).fit()
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
    assert [record.getMessage() for record in caplog.records] == ["observer Broken failed in epoch_end and is dropped; the run goes on"]


def test_observers_with_wrong_hooks_are_refused(digits: Task) -> None:
    class Wrong:
        @hookimpl
        def epoch_end(self, nonsense: int) -> None: ...

    with pytest.raises(Exception, match="nonsense"):
        Trainer(rule_on(digits), digits, TrainConfig(device="cpu"), observers=[Wrong()])


def test_checkpoints_of_other_rules_data_or_files_are_refused(digits: Task, device: torch.device, tmp_path: Path) -> None:
    Trainer(rule_on(digits), digits, config_of(device, budget=BudgetConfig(epochs=1)), folder=tmp_path).fit()
    path = tmp_path / "checkpoints" / "last.pt"
    with pytest.raises(BpfreeError, match="another rule: Backprop, not DFA"):
        Trainer(rule_on(digits, DFA), digits, config_of(device)).fit(path)
    with pytest.raises(BpfreeError, match="other data"):
        Trainer(rule_on(digits), Task.from_source(DIGITS, split_seed=3), config_of(device)).fit(path)
    with pytest.raises(BpfreeError, match="do not fit"):
        Trainer(rule_on(digits, width=31), digits, config_of(device)).fit(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BpfreeError, match="cannot read the checkpoint"):
        Trainer(rule_on(digits), digits, config_of(device)).fit(path)


def test_a_checkpoint_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bpfree.training import checkpoint

    path = tmp_path / "last.pt"
    checkpoint.write_checkpoint(path, {"weights": {"w": torch.ones(3)}})

    def torn(content: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_checkpoint(path, {"weights": {}})
    assert torch.equal(read_checkpoint(path)["weights"]["w"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_checkpoints_by_time_in_the_middle_of_an_epoch(digits: Task, device: torch.device, tmp_path: Path) -> None:
    saved: list[int] = []

    class Watch:
        @hookimpl
        def checkpoint_saved(self, run: Run, path: Path) -> None:
            saved.append(read_checkpoint(path)["training"]["position"]["batch"])

    config = config_of(device, checkpoint=CheckpointConfig(every=0, minutes=1e-6), budget=BudgetConfig(epochs=2))
    Trainer(rule_on(digits), digits, config, folder=tmp_path, observers=[Watch()]).fit()
    assert any(batch > 0 for batch in saved)


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
    assert run.result["train/peak_memory_mb"] == 0


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


def test_samples_are_drawn_in_full_although_passes_drop_a_single_example(digits: Task, device: torch.device) -> None:
    part = Task(digits.spec, digits.train.subset(torch.arange(65)), digits.validation, digits.test)
    run = Trainer(rule_on(part), part, config_of(device, batch_size=16, budget=BudgetConfig(samples=650))).fit()
    assert 650 <= run.result["train/samples"] < 666


@pytest.mark.parametrize("every", [0, 1, 2])
def test_a_finished_run_goes_on_whatever_its_checkpoint_interval(digits: Task, device: torch.device, tmp_path: Path, every: int) -> None:
    options = {"checkpoint": CheckpointConfig(every=every), "deterministic": True}
    Trainer(rule_on(digits), digits, config_of(device, budget=BudgetConfig(epochs=1), **options), folder=tmp_path).fit()
    more = rule_on(digits)
    run = Trainer(more, digits, config_of(device, **options), folder=tmp_path).fit(tmp_path / "checkpoints" / "last.pt")
    assert [metrics["epoch"] for metrics in run.history] == [1, 2, 3]
    straight = rule_on(digits)
    Trainer(straight, digits, config_of(device, **options)).fit()
    assert_equal_bits(weights(more), weights(straight))


def test_micro_batches_are_never_of_one_example(digits: Task, device: torch.device) -> None:
    """1,295 examples leave a last batch of 15: eight parts of two would leave one, which batch norm refuses."""
    rule = rule_on(digits, norm="batch")
    assert Trainer(rule, digits, config_of(device, accumulate=8, budget=BudgetConfig(epochs=1))).fit().status == "finished"


def test_a_trainer_that_was_stopped_can_go_on(digits: Task, device: torch.device, tmp_path: Path) -> None:
    watch = StopAfter(5)
    watch.trainer = Trainer(rule_on(digits), digits, config_of(device), folder=tmp_path, observers=[watch])
    with pytest.raises(Interrupted):
        watch.trainer.fit()
    run = watch.trainer.fit(tmp_path / "checkpoints" / "last.pt")
    assert run.status == "finished"
    assert run.epoch == 3


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
