"""Checkpoints and resuming. Oracle: the bits of a run that was not disturbed."""

from __future__ import annotations

import pickle
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from training_rules import StopAfter, assert_equal_bits, config_of, noisy, rule_on, weights

from bpfree import (
    Batch,
    BpfreeError,
    Run,
    Step,
    Task,
    UsageError,
    hookimpl,
    load,
    runner,
)
from bpfree.baselines import DFA
from bpfree.errors import DiskError
from bpfree.scoring import score
from bpfree.tasks.digits import DIGITS
from bpfree.training.checkpoint import find_checkpoint, read_checkpoint, write_checkpoint
from bpfree.training.config import BudgetConfig, CheckpointConfig
from bpfree.training.trainer import Interrupted, Trainer

TIMES = ("seconds", "processor_seconds", "samples_per_second", "step_ms")


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
    untimed = [{k: v for k, v in m.items() if k not in TIMES} for m in run.history]
    wanted = [{k: v for k, v in m.items() if k not in TIMES} for m in expected.history]
    assert untimed == wanted
    for name in ("test/accuracy", "train/peak_memory_mb"):
        assert run.result[name] == expected.result[name]


def test_memory_is_watched_twice_in_a_kind_of_phase(
    digits: Task, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the number of watched steps (the first and the third), over an interruption: the rule has phases of three names."""
    from bpfree.training.meters import StepMemory

    watched: list[str] = []
    plain = StepMemory.wants

    def noting(self: StepMemory, batch: Batch, step: Step) -> bool:
        wanted = plain(self, batch, step)
        watched.extend([step.phase.name] if wanted else [])
        return wanted

    monkeypatch.setattr(StepMemory, "wants", noting)
    watch = StopAfter(30)
    watch.trainer = Trainer(noisy(digits), digits, config_of(device), folder=tmp_path, observers=[watch])
    with pytest.raises(Interrupted):
        watch.trainer.fit()
    Trainer(noisy(digits), digits, config_of(device), folder=tmp_path).fit(tmp_path / "checkpoints" / "last.pt")
    assert watched == ["all", "all", "readout", "readout", "grown", "grown"]


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
    with pytest.raises(DiskError, match="disk full"):
        checkpoint.write_checkpoint(path, {"weights": {}})
    assert torch.equal(read_checkpoint(path)["weights"]["w"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize(
    "change",
    [
        *({"format": None}, {"rule": 3}, {"phases_begun": {}}, {"weights": []}, {"training": "x"}),
        *({"position": torch.zeros(2)}, {"metrics": None}, {"metrics": []}, {"generator": 3}, {"optimizers": "x"}, {"fingerprint": None}),
        *({"addons": 3}, {"generator": []}, {"stream": 4}, {"global": None}),
    ],
    ids=str,
)
def test_a_checkpoint_of_somebody_elses_making_is_refused(
    digits: Task, device: torch.device, tmp_path: Path, change: dict[str, Any]
) -> None:
    """Its bytes are those that were written, but not by bpfree. Oracle: the message has a place and a remedy."""
    path = tmp_path / "checkpoints" / "last.pt"
    Trainer(rule_on(digits), digits, config_of(device, budget=BudgetConfig(epochs=1)), folder=tmp_path).fit()
    content = read_checkpoint(path)
    (key,) = change
    write_checkpoint(path, content | change if key in content else content | {"training": content["training"] | change})
    with pytest.raises(BpfreeError) as caught:
        Trainer(rule_on(digits), digits, config_of(device), folder=tmp_path).fit(path)
    assert caught.value.fix
    assert caught.value.where


def test_checkpoints_by_time_in_the_middle_of_an_epoch(digits: Task, device: torch.device, tmp_path: Path) -> None:
    saved: list[int] = []

    class Watch:
        @hookimpl
        def checkpoint_saved(self, run: Run, path: Path) -> None:
            saved.append(read_checkpoint(path)["training"]["position"]["batch"])

    config = config_of(device, checkpoint=CheckpointConfig(every=0, minutes=1e-6), budget=BudgetConfig(epochs=2))
    Trainer(rule_on(digits), digits, config, folder=tmp_path, observers=[Watch()]).fit()
    assert any(batch > 0 for batch in saved)


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


def test_a_trainer_that_was_stopped_can_go_on(digits: Task, device: torch.device, tmp_path: Path) -> None:
    watch = StopAfter(5)
    watch.trainer = Trainer(rule_on(digits), digits, config_of(device), folder=tmp_path, observers=[watch])
    with pytest.raises(Interrupted):
        watch.trainer.fit()
    run = watch.trainer.fit(tmp_path / "checkpoints" / "last.pt")
    assert run.status == "finished"
    assert run.epoch == 3


def test_a_flipped_bit_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    """Oracle: the bytes that were written; torch reads most of these files without a word."""
    path = tmp_path / "last.pt"
    write_checkpoint(path, {"weights": {"w": torch.arange(300.0)}, "config": {"rule": {"name": "dfa"}}})
    whole = path.read_bytes()
    assert torch.equal(torch.load(path, weights_only=True)["weights"]["w"], torch.arange(300.0))
    places = [*range(0, len(whole), 7), *range(len(whole) - 110, len(whole))]
    for number, place in enumerate(places):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << number % 8)]) + whole[place + 1 :])
        with pytest.raises(BpfreeError, match="cannot read the checkpoint"):
            read_checkpoint(path)
    for length in (0, 1, 21, len(whole) // 2, len(whole) - 78, len(whole) - 1):  # cut off, also where the digest begins
        path.write_bytes(whole[:length])
        with pytest.raises(BpfreeError, match="cannot read the checkpoint"):
            read_checkpoint(path)


def test_a_flipped_bit_ends_whatever_reads_a_checkpoint(digits: Task, device: torch.device, tmp_path: Path) -> None:
    """A weight changes, which no format would show: training, loading and scoring refuse it."""
    run = Trainer(rule_on(digits), digits, config_of(device, budget=BudgetConfig(epochs=1)), folder=tmp_path).fit()
    assert run.status == "finished"
    path = tmp_path / "checkpoints" / "last.pt"
    whole = bytearray(path.read_bytes())
    weight = weights(rule_on(digits))
    content = read_checkpoint(path)["weights"]
    name = next(name for name in weight if content[name].numel() > 100)
    whole[whole.index(content[name].cpu().numpy().tobytes()) + 3] ^= 1
    path.write_bytes(whole)
    assert not torch.equal(torch.load(path, weights_only=True, map_location="cpu")["weights"][name], content[name].cpu())
    for read in (
        lambda: Trainer(rule_on(digits), digits, config_of(device)).fit(path),
        lambda: load(path, rule=rule_on(digits)),
        lambda: score(str(path)),
        lambda: runner.resume(str(tmp_path)),
    ):
        with pytest.raises(BpfreeError, match="digest"):
            read()


def test_a_checkpoint_of_version_0_1_is_read_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "old.pt"
    torch.save({"format": 1, "weights": {"w": torch.ones(3)}}, path)
    with caplog.at_level("WARNING", logger="bpfree"):
        assert torch.equal(read_checkpoint(path)["weights"]["w"], read_checkpoint(path)["weights"]["w"])
    assert [record.message.count("no digest") for record in caplog.records] == [1]


def test_no_advice_to_run_code_of_a_file(tmp_path: Path) -> None:
    """Torch's message for a file with other objects begins with ``weights_only=False``."""
    path = tmp_path / "other.pt"
    torch.save({"format": 1, "weights": {"w": Path("x")}}, path)
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        torch.load(path, weights_only=True)
    with pytest.raises(BpfreeError, match="other than tensors and plain values") as caught:
        read_checkpoint(path)
    assert "weights_only" not in "".join(traceback.format_exception(caught.value))


def test_opening_a_run_removes_what_a_killed_writer_has_left(digits: Task, device: torch.device, tmp_path: Path) -> None:
    Trainer(rule_on(digits), digits, config_of(device, budget=BudgetConfig(epochs=1)), folder=tmp_path).fit()
    names = ("checkpoints/.last.pt-0123abcd", ".predictions.npz-0123abcd", ".sent-mlflow.json-0123abcd", ".config.yaml-0123abcd")
    left = [tmp_path / name for name in names]
    for path in left:
        path.write_bytes(b"half")
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoints" / "last.pt"
    assert not any(path.exists() for path in left)


@pytest.mark.parametrize("budget", [BudgetConfig(epochs=1), BudgetConfig(samples=100), BudgetConfig(seconds=1e-6)])
def test_a_budget_that_is_used_already_is_refused(digits: Task, device: torch.device, tmp_path: Path, budget: BudgetConfig) -> None:
    path = tmp_path / "checkpoints" / "last.pt"
    Trainer(rule_on(digits), digits, config_of(device, budget=BudgetConfig(epochs=2)), folder=tmp_path).fit()
    before = path.read_bytes()
    with pytest.raises(UsageError, match="the run has already used"):
        Trainer(rule_on(digits), digits, config_of(device, budget=budget), folder=tmp_path).fit(path)
    assert path.read_bytes() == before


def test_the_same_budget_is_not_refused_though_a_batch_exceeds_it(digits: Task, device: torch.device, tmp_path: Path) -> None:
    config = config_of(device, budget=BudgetConfig(samples=100))
    assert Trainer(rule_on(digits), digits, config, folder=tmp_path).fit().result["train/samples"] == 128
    assert Trainer(rule_on(digits), digits, config, folder=tmp_path).fit(tmp_path / "checkpoints" / "last.pt").status == "finished"
