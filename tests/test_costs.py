"""What a run costs in seconds, of wall and of processor. Oracle: a clock that the rules move."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_time import Time
from torch import Tensor, nn
from training_rules import Exploding, StopAfter, config_of, rule_on

from bpfree import Batch, Budget, Phase, Run, Split, Step, Task, TaskSpec, new_step
from bpfree.baselines import Backprop
from bpfree.cli.output import print_result
from bpfree.training.checkpoint import read_checkpoint
from bpfree.training.compiling import Compilation
from bpfree.training.config import BudgetConfig
from bpfree.training.meters import Clock
from bpfree.training.probes import Take, take_step
from bpfree.training.trainer import Interrupted, Trainer

EXAMPLES, FULL, PARTIAL = 1295, 20, 1
"""Of digits; batches of 64 in a pass, and a last one of 15."""


def watched() -> bool:
    """Whether somebody counts or profiles."""
    return torch.utils._python_dispatch._get_current_dispatch_mode() is not None or torch.autograd.profiler._is_profiler_enabled


class Slow(Backprop):
    """Takes known times: 7 to prepare, a half to start and 3 to end a phase, 1 for a step (a quarter for a small one), twice that more
    where it is measured."""

    time: Time
    parts: tuple[str, ...] = ("prepare", "start", "end")

    def prepare(self, data: Split, generator: torch.Generator) -> None:
        self.time.now += 7 * ("prepare" in self.parts)

    def start_phase(self, phase: Phase) -> None:
        self.time.now += 0.5 * ("start" in self.parts)

    def end_phase(self, phase: Phase, step: Step) -> None:
        self.time.now += 3 * ("end" in self.parts)

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        self.time.now += (1 if len(batch) > 15 else 0.25) * (3 if watched() else 1)
        return super().credit(batch, step)

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        self.time.now += 1000  # evaluation is not training
        return super().predict(inputs, generator)


def slow(task: Task, clock: Time, factory: type[Slow] = Slow) -> Slow:
    rule = rule_on(task, factory)
    assert isinstance(rule, Slow)
    rule.time = clock
    return rule


# --- seconds ------------------------------------------------------------------------------------------------------------


def test_what_is_prepared_solved_and_measured_is_charged(digits: Task, device: torch.device, clock: Time) -> None:
    """Two passes: measured steps at what the others of their size take; the small one of the first pass, alone so far, at its own time."""
    run = Trainer(slow(digits, clock), digits, config_of(device, budget=BudgetConfig(epochs=2))).fit()
    first = 7.5 + FULL + 0.75
    assert [m["seconds"] for m in run.history] == pytest.approx([first, 7.5 + 2 * (FULL + 0.25) + 3])
    assert run.result["train/seconds"] == pytest.approx(51)
    assert run.result["train/processor_seconds"] == pytest.approx(51 / 2)
    assert run.history[0]["processor_seconds"] == pytest.approx(first / 2)
    before = 0.0
    for metrics in run.history:
        spent, before = metrics["seconds"] - before, metrics["seconds"]
        assert metrics["step_ms"] * (FULL + PARTIAL) / 1000 == pytest.approx(spent)
        assert EXAMPLES / metrics["samples_per_second"] == pytest.approx(spent)
    assert run.result["train/samples_per_second"] == pytest.approx(2 * EXAMPLES / 51)


class WholeSet(Slow):
    """One step on everything, or several."""

    passes = 1

    def phases(self, budget: Budget) -> Iterable[Phase]:
        return [Phase("all", epochs=self.passes, batch_size="all")]


def test_a_rule_of_one_step_reports_its_own_time(digits: Task, device: torch.device, clock: Time) -> None:
    run = Trainer(slow(digits, clock, WholeSet), digits, config_of(device)).fit()
    assert run.result["train/steps"] == 1
    assert run.result["train/seconds"] == pytest.approx(7 + 0.5 + 3 + 3)
    assert run.history[0]["step_ms"] == pytest.approx(13_500)


def test_seconds_never_go_back_while_a_charge_becomes_smaller(
    digits: Task, device: torch.device, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes of one step: the first and the third are measured. Until the second is timed, the first counts three."""
    monkeypatch.setattr(WholeSet, "passes", 5)
    monkeypatch.setattr(WholeSet, "parts", ())
    run = Trainer(slow(digits, clock, WholeSet), digits, config_of(device)).fit()
    assert [m["seconds"] for m in run.history] == pytest.approx([3, 3, 3, 4, 5])
    assert ["step_ms" in m for m in run.history] == [True, False, False, True, True]
    assert ["samples_per_second" in m for m in run.history] == [True, False, False, True, True]


