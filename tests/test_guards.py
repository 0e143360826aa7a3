"""What a run guards: updates of single groups, that something moves, what is fixed, what hooks may do, calibration, batches of one.

Oracles: rules and observers that do what must not be done, beside ones that do the same rightly; bits of runs without them.
"""

from __future__ import annotations

import dataclasses
import json
import types
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_rules import StopAfter, assert_equal_bits, config_of, noisy, rule_on, weights

import bpfree
from bpfree import Batch, BpfreeError, Budget, OptimizerConfig, Phase, Rule, Run, Split, Step, Task, Trainer, Traits, UsageError, hookimpl
from bpfree.baselines import DFA, Backprop
from bpfree.network import VGGConfig, vgg
from bpfree.tasks.digits import DIGITS
from bpfree.tracking.journal import Journal
from bpfree.tracking.pictures import Pictures
from bpfree.training.checkpoint import read_checkpoint
from bpfree.training.config import BudgetConfig
from bpfree.training.hook_watch import HookWatch
from bpfree.training.trainer import Interrupted

ONE = BudgetConfig(epochs=1)


def failing(trainer: Trainer, resume: Path | None = None) -> str:
    """The run must fail; what it says."""
    with pytest.raises(BpfreeError) as caught:
        trainer.fit(resume)
    assert trainer.run.status == "failed"
    assert trainer.run.reason == caught.value.what
    return str(caught.value)


# --- groups of an update ----------------------------------------------------------------------------------------------


