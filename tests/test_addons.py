"""Optimisers of plugins, optimisers with a closure, and add-ons to the updates of any rule.

Oracles: ``torch.optim.LBFGS`` driven by hand, the equation of gradient centralisation, activations computed again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bpfree
from bpfree import Activations, AddonKind, Batch, Network, OptimizerConfig, Task, TaskSpec, TrainConfig
from bpfree.addons import configured, make_addons
from bpfree.cli.main import main
from bpfree.errors import BpfreeError, UsageError
from bpfree.plugins import Plugins, installed_plugins
from bpfree.training import updater
from bpfree.training.config import BudgetConfig
from bpfree.training.optimizers import check_optimizer
from bpfree.training.stepper import Stepper
from bpfree.training.trainer import Trainer


def command(words: list[str]) -> Any:
    """Exit status of a command."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    return ended.value.code


SPEC = TaskSpec("vectors", (6,), 3)


def network() -> Network:
    torch.manual_seed(0)
    return Network({"b1": nn.Sequential(nn.Linear(6, 8), nn.Tanh()), "readout": nn.Linear(8, 3)}, input_shape=(6,), readout="readout")


def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(torch.randn(12, 6, generator=generator), torch.arange(12) % 3)


def rule_of(name: str) -> Any:
    return installed_plugins().get("rules", name)(network(), SPEC)


