"""What a run guards: that something moves, and what is fixed.

Oracles: rules that do what must not be done, beside ones that do the same rightly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_rules import ONE, StopAfter, assert_equal_bits, config_of, failing, rule_on, weights

from bpfree import Batch, Budget, Phase, Rule, Split, Step, Task, Traits, UsageError, always
from bpfree.baselines import DFA, Backprop
from bpfree.training.trainer import Interrupted, Trainer

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
    traits_of = always(Traits(update="own-steps"))

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
    assert ("though there were gradients" in text) == (factory is Zeros)
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

    traits_of = always(Traits(update="in-place"))
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
    assert "is declared fixed in phase 'train', but changed" in text
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