class InParts(DFA):
    """Applies its groups one by one, and halves each gradient before."""

    traits = Traits(dependence="all", downstream_weights=0, update="own-steps")

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.before: list[tuple[str, ...]] = []
        self.after: list[tuple[str, ...]] = []

    def learn(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        metrics = self.credit(batch, step)
        for name in self.groups():
            step.apply(name)
        return metrics

    def before_update(self, groups: Sequence[str]) -> None:
        self.before.append(tuple(groups))
        for name in groups:
            for p in self.groups()[name]:
                assert p.grad is not None
                p.grad /= 2

    def after_update(self, groups: Sequence[str]) -> None:
        self.after.append(tuple(groups))


class Whole(InParts):
    traits = Traits(dependence="all", downstream_weights=0)

    def learn(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        return Rule.learn(self, batch, step)


def test_an_update_is_told_its_groups_and_each_is_prepared_once(digits: Task, device: torch.device) -> None:
    """Signals do not depend on the order of updates here, so that parts and whole end alike."""
    config = config_of(device, budget=ONE, optimizer=OptimizerConfig("sgd", lr=0.1), deterministic=True)
    parts, whole = rule_on(digits, InParts), rule_on(digits, Whole)
    for rule in (parts, whole):
        Trainer(rule, digits, config).fit()
    assert isinstance(parts, InParts)
    assert isinstance(whole, InParts)
    assert parts.before[:3] == parts.after[:3] == [("b1",), ("b2",), ("readout",)]
    assert set(whole.before) == set(whole.after) == {("b1", "b2", "readout")}
    for name, value in weights(whole).items():
        torch.testing.assert_close(value, weights(parts)[name], rtol=1e-5, atol=1e-6)


def test_rules_that_take_no_groups_keep_working_and_are_told(digits: Task, device: torch.device) -> None:
    class Older(Backprop):
        calls = 0

        def before_update(self) -> None:  # type: ignore[override]
            Older.calls += 1

        def after_update(self) -> None:  # type: ignore[override]
            Older.calls += 1

    with pytest.warns(DeprecationWarning, match=r"Older.before_update.*before_update\(self, groups: Sequence\[str\]\)"):
        run = Trainer(rule_on(digits, Older), digits, config_of(device, budget=ONE)).fit()
    assert Older.calls == 2 * run.result["train/steps"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        Trainer(rule_on(digits, Whole), digits, config_of(device, budget=ONE))


# --- something moves --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", [Backprop, DFA])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.set_grad_enabled(False)])
def test_training_needs_no_grad_mode_of_the_caller(
    digits: Task, device: torch.device, factory: type[Rule], mode: Callable[[], AbstractContextManager[None]]
) -> None:
    config = config_of(device, budget=ONE, deterministic=True)
    results = []
    for context in (nullcontext, mode):
        rule = rule_on(digits, factory)
        with context():
            before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            Trainer(rule, digits, config).fit()
            assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
        results.append(weights(rule))
    assert_equal_bits(*results)
    assert torch.is_grad_enabled()


def test_a_rule_made_in_inference_mode_is_refused(digits: Task, device: torch.device) -> None:
    with torch.inference_mode():
        rule = rule_on(digits)
    with pytest.raises(UsageError, match=r"network.blocks.b1.*inference_mode"):
        Trainer(rule, digits, config_of(device))


class Idle(Backprop):
    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        return {"loss": self.spec.loss(self.network(batch.inputs), batch).detach()}


class WithoutGrad(Backprop):
    """A plugin that leaves grad mode off."""

    def prepare(self, data: Split, generator: torch.Generator) -> None:
        torch.set_grad_enabled(False)

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        loss = self.spec.loss(self.network(batch.inputs), batch)
        if loss.requires_grad:
            loss.backward()
        return {"loss": loss.detach()}


class NeverApplies(Backprop):
    traits = Traits(update="own-steps")

    def learn(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        return self.credit(batch, step)


class Zeros(Idle):
    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        for p in self.parameters():
            p.grad = torch.zeros_like(p)
        return super().credit(batch, step)


class CountsOnly(Idle):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.statistics = nn.BatchNorm1d(10, affine=False)

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        self.count += 1
        self.statistics(self.network(batch.inputs).detach())
        return super().credit(batch, step)


@pytest.mark.parametrize("factory", [Idle, WithoutGrad, NeverApplies, Zeros, CountsOnly])
def test_a_run_in_which_nothing_moves_fails(
    digits: Task, device: torch.device, factory: type[Rule], caplog: pytest.LogCaptureFixture
) -> None:
    rule = rule_on(digits, factory)
    before = weights(rule.network)
    text = failing(Trainer(rule, digits, config_of(device, budget=ONE)))
    assert_equal_bits(before, weights(rule.network))
    assert "21 steps no learning parameter" in text
    assert ("though gradients came" in text) == (factory is Zeros)
    assert factory.__name__ in text
    assert "phase 'train': nothing that learns in it has moved in 21 steps (network.blocks.b1" in caplog.text


def test_a_run_that_moved_nothing_does_not_pass_by_being_interrupted(digits: Task, device: torch.device, tmp_path: Path) -> None:
    watch = StopAfter(25)
    watch.trainer = Trainer(rule_on(digits, Idle), digits, config_of(device), folder=tmp_path, observers=[watch])
    with pytest.raises(Interrupted):
        watch.trainer.fit()
    failing(Trainer(rule_on(digits, Idle), digits, config_of(device), folder=tmp_path), tmp_path / "checkpoints" / "last.pt")


class Halting(Backprop):
    """Learns in its first phase alone."""

    def phases(self, budget: Budget) -> Iterable[Phase]:
        return [Phase("learns", epochs=1), Phase("halts", epochs=1)]

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        return super().credit(batch, step) if step.phase.name == "learns" else {}


def test_a_phase_in_which_nothing_moves_is_a_warning_that_names_it(
    digits: Task, device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    assert Trainer(rule_on(digits, Halting), digits, config_of(device)).fit().status == "finished"
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["phase 'halts'"]


class Solves(Idle):
    """Nothing descends: the readout is solved, where ``place`` says."""

    place = "end_phase"

    def _solve(self) -> None:
        with torch.no_grad():
            next(self.network.blocks["readout"].parameters()).fill_(0.5)

    def prepare(self, data: Split, generator: torch.Generator) -> None:
        if self.place == "prepare":
            self._solve()

    def end_phase(self, phase: Phase, step: Step) -> None:
        if self.place == "end_phase":
            self._solve()


class SolvesFirst(Solves):
    place = "prepare"


class SolvesIntoBuffer(Solves):
    place = "buffer"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.register_buffer("solution", torch.zeros(3))

    def end_phase(self, phase: Phase, step: Step) -> None:
        self.solution = self.solution + 1


class Nothing(Idle):
    """By design nothing learns."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.requires_grad_(False)


@pytest.mark.parametrize("factory", [Solves, SolvesFirst, SolvesIntoBuffer, Nothing])
def test_what_is_solved_counts_and_what_cannot_learn_need_not(digits: Task, device: torch.device, factory: type[Rule]) -> None:
    assert Trainer(rule_on(digits, factory), digits, config_of(device, budget=ONE)).fit().status == "finished"


# --- what is fixed stays ----------------------------------------------------------------------------------------------


class InPlace(Backprop):
    """Random search of a kind: writes into every parameter; ``write`` says how."""

    traits = Traits(update="in-place")
    write: Callable[[nn.Parameter], object] = staticmethod(lambda p: p.add_(0.01))

    @torch.no_grad()
    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        for p in self.parameters():
            if self.allowed(p):
                type(self).write(p)
        return {}

    def allowed(self, parameter: nn.Parameter) -> bool:
        return True

    def learn(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        return self.credit(batch, step)


class ThroughData(InPlace):
    write = staticmethod(lambda p: p.data.add_(0.01))


class NewStorage(InPlace):
    write = staticmethod(lambda p: setattr(p, "data", p.data + 0.01))


class Heeds(InPlace):
    def allowed(self, parameter: nn.Parameter) -> bool:
        return parameter.requires_grad


class Shakes(Heeds):
    """Writes into fixed parameters, too, and puts them back."""

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        with torch.no_grad():
            for p in self.parameters():
                kept = p.clone()
                p.add_(1.0)
                p.copy_(kept)
        return super().credit(batch, step)


class AtTheEnd(Heeds):
    def end_phase(self, phase: Phase, step: Step) -> None:
        with torch.no_grad():
            next(self.network.parameters()).add_(0.01)


@pytest.mark.parametrize("factory", [InPlace, ThroughData, NewStorage, AtTheEnd])
def test_the_twin_of_an_in_place_rule_is_watched(digits: Task, device: torch.device, factory: type[Rule]) -> None:
    trainer = Trainer(rule_on(digits, factory), digits, config_of(device, budget=ONE, twin=True))
    text = failing(trainer)
    assert "network.blocks.b1" in text
    assert "is said to be fixed in phase 'train', but changed" in text
    assert factory.__name__ in text
    if factory is InPlace:  # at once
        assert trainer.run.epoch == 0


class InTurn(InPlace):
    def phases(self, budget: Budget) -> Iterable[Phase]:
        return [Phase("first", epochs=1, groups=("b1", "b2")), Phase("second", epochs=1, groups=("readout",))]


class HeedsInTurn(InTurn, Heeds):
    """Resets a group that does not learn in the phase, and fills it before: both are no training."""

    def phases(self, budget: Budget) -> Iterable[Phase]:
        return [Phase("second", epochs=1, groups=("readout",), reset=("b1",)), Phase("first", epochs=1, groups=("b1", "b2"))]

    def prepare(self, data: Split, generator: torch.Generator) -> None:
        with torch.no_grad():
            next(self.network.parameters()).mul_(2)

    def start_phase(self, phase: Phase) -> None:
        with torch.no_grad():
            for p in self.network.blocks["b1"].parameters():
                p.fill_(0.1)


def test_groups_that_a_phase_does_not_name_are_watched(digits: Task, device: torch.device) -> None:
    text = failing(Trainer(rule_on(digits, InTurn), digits, config_of(device)))
    assert "network.blocks.readout" in text
    assert "phase 'first'" in text
    assert "Phase.groups" in text


@pytest.mark.parametrize(("factory", "twin"), [(Heeds, True), (Shakes, True), (HeedsInTurn, False), (InPlace, False)])
def test_rules_that_heed_what_is_fixed_are_left_alone(digits: Task, device: torch.device, factory: type[Rule], twin: bool) -> None:
    assert Trainer(rule_on(digits, factory), digits, config_of(device, twin=twin)).fit().status == "finished"


# --- hooks look on ----------------------------------------------------------------------------------------------------


def _add(rule: Rule) -> None:
    with torch.no_grad():
        next(rule.parameters()).add_(0.01)


def _through_data(rule: Rule) -> None:
    next(rule.parameters()).data.add_(0.01)


def _statistics(rule: Rule) -> None:
    next(buffer for name, buffer in rule.named_buffers() if name.endswith("running_mean")).add_(1)


def _replace(rule: Rule) -> None:
    layer = next(part for part in rule.modules() if isinstance(part, nn.Linear))
    layer.weight = nn.Parameter(layer.weight.detach().clone() + 1)


def _freeze(rule: Rule) -> None:
    rule.network.blocks["b1"].requires_grad_(False)


def _leave_gradients(rule: Rule) -> None:
    for p in rule.parameters():
        p.grad = torch.ones_like(p)


CHEATS = {
    _add: "the parameter network.blocks.b1",
    _through_data: "the parameter network.blocks.b1",
    _statistics: "the buffer network.blocks.b1",
    _replace: "the parameter network.blocks.b1",
    _freeze: "requires_grad",
    _leave_gradients: "gradients",
    nn.Module.train: "train or eval mode",
    lambda rule: torch.set_grad_enabled(False): "grad mode",
}
HOOKS = ("run_start", "phase_start", "step_end", "progress", "epoch_end", "checkpoint_saved", "phase_end", "run_end")


def cheating(hook: str, cheat: Callable[[], Any]) -> Any:
    """An observer that does it in this hook."""
    return type("Cheat", (), {hook: hookimpl(lambda self: cheat())})()


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("cheat", [_add, _through_data])
def test_a_hook_that_trains_fails_the_run(digits: Task, device: torch.device, tmp_path: Path, hook: str, cheat: Any) -> None:
    rule = rule_on(digits, norm="batch")
    options: dict[str, Any] = {"budget": ONE, "log_interval": 1e-6}
    observers = [Journal(), cheating(hook, lambda: cheat(rule))]
    trainer = Trainer(rule, digits, config_of(device, **options), folder=tmp_path, observers=observers)
    text = failing(trainer)
    assert f"the observer Cheat changed {CHEATS[cheat]}" in text
    assert f"in {hook}" in text
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("cheat", CHEATS)
@pytest.mark.parametrize("hook", ["step_end", "epoch_end"])
def test_whatever_a_hook_changes_is_named(digits: Task, device: torch.device, hook: str, cheat: Any) -> None:
    rule = rule_on(digits, norm="batch")
    do = (lambda: rule.eval()) if cheat is nn.Module.train else lambda: cheat(rule)
    text = failing(Trainer(rule, digits, config_of(device, budget=ONE), observers=[cheating(hook, do)]))
    assert f"the observer Cheat changed {'which parameters learn ' if cheat is _freeze else ''}" in text
    assert CHEATS[cheat] in text
    assert torch.is_grad_enabled()


def test_a_later_step_is_watched_too_and_so_are_the_step_and_the_optimiser(digits: Task, device: torch.device) -> None:
    class Late:
        def __init__(self, rule: Rule, cheat: Callable[[Step], Any]) -> None:
            self.rule, self.cheat = rule, cheat

        @hookimpl
        def step_end(self, step: Step) -> None:
            if step.index == 11:
                self.cheat(step)

    def rate(step: Step) -> None:
        step.apply.__self__._current.param_groups[0]["lr"] = 1.0  # type: ignore[attr-defined]

    cheats: dict[Callable[[Step], Any], str] = {
        lambda step: _add(rule): "the parameter",
        lambda step: (_leave_gradients(rule), step.apply()): "the parameters, by step.apply()",
        rate: "settings of the optimiser",
        lambda step: setattr(step, "progress", 1.0): "the step",
    }
    for cheat, what in cheats.items():
        rule = rule_on(digits)
        trainer = Trainer(rule, digits, config_of(device, budget=ONE), observers=[Late(rule, cheat)])
        assert f"changed {what}" in failing(trainer)
        assert trainer._state.at.step == 11


def test_a_plugins_module_is_watched_and_named(digits: Task, device: torch.device) -> None:
    module = types.ModuleType("some_plugin.plugin")

    @hookimpl
    def epoch_end(rule: Rule) -> None:
        _add(rule)

    module.epoch_end = epoch_end  # type: ignore[attr-defined]
    assert "some_plugin.plugin changed" in failing(Trainer(rule_on(digits), digits, config_of(device), observers=[module]))


def test_pictures_of_a_rule_may_not_train_it(digits: Task, device: torch.device, tmp_path: Path) -> None:
    class Painter(Backprop):
        def pictures(self, count: int = 64) -> dict[str, Tensor]:
            _add(self)
            return {}

    text = failing(Trainer(rule_on(digits, Painter), digits, config_of(device), folder=tmp_path, observers=[Pictures()]))
    assert "Pictures changed the parameter" in text


class Draws:
    """Draws, looks, shakes weights and puts them back, and adds what it made: all of it is allowed."""

    def __init__(self) -> None:
        self.generator: torch.Generator | None = None

    @hookimpl
    def step_end(self, run: Run, step: Step) -> None:
        torch.rand(3)
        torch.rand(3, generator=step.generator, device=step.generator.device)

    @hookimpl
    def epoch_end(self, run: Run, rule: Rule) -> None:
        torch.rand(3)
        with torch.no_grad():
            for p in rule.parameters():
                kept = p.clone()
                p.mul_(2)
                p.copy_(kept)
        run.artifacts["mine"] = Path("mine")
        run.tracking["mine"] = "1"


def test_an_observer_that_looks_on_changes_no_bit(digits: Task, device: torch.device) -> None:
    results, trainers = [], []
    for observers in ([], [Draws()]):
        rule = noisy(digits)
        trainers.append(Trainer(rule, digits, config_of(device, deterministic=True), observers=observers))
        assert trainers[-1].fit().status == "finished"
        results.append(weights(rule))
    assert_equal_bits(*results)
    assert trainers[1].run.artifacts == {"mine": Path("mine")}
    assert trainers[1].run.tracking == {"mine": "1"}


REWRITES: dict[str, Callable[[Run], Any]] = {
    "result": lambda run: setattr(run, "result", {"test/accuracy": 0.999}),
    "a number": lambda run: run.result.update({"test/accuracy": 0.999}),
    "status": lambda run: setattr(run, "status", "finished"),
    "history": lambda run: run.history[-1].update({"val/accuracy": 1.0}),
    "config": lambda run: run.config.pop("seed"),
    "tags": lambda run: run.tags.__setitem__("seed", "7"),
    "artifacts": lambda run: setattr(run, "artifacts", {}),
    "folder": lambda run: delattr(run, "folder"),
}


@pytest.mark.parametrize("what", REWRITES)
def test_observers_see_the_run_read_only(digits: Task, device: torch.device, what: str, caplog: pytest.LogCaptureFixture) -> None:
    class Rewriter:
        @hookimpl
        def run_end(self, run: Run) -> None:
            assert isinstance(run, Run)
            assert json.dumps(run.result)
            REWRITES[what](run)

    config = config_of(device, budget=ONE, deterministic=True)
    plain = Trainer(rule_on(digits), digits, config).fit()
    run = Trainer(rule_on(digits), digits, config, observers=[Rewriter()]).fit()
    assert [record.getMessage() for record in caplog.records] == ["observer Rewriter failed in run_end and is dropped; the run goes on"]
    assert "read-only" in caplog.text
    assert run.status == "finished"
    assert run.result["test/accuracy"] == plain.result["test/accuracy"]
    assert run.config == plain.config
    assert run.history[-1]["val/accuracy"] == plain.history[-1]["val/accuracy"]


def test_nested_values_that_a_hook_writes_into_are_its_own(digits: Task, device: torch.device) -> None:
    class Appends:
        @hookimpl
        def run_start(self, run: Run) -> None:
            run.config["widths"].append(9)
            run.history.append({})

    run = Run("r", "r", config={"widths": [1]})
    Trainer(rule_on(digits), digits, config_of(device, budget=ONE), run=run, observers=[Appends()]).fit()
    assert run.config == {"widths": [1]}
    assert len(run.history) == 1


def test_metrics_that_a_hook_rewrites_choose_nothing(digits: Task, device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    class Flatters:
        @hookimpl
        def epoch_end(self, metrics: dict[str, float]) -> None:
            metrics["val/accuracy"] = 2.0

    run = Trainer(rule_on(digits), digits, config_of(device, select="best-val"), observers=[Flatters()]).fit()
    assert "Flatters failed in epoch_end" in caplog.text
    assert run.result["val/accuracy_selected"] <= 1


def test_a_run_that_is_rewritten_behind_its_view_fails_and_is_put_back(digits: Task, device: torch.device) -> None:
    trainer = Trainer(rule_on(digits), digits, config_of(device, budget=ONE), observers=[cheating("run_end", lambda: rewrite())])

    def rewrite() -> None:
        trainer.run.result["test/accuracy"] = 0.999

    assert "changed the run's result" in failing(trainer)
    assert trainer.run.result["test/accuracy"] < 0.99


def test_steps_are_not_watched_where_nobody_listens(digits: Task, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    hooks: list[str] = []
    around = HookWatch.around
    monkeypatch.setattr(HookWatch, "around", lambda self, hook, plugin: hooks.append(hook) or around(self, hook, plugin))
    Trainer(rule_on(digits), digits, config_of(device, budget=ONE), observers=[Journal(), Pictures(), cheating("run_end", int)]).fit()
    assert set(hooks) == {"epoch_end", "run_end"}


# --- calibration ------------------------------------------------------------------------------------------------------


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
    _through_data(rule)
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


# --- batches of one ---------------------------------------------------------------------------------------------------


def few(task: Task, count: int) -> Task:
    if count == 1:  # of classes a single one is refused anyway

        def rows(split: Split) -> Split:
            return Split(split.inputs, torch.nn.functional.one_hot(torch.as_tensor(split.targets), 10).float())

        spec = dataclasses.replace(task.spec, targets="real")
        return Task(spec, rows(task.train.subset(torch.arange(1))), None, rows(task.test.subset(torch.arange(50))))
    return Task(task.spec, task.train.subset(torch.arange(count)), None, task.test.subset(torch.arange(50)))


class HeadNorm(Backprop):
    """The norm is no part of the network."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.head = nn.BatchNorm1d(self.spec.outputs)

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        loss = self.spec.loss(self.head(self.network(batch.inputs)), batch)
        loss.backward()
        return {"loss": loss.detach()}


class SingleAtLast(Backprop):
    chosen: tuple[str, ...] | None = None

    def phases(self, budget: Budget) -> Iterable[Phase]:
        return [Phase("many", epochs=1), Phase("single", epochs=1, batch_size=1, groups=self.chosen)]


class ReadoutSingly(SingleAtLast):
    """The norms are in eval mode where batches have one example."""

    chosen = ("readout",)


def _dense(task: Task, factory: type[Rule], **options: Any) -> Rule:
    return rule_on(task, factory, **options)


def _maps(task: Task, factory: type[Rule], side: int) -> Rule:
    """Batch norms that see so many rows and columns of a channel; the last one of 1x1 maps."""
    pools = [1, 2, 3] if side == 1 else [1, 2]
    return factory(vgg(task.spec, VGGConfig(channels=[4, 4, 4, 4], pool_after=pools, norm="batch")), task.spec)


@pytest.mark.parametrize(
    ("make", "size", "count", "where"),
    [
        (lambda task: _dense(task, Backprop, norm="batch"), 1, 20, "batch_size=1"),
        (lambda task: _dense(task, DFA, norm="batch"), 1, 20, "batch_size=1"),
        (lambda task: _dense(task, Backprop, norm="batch").double(), 1, 20, "batch_size=1"),
        (lambda task: _dense(task, HeadNorm), 1, 20, "batch_size=1"),
        (lambda task: _dense(task, SingleAtLast, norm="batch"), 8, 20, "batch_size=1 of phase 'single' of SingleAtLast"),
        (lambda task: _dense(task, Backprop, norm="batch"), 8, 1, "has one example"),
        (lambda task: _maps(task, Backprop, 1), 1, 20, "batch_size=1"),
    ],
)
def test_norms_of_one_value_per_channel_are_refused_before_training(
    digits: Task, make: Callable[[Task], Rule], size: int, count: int, where: str
) -> None:
    task = few(digits, count)
    rule = make(task)
    before = weights(rule)
    with pytest.raises(UsageError, match=r"(?s)BatchNorm.*one value per channel.*" + where):
        Trainer(rule, task, config_of(torch.device("cpu"), batch_size=size))
    assert_equal_bits(before, weights(rule))


@pytest.mark.parametrize(
    ("make", "size", "count"),
    [
        (lambda task: _dense(task, Backprop), 1, 20),
        (lambda task: _dense(task, Backprop), 8, 1),
        (lambda task: _maps(task, Backprop, 2), 1, 20),
        (lambda task: _dense(task, ReadoutSingly, norm="batch"), 8, 20),
        (lambda task: _dense(task, Backprop, norm="batch"), 2, 21),  # the last one is left out
    ],
)
def test_batches_of_one_that_can_be_normalised_are_trained(digits: Task, make: Callable[[Task], Rule], size: int, count: int) -> None:
    task = few(digits, count)
    config, rule = config_of(torch.device("cpu"), batch_size=size, budget=BudgetConfig(epochs=2)), make(task)
    state = torch.get_rng_state()
    run = Trainer(rule, task, config).fit()
    assert run.status == "finished"
    assert torch.equal(torch.get_rng_state(), state)