def test_lbfgs_takes_the_steps_that_it_takes_by_hand() -> None:
    rule, by_hand, data = rule_of("backprop"), network(), batch()
    stepper = Stepper(rule, OptimizerConfig("lbfgs", lr=0.5, options={"max_iter": 5}))
    optimizer = torch.optim.LBFGS(by_hand.parameters(), lr=0.5, max_iter=5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = SPEC.loss(by_hand(data.inputs), data)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    for _ in range(3):
        stepper.take(data)
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    for mine, theirs in zip(rule.network.parameters(), by_hand.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_a_noisy_rule_draws_the_same_noise_for_each_look_of_a_closure() -> None:
    """With one iteration and a fixed rate, LBFGS's first step is gradient descent; its second look must see the same noise."""
    rule = rule_of("forward-gradient")
    drawn: list[Tensor] = []
    credit = rule.credit

    def watching(data: Batch, step: Any) -> Any:
        metrics = credit(data, step)
        drawn.append(torch.cat([p.grad.flatten() for p in rule.parameters() if p.grad is not None]))
        return metrics

    rule.credit = watching
    Stepper(rule, OptimizerConfig("lbfgs", lr=0.1, options={"max_iter": 1})).take(batch())
    assert len(drawn) >= 2
    assert torch.equal(drawn[0], drawn[1])


def test_a_closure_needs_a_rule_that_gives_gradients_at_once() -> None:
    task = Task(SPEC, *(bpfree.Split(*part) for part in ((batch().inputs, batch().targets),) * 3))  # type: ignore[arg-type]
    config = TrainConfig(budget=BudgetConfig(epochs=1), batch_size=6, optimizer=OptimizerConfig("lbfgs"))
    with pytest.raises(UsageError, match="several times a step, but accumulate=2"):
        Trainer(rule_of("backprop"), task, TrainConfig(budget=config.budget, batch_size=6, accumulate=2, optimizer=config.optimizer))
    with pytest.raises(UsageError, match="applies its updates itself"):
        Trainer(rule_of("ipc"), task, config)


class Halving(torch.optim.SGD):
    """Gradient descent at half the rate."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.sub_(0.5 * group["lr"] * parameter.grad)


@dataclass
class ScaleConfig:
    """Options of the add-on below."""

    by: float = 2.0


class Scale(nn.Module):
    """Scales every gradient, counts its calls, and notes what the layers took and gave."""

    def __init__(self, rule: bpfree.Rule, config: ScaleConfig) -> None:
        super().__init__()
        self.by = config.by
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}

    def update(self, groups: Mapping[str, list[nn.Parameter]], activations: Activations) -> None:
        self.calls += 1  # type: ignore[operator]
        self.seen = dict(activations)
        for members in groups.values():
            for parameter in members:
                if parameter.grad is not None:
                    parameter.grad *= self.by


KINDS = {"scale": AddonKind(Scale, ScaleConfig, "scales gradients", watches=True)}


class _Plugin:
    bpfree_api = 2

    @staticmethod
    @bpfree.hookimpl
    def bpfree_optimizers() -> dict[str, type[torch.optim.Optimizer]]:
        return {"halving": Halving}

    @staticmethod
    @bpfree.hookimpl
    def bpfree_addons() -> dict[str, AddonKind]:
        return KINDS


class _Entry:
    name, dist = "ours", None

    def load(self) -> Any:
        return _Plugin


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Plugins:
    """The plugin above, installed."""
    found = Plugins(entry_points=[_Entry()])
    assert found.records["ours"].status == "ok", found.records["ours"].reason
    for module in (updater, bpfree.training.optimizers):
        monkeypatch.setattr(module, "installed_plugins", lambda: found)
    return found


@pytest.mark.usefixtures("ours")
def test_an_optimiser_of_a_plugin_updates() -> None:
    rule, before, data = rule_of("backprop"), network(), batch()
    Stepper(rule, OptimizerConfig("halving", lr=0.4)).take(data)
    loss = SPEC.loss(before(data.inputs), data)
    gradients = torch.autograd.grad(loss, list(before.parameters()))
    for mine, start, gradient in zip(rule.network.parameters(), before.parameters(), gradients, strict=True):
        assert torch.allclose(mine, start - 0.2 * gradient, atol=1e-6)
    check_optimizer(OptimizerConfig("halving", lr=0.4))


@pytest.mark.usefixtures("ours")
@pytest.mark.parametrize("name", ["backprop", "dfa", "forward-gradient", "softhebb"])
def test_an_addon_changes_the_updates_of_any_rule(name: str) -> None:
    """Twice the gradient is twice the step of plain gradient descent."""
    moved = []
    for addons in ([], [{"name": "scale", "by": 2.0}]):
        rule = rule_of(name)
        before = [p.detach().clone() for p in rule.parameters()]
        stepper = Stepper(rule, OptimizerConfig("sgd", lr=0.01, weight_decay=0.0, momentum=0.0, addons=addons))
        with stepper.phase(next(iter(rule.phases(bpfree.Budget(epochs=3))))):
            stepper.take(batch())
        moved.append(torch.cat([(p - old).flatten() for p, old in zip(rule.parameters(), before, strict=True)]))
    assert moved[0].abs().sum() > 0
    if name == "softhebb":  # its own step may renormalise
        assert not torch.equal(moved[0], moved[1])
    else:
        assert torch.allclose(2 * moved[0], moved[1], atol=1e-6)


@pytest.mark.usefixtures("ours")
def test_an_addon_sees_what_layers_took_and_gave_in_this_step_alone() -> None:
    rule, data = rule_of("backprop"), batch()
    first = network().blocks["b1"][0]  # type: ignore[index]
    stepper = Stepper(rule, OptimizerConfig("sgd", lr=0.01, addons=["scale"]))
    stepper.take(data)
    addon: Any = stepper.updater._addons[0][1]
    taken, given = addon.seen["network.blocks.b1.0"]
    assert torch.equal(taken, data.inputs)
    assert torch.allclose(given, first(data.inputs))
    assert not stepper.updater.activations


@pytest.mark.usefixtures("ours")
def test_the_state_of_an_addon_is_resumed(tmp_path: Path) -> None:
    task = Task(SPEC, *(bpfree.Split(*part) for part in ((batch().inputs, batch().targets),) * 3))  # type: ignore[arg-type]

    def trainer(epochs: int) -> Trainer:
        config = TrainConfig(budget=BudgetConfig(epochs=epochs), batch_size=6, optimizer=OptimizerConfig("sgd", lr=0.1, addons=["scale"]))
        return Trainer(rule_of("backprop"), task, config, folder=tmp_path)

    trainer(2).fit()
    again = trainer(3)
    again.fit(resume=tmp_path / "checkpoints" / "last.pt")
    from bpfree.training.checkpoint import read_checkpoint

    saved = read_checkpoint(tmp_path / "checkpoints" / "last.pt")
    assert int(saved["training"]["addons"][0]["calls"]) == 6


def test_gradients_are_centralised() -> None:
    rule, data = rule_of("backprop"), batch()
    kind, addon = make_addons(["centralise"], rule, {name: kind for name, kind, _ in installed_plugins().items("addons")})[0]
    rule.credit(data, bpfree.new_step(rule))
    before = {name: p.grad.clone() for name, p in rule.named_parameters() if p.grad is not None}
    addon.update(rule.groups(), Activations())
    assert not kind.watches
    for name, parameter in rule.named_parameters():
        expected = before[name] - before[name].mean(1, keepdim=True) if parameter.dim() > 1 else before[name]
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, expected)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("scael", "'scael'.*did you mean 'scale'"),
        ({"name": "scale", "bye": 2}, "'bye'.*by"),
        ({"name": "scale", "by": "much"}, "scale: by must be a number"),
    ],
)
def test_wrong_addons_are_refused(entry: Any, message: str) -> None:
    with pytest.raises(UsageError) as error:
        configured([entry], KINDS)
    assert __import__("re").search(message, f"{error.value.what} {error.value.fix}")


def test_the_command_line_shows_and_records_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    quiet = ["budget.samples=64", "tracking.enabled=false", "pictures.every=0", "-q"]
    assert command(["train", "rule=dfa", "optimizer.addons=[centralise]", *quiet]) == 0
    (log,) = tmp_path.glob("runs/*/events.jsonl")
    assert '"optimizer":"adam + centralise"' in log.read_text().replace('": "', '":"')
    assert command(["train", "rule=dfa", "optimizer.addons=[centralize]", *quiet]) == 2
    assert "did you mean" in capsys.readouterr().err
    with pytest.raises(BpfreeError):
        check_optimizer(OptimizerConfig("lbfg"))
