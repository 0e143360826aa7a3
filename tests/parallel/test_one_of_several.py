"""One process of several, alone in this one: what the others say is made up. Oracles: closed forms, one process, sums that are kept."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import parallel_cases as cases
import pytest
import torch
from torch import Tensor, nn
from training_rules import config_of

from bpfree import Batch, Budget, OptimizerConfig, Phase, Rule, Run, Stepper, Task, UsageError, new_step
from bpfree.training.distributed import World
from bpfree.training.meters import Clock
from bpfree.training.operations import Operations
from bpfree.training.setup import Setup
from bpfree.training.state import RunState
from bpfree.training.stopping import Stop
from bpfree.training.team import BlockTeam, DataTeam, Team

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Told(World):
    """A process that hears made-up answers.

    Attributes:
        others: what the other processes answer: one list of numbers, or a thing of each.
        added_up: the parameters whose gradients were summed over processes.
    """

    others: tuple[Any, ...] = ()
    added_up: list[nn.Parameter] = field(default_factory=list)

    def largest(self, *numbers: float) -> list[float]:
        return [max(pair) for pair in zip(numbers, self.others, strict=True)]

    def total(self, *numbers: float) -> list[float]:
        return [sum(pair) for pair in zip(numbers, self.others, strict=True)]

    def gathered(self, thing: Any) -> list[Any]:
        return [thing, *self.others]

    def from_first(self, call: Callable[[], Any]) -> Any:
        return call()

    def send(self, tensors: Any, *, source: int = 0) -> None: ...

    def add_up(self, parameters: Any) -> None:
        self.added_up.extend(parameters)


def batch_of(task: Task, examples: int) -> Batch:
    assert task.train.targets is not None
    return Batch(task.train.inputs[:examples], task.train.targets[:examples])


def state_of(rule: Rule, task: Task, world: World, kind: type[Team] = DataTeam, **options: Any) -> RunState:
    return RunState(Setup(rule, task, config_of(CPU, **options), Budget(), CPU, kind(rule, world), Run("a", "a")))


# --- a step -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("examples", "size", "parts"), [(15, 2, 2), (7, 2, 2), (3, 2, 2), (5, 3, 1), (11, 3, 2)])
def test_metrics_weighted_by_examples_are_the_batch_s(digits: Task, examples: int, size: int, parts: int) -> None:
    """Also where processes have unequal parts of it, or none. Oracle: the loss of the whole batch, in closed form."""
    batch = batch_of(digits, examples)
    rule = cases.plain(digits)
    whole = float(rule.spec.loss(rule.network(batch.inputs), batch).detach())
    total = seen = 0.0
    for rank in range(size):
        rule = cases.plain(digits)  # the step moves it
        team = DataTeam(rule, World(rank, size))
        metrics, weight = team.update(batch, new_step(rule), parts), team.examples(batch, parts)
        assert bool(metrics) == bool(weight)
        total, seen = total + float(metrics.get("loss", 0.0)) * weight, seen + weight
    assert seen == examples
    assert total / examples == pytest.approx(whole, rel=1e-5)


def test_what_others_are_to_fill_is_not_updated(digits: Task) -> None:
    """By a rule that fills it all the same; what is shared, and nothing else, is added up."""
    rule = cases.shared(digits)
    world = Told(1, 2)
    state = state_of(rule, digits, world, BlockTeam, optimizer=OptimizerConfig("sgd", lr=0.1))
    state.team.enter(state.step, state.updater)
    before = {name: value.detach().clone() for name, value in rule.named_parameters()}
    for parameter in rule.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.updater.apply()
    moved = {name for name, value in rule.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if {"t3", "t4", "embed"} & set(name.split("."))}
    assert [id(p) for p in world.added_up] == [id(rule.embed.weight)]


# --- numbers ------------------------------------------------------------------------------------------------------------


def test_the_means_that_are_displayed(digits: Task) -> None:
    """Of the examples a mean of all processes'; of the blocks the sum of the rule's loss, and a mean of what several have."""
    mine, theirs = {"rule/loss": 1.0, "rule/accuracy": 0.5}, {"rule/loss": 4.0, "rule/accuracy": 0.25, "rule/t4/loss": 3.0}
    world = Told(0, 2, others=({name: [mean, 1.0] for name, mean in theirs.items()},))
    rule = cases.islands(digits)
    assert Team(rule, World()).joined(mine) == mine
    assert DataTeam(rule, world).joined(mine) == {"rule/loss": 2.5, "rule/accuracy": 0.375, "rule/t4/loss": 3.0}
    assert BlockTeam(rule, world).joined(mine) == {"rule/loss": 5.0, "rule/accuracy": 0.375, "rule/t4/loss": 3.0}


@pytest.mark.parametrize("others", [0.5, 1000.0])
def test_peak_memory_is_that_of_the_process_that_has_most(digits: Task, others: float) -> None:
    rule = cases.plain(digits)
    alone, state = state_of(rule, digits, World(), Team), state_of(rule, digits, Told(0, 2, others=(others,)))
    assert alone.peak_memory() is None  # no step was watched
    for one in (alone, state):
        one.memory.load_state_dict({"step_bytes": 2**20, "seen": {}})
    own = alone.peak_memory()
    assert own is not None
    assert 1.0 < own < 2.0
    assert state.peak_memory() == max(others, own)


@pytest.mark.parametrize("trouble", [False, True])
def test_operations_are_the_sum_of_what_all_processes_counted(digits: Task, trouble: bool) -> None:
    """If one cannot count, none has a number, and none continues to count: a sum needs them all."""
    rule, batch = cases.plain(digits), batch_of(digits, 8)
    stepper = Stepper(rule)
    alone, step = Operations(stepper), stepper.step
    several = Operations(stepper, Told(0, 2, others=(1000, trouble)))
    for operations in (alone, several):
        operations.count_forward(batch.inputs, len(batch))
        operations.around(rule.learn, Clock(CPU), batch, step)
        operations.add_step(Phase(), batch, features=False)
    assert alone.total > 0
    if trouble:
        assert "another process failed" in several.trouble
        assert several.costs() == {}
        step.phase = Phase("another")
        assert not several.wants(batch, step)
    else:
        assert several.total == alone.total + 1000
        assert not several.trouble


# --- stopping -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mine", "theirs", "reason"),
    [
        ("", 0, ""),
        ("the test asked", 0, "the test asked"),
        ("", 1, "asked to stop"),
        ("", 3, "stopped by SIGTERM"),
        ("stopped by SIGTERM", 3, "stopped by SIGTERM"),
        ("stopped by SIGINT", 3, "stopped by SIGTERM"),
        ("stopped by SIGTERM", 2, "stopped by SIGTERM"),
    ],
)
def test_all_stop_for_one_reason(mine: str, theirs: int, reason: str) -> None:
    """Once they have conferred, and not before: SIGTERM before SIGINT, and both before what a program has asked for."""
    stop = Stop(Told(0, 2, others=(theirs, 0.0, 1.0)))
    if mine:
        stop.ask(mine)
    assert not stop.reason
    assert stop.confer(False, False) == [False, True]
    assert stop.reason == reason


# --- continuing -----------------------------------------------------------------------------------------------------------


def one_checkpoint(task: Task, step: int, **further: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a run in one process saved after this many steps, in the middle of a pass; changed by ``further``."""
    rule = cases.plain(task)
    state = state_of(rule, task, World(), Team)
    state.at.step, state.at.batch = step, step
    state.metrics.add({"rule/loss": torch.tensor(2.0)}, 30)
    return state.state_dict() | further, rule.state_dict()


