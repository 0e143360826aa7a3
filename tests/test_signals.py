"""Signals that come at the worst moment. Oracle: the weights and metrics of a run that was not disturbed, bit for bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_rules import NoisyPhases, assert_equal_bits, config_of, weights

from bpfree import Run, Task, hookimpl
from bpfree.baselines import DFA
from bpfree.network import MLPConfig, mlp
from bpfree.training.checkpoint import read_checkpoint
from bpfree.training.config import EvaluationConfig, TrainConfig
from bpfree.training.trainer import Interrupted, Trainer

TIMES = ("seconds", "processor_seconds", "samples_per_second", "step_ms")
NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


class Signalled(DFA):
    """Gets signals while it predicts for the n-th time; counts the predictions."""

    count = at = 0
    arriving: tuple[int, ...] = ()

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        self.count += 1
        for number in self.arriving if self.count == self.at else ():
            os.kill(os.getpid(), number)
        return super().predict(inputs, generator)


class SignalledPhases(Signalled, NoisyPhases):
    """The same, with everything that a checkpoint must hold."""


def signalled(task: Task, at: int = 0, *signals: int, kind: type[Signalled] = SignalledPhases) -> Signalled:
    torch.manual_seed(0)
    rule = kind(mlp(task.spec, MLPConfig(depth=2, width=32, norm="batch", dropout=0.2)), task.spec)
    rule.at, rule.arriving = at, signals
    return rule


def settings(device: torch.device) -> TrainConfig:
    return config_of(device, deterministic=True, evaluation=EvaluationConfig(batch_size=20, alternatives=False))


def untimed(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in metrics.items() if name not in TIMES} for metrics in history]


@contextmanager
def noting(number: int) -> Iterator[list[int]]:
    """What arrives at somebody above the run who handles the signal."""
    arrived: list[int] = []
    before = signal.signal(number, lambda number, frame: arrived.append(number))
    try:
        yield arrived
    finally:
        signal.signal(number, before)


@pytest.fixture(scope="module")
def undisturbed(digits: Task) -> tuple[Signalled, Run]:
    rule = signalled(digits)
    return rule, Trainer(rule, digits, settings(torch.device(os.environ.get("BPFREE_TEST_DEVICE", "cpu")))).fit()


EVALUATED = 16
"""Batches of an epoch's evaluation, half of them validation's."""


@pytest.mark.parametrize(("at", "epoch"), [(3, 1), (EVALUATED + 12, 2), (3 * EVALUATED + 8, 4)])
@pytest.mark.parametrize("number", NUMBERS)
def test_an_evaluation_ends_between_two_batches_and_is_made_up_for(
    digits: Task, device: torch.device, tmp_path: Path, undisturbed: tuple[Signalled, Run], at: int, epoch: int, number: signal.Signals
) -> None:
    rule, path = signalled(digits, at, number), tmp_path / "checkpoints" / "last.pt"
    trainer = Trainer(rule, digits, settings(device), folder=tmp_path)
    with pytest.raises(Interrupted, match=f"stopped by {number.name}") as error:
        trainer.fit()
    assert error.value.exit_code == 128 + number
    assert rule.count == at
    assert (trainer.run.status, len(trainer.run.history)) == ("interrupted", epoch - 1)
    assert read_checkpoint(path)["training"]["position"]["epoch"] == epoch
    again = signalled(digits)
    run = Trainer(again, digits, settings(device), folder=tmp_path).fit(path)
    assert_equal_bits(weights(again), weights(undisturbed[0]))
    assert untimed(run.history) == untimed(undisturbed[1].history)
    assert run.result["test/accuracy"] == undisturbed[1].result["test/accuracy"]


def test_a_second_signal_in_an_evaluation_loses_nothing(
    digits: Task, device: torch.device, tmp_path: Path, undisturbed: tuple[Signalled, Run]
) -> None:
    rule, path = signalled(digits, 20, signal.SIGTERM, signal.SIGTERM), tmp_path / "checkpoints" / "last.pt"
    trainer = Trainer(rule, digits, settings(device), folder=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert (trainer.run.status, trainer.run.reason) == ("interrupted", "stopped by SIGTERM, at once")
    assert read_checkpoint(path)["training"]["position"]["epoch"] == 2
    again = signalled(digits)
    run = Trainer(again, digits, settings(device), folder=tmp_path).fit(path)
    assert_equal_bits(weights(again), weights(undisturbed[0]))
    assert untimed(run.history) == untimed(undisturbed[1].history)


@pytest.mark.parametrize("select", ["last", "best-val"])
def test_the_test_is_stopped_too_and_repeated(digits: Task, device: torch.device, tmp_path: Path, select: str) -> None:
    """The selected weights are those of the rule then; the checkpoint keeps the last."""
    config = settings(device)
    config.select = select  # type: ignore[assignment]
    straight, path = signalled(digits, kind=Signalled), tmp_path / "checkpoints" / "last.pt"
    expected = Trainer(straight, digits, config, folder=tmp_path / "straight").fit()
    rule = signalled(digits, 3 * EVALUATED + 2, signal.SIGINT, kind=Signalled)
    with pytest.raises(Interrupted):
        Trainer(rule, digits, config, folder=tmp_path).fit()
    assert rule.count == 3 * EVALUATED + 2
    last = read_checkpoint(tmp_path / "straight" / "checkpoints" / "last.pt")["weights"]
    assert_equal_bits(read_checkpoint(path)["weights"], last)
    again = signalled(digits, kind=Signalled)
    run = Trainer(again, digits, config, folder=tmp_path).fit(path)
    assert_equal_bits(weights(again), weights(straight))
    assert run.result["test/accuracy"] == expected.result["test/accuracy"]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_that_comes_too_late_is_passed_on(digits: Task, device: torch.device, number: signal.Signals) -> None:
    class AtTheEnd:
        @hookimpl
        def run_end(self) -> None:
            os.kill(os.getpid(), number)

    with noting(number) as arrived:
        run = Trainer(signalled(digits), digits, settings(device), observers=[AtTheEnd()]).fit()
        assert run.status == "finished"
        assert arrived == [number]


def test_a_hang_up_that_is_ignored_stays_ignored(digits: Task, device: torch.device) -> None:
    """As `nohup` has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert Trainer(signalled(digits, 3, signal.SIGHUP), digits, settings(device)).fit().status == "finished"
    finally:
        signal.signal(signal.SIGHUP, before)


def test_evaluations_are_shown(digits: Task, device: torch.device) -> None:
    shares: list[float] = []

    class Watch:
        @hookimpl
        def progress(self, metrics: Any) -> None:
            shares.extend([metrics["evaluation"]] if "evaluation" in metrics else [])

    config = settings(device)
    config.log_interval = 1e-9
    Trainer(signalled(digits), digits, config, observers=[Watch()]).fit()
    assert shares[: EVALUATED // 2] == [number / 8 for number in range(8)]