def test_without_a_passing_second_there_is_no_speed(
    digits: Task, device: torch.device, clock: Time, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Trainer(rule_on(digits), digits, config_of(device)).fit()
    assert run.result["train/seconds"] == 0
    assert "train/samples_per_second" not in run.result
    assert not any({"samples_per_second", "step_ms"} & m.keys() for m in run.history)
    print_result(run)
    assert "0 s (0 s of processor time), 63 steps" in capsys.readouterr().out


@pytest.mark.parametrize("at", [1, 3, 12, 21, 22, 40])
def test_a_run_that_goes_on_costs_the_same(digits: Task, device: torch.device, clock: Time, tmp_path: Path, at: int) -> None:
    """What it had prepared and begun is not charged twice."""
    config = config_of(device)
    straight = Trainer(slow(digits, clock), digits, config).fit()
    watch = StopAfter(at)
    watch.trainer = Trainer(slow(digits, clock), digits, config, folder=tmp_path, observers=[watch])
    with pytest.raises(Interrupted):
        watch.trainer.fit()
    run = Trainer(slow(digits, clock), digits, config, folder=tmp_path).fit(tmp_path / "checkpoints" / "last.pt")
    for key in ("train/seconds", "train/processor_seconds", "train/operations"):
        assert run.result[key] == pytest.approx(straight.result[key])
    assert [m["seconds"] for m in run.history] == pytest.approx([m["seconds"] for m in straight.history])


def test_an_older_checkpoint_has_no_processor_seconds(digits: Task, device: torch.device, clock: Time, tmp_path: Path) -> None:
    Trainer(slow(digits, clock), digits, config_of(device, budget=BudgetConfig(epochs=1)), folder=tmp_path).fit()
    path = tmp_path / "checkpoints" / "last.pt"
    saved = read_checkpoint(path)
    del saved["training"]["clock"], saved["training"]["load"], saved["training"]["memory"]["watched"]
    del saved["digest"]  # as it was before there were any
    torch.save(saved, path)
    run = Trainer(slow(digits, clock), digits, config_of(device, budget=BudgetConfig(epochs=2)), folder=tmp_path).fit(path)
    assert run.result["train/seconds"] == pytest.approx(saved["training"]["seconds"] + FULL + 0.75 - 0.5 + 3)
    assert not any("processor" in key for key in run.result)
    assert "processor_seconds" in run.history[0]
    assert "processor_seconds" not in run.history[1]


def test_a_budget_of_seconds_pays_for_what_is_prepared(digits: Task, device: torch.device, clock: Time) -> None:
    """Seven are gone before the first step; a measured step is charged when the pass ends."""
    run = Trainer(slow(digits, clock), digits, config_of(device, budget=BudgetConfig(seconds=12))).fit()
    assert run.status == "finished"
    assert 5 <= run.result["train/steps"] <= 7
    assert 12 <= run.result["train/seconds"] <= 7.5 + run.result["train/steps"] + 3


class ByTheClock(Slow):
    def phases(self, budget: Budget) -> Iterable[Phase]:
        return [Phase("one", seconds=5), Phase("two", epochs=1)]


def test_phases_that_end_by_seconds_have_them_for_themselves(digits: Task, device: torch.device, clock: Time) -> None:
    steps: dict[str, int] = {}

    class Watch:
        from bpfree import hookimpl

        @hookimpl
        def step_end(self, step: Step) -> None:
            steps[step.phase.name] = steps.get(step.phase.name, 0) + 1

    run = Trainer(slow(digits, clock, ByTheClock), digits, config_of(device, budget=BudgetConfig(epochs=9)), observers=[Watch()]).fit()
    assert run.status == "finished"
    assert 5 <= steps["one"] <= 7  # what was prepared is not the phase's, what it starts with is
    assert steps["two"] == FULL + PARTIAL


def test_a_diverged_run_has_its_costs(digits: Task, device: torch.device) -> None:
    run = Trainer(rule_on(digits, Exploding), digits, config_of(device)).fit()
    assert run.status == "diverged"
    assert run.result["train/seconds"] >= run.history[-1]["seconds"] > 0
    assert run.result["train/processor_seconds"] > 0


def test_the_load_of_the_machine(digits: Task, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    cores = os.cpu_count() or 1
    monkeypatch.setattr(os, "getloadavg", lambda: (1.5 * cores, 0.0, 0.0))
    config = config_of(device, budget=BudgetConfig(epochs=1))
    run = Trainer(rule_on(digits), digits, config).fit()
    assert (run.result["load_start"], run.result["load_end"]) == (1.5, 1.5)

    def unknown() -> None:
        raise OSError

    monkeypatch.setattr(os, "getloadavg", unknown)
    assert not any("load_" in key for key in Trainer(rule_on(digits), digits, config).fit().result)


# --- the clock itself ----------------------------------------------------------------------------------------------------


def test_a_step_that_compiles_is_taken_back_whether_it_was_measured_or_not(clock: Time) -> None:
    meter = Clock(torch.device("cpu"))
    meter.start()
    for measured in (False, True):
        meter.step("a")
        mark = meter.mark()
        if measured:
            with meter.stopped(), meter.measuring():
                clock.now += 5
        else:
            clock.now += 5
        assert meter.forget(mark) == 5
    for _ in range(2):
        meter.step("a")
        clock.now += 1
    meter.step("a")
    with meter.stopped(), meter.measuring():
        clock.now += 9
    meter.stop()
    meter.settle()
    assert meter.seconds == 3


def test_probes_surround_the_steps_that_they_want(clock: Time) -> None:
    """Oracle: a step of one second. What probes do is not on the clock; the step that one of them slows is charged by the others."""
    meter = Clock(torch.device("cpu"))
    order: list[str] = []

    class Noting:
        def __init__(self, name: str, at: int, *, slow: bool) -> None:
            self.name, self.at, self.slow = name, at, slow

        def wants(self, batch: Batch, step: Step) -> bool:
            return step.index == self.at

        def around(self, take: Take, clock: Clock, batch: Batch, step: Step) -> dict[str, Tensor]:
            order.append(self.name)
            with clock.stopped():
                work(3)
                found = take(batch, step) if self.slow else {}
            return {self.name: torch.tensor(1)} | found | ({} if self.slow else take(batch, step))

    def work(seconds: int) -> None:
        clock.now += seconds

    def take(batch: Batch, step: Step) -> dict[str, Tensor]:
        work(5 if "slow" in order else 1)
        order.append(f"step {step.index}")
        return {"loss": torch.tensor(0)}

    probes = [Noting("first", 2, slow=False), Noting("second", 1, slow=False), Noting("slow", 2, slow=True)]
    step = new_step(Backprop(nn.Sequential(nn.Linear(2, 2)), TaskSpec("made", (2,), 2)))
    meter.start()
    for step.index in range(3):
        meter.step("a")
        metrics = take_step(probes, take, meter, Batch(torch.zeros(1, 2)), step)
    meter.stop()
    meter.settle()
    assert order == ["step 0", "second", "step 1", "first", "slow", "step 2"]
    assert list(metrics) == ["first", "slow", "loss"]
    assert meter.seconds == 3


def test_what_fails_on_the_clock_does_not_count(clock: Time) -> None:
    meter = Clock(torch.device("cpu"))

    def fail() -> None:
        with meter.running():
            clock.now += 5
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    with meter.running():
        clock.now += 2
    assert meter.seconds == 2


def test_compiling_is_taken_out_of_what_is_prepared(clock: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a compiler that takes four of seven seconds."""
    from bpfree.training import compiling

    monkeypatch.setattr(compiling, "time", clock)

    def inductor(graph: Any, inputs: Any, mode: str) -> Any:
        clock.now += 4
        return graph.forward

    monkeypatch.setattr(compiling, "inductor", inductor)
    block = nn.Linear(3, 3)
    compilation, meter = Compilation([block], "default", torch.device("cpu")), Clock(torch.device("cpu"))
    with compilation.apart(meter), meter.running():
        block(torch.ones(2, 3))
        clock.now += 3
    assert (meter.seconds, compilation.seconds) == (3, 4)


def test_what_was_not_measured_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run("a", "a", result={"train/seconds": 1.0, "train/steps": 1.0, "parameters": 2.0, "parameters_trained": 2.0})
    print_result(run)
    shown = capsys.readouterr().out
    assert "1.0 s, 1 steps" in shown
    assert "memory" not in shown