def resumed(task: Task, rank: int, size: int, saved: dict[str, Any], weights: dict[str, Tensor]) -> RunState:
    rule = cases.plain(task)
    state = state_of(rule, task, Told(rank, size) if size > 1 else World(), DataTeam if size > 1 else Team)
    state.take_position(saved)
    state.take_weights({"weights": weights, "training": saved})
    return state


def draws(state: RunState) -> tuple[float, float]:
    """Of the rule's own generator, and of torch's global one."""
    return float(torch.rand((), generator=state.step.generator)), float(torch.rand(()))


def test_processes_that_were_not_there_before_draw_noise_of_their_own(digits: Task) -> None:
    """Each another, and after each step another; the first one continues with the noise of the one process that there was."""
    with torch.random.fork_rng(devices=[]):
        begun = [draws(state_of(cases.plain(digits), digits, World(rank, 3)))[0] for rank in range(3)]
        drawn = []
        for step in (7, 8):
            torch.manual_seed(step)
            saved, weights = one_checkpoint(digits, step)
            goes_on = draws(resumed(digits, 0, 1, saved, weights))
            first, *others = [draws(resumed(digits, rank, 3, saved, weights)) for rank in range(3)]
            assert first == goes_on
            drawn += others
    own, common = zip(*drawn, strict=True)
    assert len({*own, *begun}) == 4 + 3
    assert len(set(common)) == 4


@pytest.mark.parametrize(("kind", "before", "now"), [("blocks", 2, 2), ("data", 3, 2), ("data", 2, 3)])
def test_what_other_processes_had_alone_is_nobody_s(digits: Task, kind: str, before: int, now: int) -> None:
    """Of as many that shared the blocks, or of more, or fewer: what the pass has measured counts once, and no two draw the same noise."""
    with torch.random.fork_rng(devices=[]):
        saved, weights = one_checkpoint(digits, 7)
        own = {"generator": saved["generator"], "global": saved["global"], "statistics": {}, "metrics": {"rule/loss": [20.0, 30.0]}}
        states = [resumed(digits, rank, now, {**saved, "parallel": kind, "ranks": [own] * before}, weights) for rank in range(now)]
        assert len({draws(state)[0] for state in states}) == now
    first, *others = [state.metrics.state_dict() for state in states]
    assert first == saved["metrics"]
    assert not any(others)
    assert saved["metrics"] == {"rule/loss": [60.0, 30.0]}


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a socket of the test that listens there."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UsageError, match=f"the port {port} is in use") as caught, World.here().joined():
            pass
    assert "--master-port" in caught.value.fix
    assert not torch.distributed.is_initialized()
