"""What observers may do. Oracles: hooks that change what they must not, beside ones that only look; bits of runs without them."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from training_rules import ONE, assert_equal_bits, config_of, failing, noisy, rule_on, weights, write_through_data

from bpfree import Rule, Run, Step, Task, hookimpl
from bpfree.baselines import Backprop
from bpfree.record.folder import read_run
from bpfree.tracking.pictures import Pictures
from bpfree.training.hook_watch import HookWatch
from bpfree.training.trainer import Trainer


def _add(rule: Rule) -> None:
    with torch.no_grad():
        next(rule.parameters()).add_(0.01)


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
    write_through_data: "the parameter network.blocks.b1",
    _statistics: "the buffer network.blocks.b1",
    _replace: "the parameter network.blocks.b1",
    _freeze: "requires_grad",
    _leave_gradients: "gradients",
    nn.Module.train: "train or eval mode",
    lambda rule: torch.set_grad_enabled(False): "grad mode",
    lambda rule: torch.set_default_dtype(torch.float64): "default dtype",
    lambda rule: torch.manual_seed(1234): "torch's seed",
}
HOOKS = ("run_start", "phase_start", "step_end", "progress", "epoch_end", "checkpoint_saved", "phase_end", "run_end")


def cheating(hook: str, cheat: Callable[[], Any]) -> Any:
    """An observer that does it in this hook."""
    return type("Cheat", (), {hook: hookimpl(lambda self: cheat())})()


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("cheat", [_add, write_through_data])
def test_a_hook_that_trains_fails_the_run(digits: Task, device: torch.device, tmp_path: Path, hook: str, cheat: Any) -> None:
    rule = rule_on(digits, norm="batch")
    options: dict[str, Any] = {"budget": ONE, "log_interval": 1e-6}
    observers = [cheating(hook, lambda: cheat(rule))]
    trainer = Trainer(rule, digits, config_of(device, **options), folder=tmp_path, observers=observers)
    text = failing(trainer)
    assert f"the observer Cheat changed {CHEATS[cheat]}" in text
    assert f"in {hook}" in text
    assert read_run(tmp_path).status == "failed"


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
            self.rule, self.cheat, self.last = rule, cheat, 0

        @hookimpl
        def step_end(self, step: Step) -> None:
            self.last = step.index
            if step.index == 11:
                self.cheat(step)

    def rate(step: Step) -> None:
        optimizers[-1].param_groups[0]["lr"] = 1.0

    optimizers: list[torch.optim.Optimizer] = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: optimizers.append(optimizer))

    cheats: dict[Callable[[Step], Any], str] = {
        lambda step: _add(rule): "the parameter",
        lambda step: (_leave_gradients(rule), step.apply()): "the parameters, by step.apply()",
        rate: "settings of the optimiser",
        lambda step: setattr(step, "progress", 1.0): "the step",
    }
    for cheat, what in cheats.items():
        rule = rule_on(digits)
        late = Late(rule, cheat)
        assert f"changed {what}" in failing(Trainer(rule, digits, config_of(device, budget=ONE), observers=[late]))
        assert late.last == 11
    hook.remove()


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
    assert [record.getMessage() for record in caplog.records] == ["observer Rewriter failed in run_end and is dropped; the run continues"]
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
    Trainer(rule_on(digits), digits, config_of(device, budget=ONE), observers=[Pictures(), cheating("run_end", int)]).fit()
    assert set(hooks) == {"epoch_end", "run_end"}
