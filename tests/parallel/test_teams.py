"""Several processes that train one network. Oracles: the same run in one process, bit for bit or to rounding; what each process drew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import parallel_cases as cases
import pytest
import torch
from parallel_cases import Ended
from parallel_ranks import Ranks
from torch import Tensor
from training_rules import assert_equal_bits

from bpfree import AlignmentConfig, BpfreeError, OptimizerConfig
from bpfree.training.accumulation import slices
from bpfree.training.checkpoint import read_checkpoint
from bpfree.training.config import BudgetConfig
from bpfree.training.updater import ClipConfig

pytestmark = pytest.mark.time_dependent
SGD = OptimizerConfig("sgd", lr=0.1)
ROUNDING = 2e-6
"""Largest difference of a weight after two passes of SGD; sums of float32 in another order."""
UNTIMED = ("seconds", "processor_seconds", "samples_per_second", "step_ms", "peak_memory_mb")


def furthest(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((value.double() - other[name].double()).abs().max()) for name, value in one.items())


def untimed(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in metrics.items() if key not in UNTIMED} for metrics in history]


def assert_alike(ended: list[Ended]) -> None:
    for other in ended[1:]:
        assert_equal_bits(ended[0].weights, other.weights)


# --- data ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [cases.plain, cases.noised])
@pytest.mark.parametrize(("size", "parts"), [(3, 1), (2, 2)])
def test_data_parallel_is_accumulation(ranks: Ranks, make: Any, size: int, parts: int) -> None:
    """Back-propagation, and a local rule whose keyed noise has a part for each process; 1 295 examples leave an uneven last batch of 15."""
    one = cases.train(make, {"accumulate": size * parts, "optimizer": SGD})
    several = ranks.run(size, cases.train, make, {"accumulate": parts, "optimizer": SGD, "parallel": "data"})
    assert_alike(several)
    assert furthest(several[0].weights, one.weights) < ROUNDING
    assert furthest(one.weights, cases.train(make, {"optimizer": SGD, "seed": 1}).weights) > 100 * ROUNDING
    assert all(untimed(other.history) == untimed(several[0].history) for other in several)  # also of what one alone evaluates
    for ours, theirs in zip(untimed(several[0].history), untimed(one.history), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    for name in ("train/samples", "train/steps", "train/operations", "test/accuracy"):
        assert several[0].result[name] == pytest.approx(one.result[name])
    assert several[0].tags["world_size"] == str(size)
    assert several[0].tags["parallel"] == "data"


def test_ranks_draw_different_noise(ranks: Ranks) -> None:
    """From the keyed stream, from the unkeyed one, and (dropout) from torch's global one."""
    for make in (cases.noised, cases.unkeyed):
        drawn = [set(ended.rule["drawn"]) for ended in ranks.run(2, cases.train, make, {"epochs": 1})]
        assert len(drawn[0]) == len(drawn[1]) >= 3
        assert not drawn[0] & drawn[1]


def test_running_statistics_are_averaged(ranks: Ranks) -> None:
    """Of batch norm: the same in both processes, and near a single process's, although each saw half of the examples."""
    one = cases.train(cases.unkeyed, {"epochs": 3})
    two = ranks.run(2, cases.train, cases.unkeyed, {"epochs": 3})
    assert_alike(two)
    assert two[0].history[-1]["val/accuracy"] == pytest.approx(one.history[-1]["val/accuracy"], abs=0.2)


def test_none_and_zero_gradients_differ(ranks: Ranks) -> None:
    """AdamW decays what has a gradient in any process, and leaves alone what has one in none."""
    options = {"optimizer": OptimizerConfig("adamw", lr=0.01, weight_decay=0.5)}
    one = cases.train(cases.sometimes, {**options, "accumulate": 2})
    two = ranks.run(2, cases.train, cases.sometimes, options)
    before = {name: value.detach() for name, value in cases.sometimes(cases.Task.from_source(cases.DIGITS)).named_parameters()}
    for ended in (one, *two):
        assert torch.equal(ended.weights["right.weight"], before["right.weight"])
        assert not torch.equal(ended.weights["left.weight"], before["left.weight"])
        assert torch.allclose(ended.weights["left.weight"], one.weights["left.weight"])


@pytest.mark.parametrize(
    ("examples", "size", "parts"), [(65 + 64 - 1, 3, 1), (64 + 2, 3, 1), (64 + 3, 3, 1), (64 + 5, 3, 1), (64 + 7, 2, 2)]
)
def test_last_batches_too_small_for_all(ranks: Ranks, examples: int, size: int, parts: int) -> None:
    """2, 3 and 5 examples are for fewer than three processes, or uneven; 7 are one micro-batch for one process, and two for the other."""
    one = cases.train(cases.plain, {"accumulate": size * parts, "optimizer": SGD}, examples=examples)
    several = ranks.run(size, _train_few, examples, parts)
    assert_alike(several)
    assert furthest(several[0].weights, one.weights) < ROUNDING
    assert several[0].history[-1]["rule/loss"] == pytest.approx(one.history[-1]["rule/loss"], rel=1e-5)


def _train_few(examples: int, parts: int) -> Ended:
    return cases.train(cases.plain, {"accumulate": parts, "optimizer": SGD, "parallel": "data"}, examples=examples)


def test_slices_cover_a_batch_once() -> None:
    """And are dealt evenly: no process has two micro-batches more than another."""
    for total in range(1, 40):
        for size in (1, 2, 3, 7):
            for parts in (1, 2, 5):
                hands = [slices(total, parts, rank=rank, size=size) for rank in range(size)]
                assert max(map(len, hands)) - min(map(len, hands)) <= 1
                dealt = [item for hand in hands for item in hand.items()]
                assert [part for part, _ in dealt] == list(range(len(dealt)))
                covered = [number for _, (start, end) in dealt for number in range(start, end)]
                assert covered == list(range(total))
                assert all(end - start >= min(2, total) for _, (start, end) in dealt)


# --- blocks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("make", [cases.islands, cases.in_turn, cases.kept])
def test_independent_blocks_have_the_bits_of_one_process(ranks: Ranks, make: Any, size: int) -> None:
    """Blocks, their heads, and the running means of both; each process filled its own blocks alone, and none is left out."""
    one = cases.train(make, {})
    several = ranks.run(size, cases.train, make, {})
    for ended in several:
        assert_equal_bits(ended.weights, one.weights)
    filled = [ended.rule["filled"] for ended in several]
    assert set.union(*filled) == one.rule["filled"] == {"t1", "t2", "t3", "t4"}
    assert sum(map(len, filled)) == 4
    assert max(map(len, filled)) == 2  # none has them all
    for ours, theirs in zip(untimed(several[0].history), untimed(one.history), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert several[0].result["train/operations"] == one.result["train/operations"]
    assert several[0].tags["parallel"] == "blocks"


@pytest.mark.parametrize("size", [2, 3])
def test_a_shared_group_learns_from_all_blocks(ranks: Ranks, size: int) -> None:
    one = cases.train(cases.shared, {"optimizer": SGD})
    several = ranks.run(size, cases.train, cases.shared, {"optimizer": SGD})
    assert_alike(several)
    assert furthest(several[0].weights, one.weights) < ROUNDING


def test_independent_blocks_can_share_the_examples_instead(ranks: Ranks) -> None:
    one = cases.train(cases.islands, {"accumulate": 2, "optimizer": SGD})
    two = ranks.run(2, cases.train, cases.islands, {"parallel": "data", "optimizer": SGD})
    parameters = {name for name in one.weights if "running" not in name and "tracked" not in name}
    assert furthest({n: two[0].weights[n] for n in parameters}, {n: one.weights[n] for n in parameters}) < ROUNDING


def test_fewer_blocks_than_processes_share_the_examples(ranks: Ranks) -> None:
    assert {ended.tags["parallel"] for ended in ranks.run(3, cases.train, cases.two_islands, {"epochs": 1})} == {"data"}


def test_what_diverges_in_one_process_ends_all(ranks: Ranks) -> None:
    ended = ranks.run(2, cases.train, cases.exploding, {})
    assert [one.status for one in ended] == ["diverged", "diverged"]


# --- checkpoints --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sizes", "stop"), [((2, 2), 15), ((2, 1), 20), ((1, 3), 21), ((3, 2), 30)])
def test_blocks_go_on_in_any_number_of_processes(ranks: Ranks, tmp_path: Path, sizes: tuple[int, int], stop: int) -> None:
    """The bits and the metrics of a single process that nothing disturbed; Adam's state travels with the blocks."""
    straight = cases.train(cases.islands, {"epochs": 3})
    first, second = sizes
    stopped = _in(ranks, first, cases.islands, {"epochs": 3}, tmp_path, stop_at=stop)
    assert {ended.status for ended in stopped} == {"interrupted"}
    again = _in(ranks, first, cases.islands, {"epochs": 3}, tmp_path, resume=True, stop_at=stop + 15)  # now each has old states of all
    assert {ended.status for ended in again} == {"interrupted"}
    assert stop < read_checkpoint(tmp_path / "checkpoints" / "last.pt")["training"]["position"]["step"] < 63
    resumed = _in(ranks, second, cases.islands, {"epochs": 3}, tmp_path, resume=True)
    for ended in resumed:
        assert_equal_bits(ended.weights, straight.weights)
    for ours, theirs in zip(untimed(resumed[0].history), untimed(straight.history), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("second", [1, 2])
def test_memory_is_that_of_the_process_that_has_most_also_after_resuming(ranks: Ranks, tmp_path: Path, second: int) -> None:
    """The second one, with the large block. Oracle: two processes that nothing disturbed; one process holds what both of them do."""
    (straight, _), alone = ranks.run(2, cases.train, cases.uneven, {}), cases.train(cases.uneven, {})
    _in(ranks, 2, cases.uneven, {}, tmp_path, stop_at=21)
    resumed = _in(ranks, second, cases.uneven, {}, tmp_path, resume=True)[0]
    wanted = straight if second == 2 else alone
    assert straight.result["train/peak_memory_mb"] < alone.result["train/peak_memory_mb"]
    assert resumed.result["train/peak_memory_mb"] == pytest.approx(wanted.result["train/peak_memory_mb"], rel=1e-6)


def test_processes_that_stop_at_the_end_of_a_pass_have_ended_it(ranks: Ranks, tmp_path: Path) -> None:
    """They hear of it after 20 steps, which are the pass, and evaluate what all of them have learned. Oracle: one process, undisturbed."""
    one = cases.train(cases.islands, {}, examples=20 * 64)
    two = _in(ranks, 2, cases.islands, {}, tmp_path, examples=20 * 64, stop_at=20)
    assert {ended.status for ended in two} == {"interrupted"}
    resumed = _in(ranks, 2, cases.islands, {}, tmp_path, examples=20 * 64, resume=True)
    for ours, theirs in zip(untimed(resumed[0].history), untimed(one.history), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize(
    ("looks", "saves", "looked", "saved"), [(0, 0, [20, 40], [20, 40, 42]), (0, 1, [20, 40], [42]), (1, 0, [], [42]), (1, 1, [], [42])]
)
def test_the_first_process_says_when_to_look_and_to_save(
    ranks: Ranks, tmp_path: Path, looks: int, saves: int, looked: list[int], saved: list[int]
) -> None:
    """Where they confer; passes of 21 steps. A process that another one's clock does not move would hang."""
    first, other = ranks.run(2, cases.watched, looks, saves, tmp_path)
    assert first == (looked, saved)
    assert other == ([], [])


@pytest.mark.parametrize("stop", [20, 21, 25])
def test_data_parallel_goes_on_bit_for_bit(ranks: Ranks, tmp_path: Path, stop: int) -> None:
    """With unkeyed noise, dropout and batch norm, whose states each process has for itself; 21 steps are a pass."""
    straight = ranks.run(2, cases.train, cases.unkeyed, {"epochs": 3})
    stopped = _in(ranks, 2, cases.unkeyed, {"epochs": 3}, tmp_path, stop_at=stop)
    assert {ended.status for ended in stopped} == {"interrupted"}
    saved = read_checkpoint(tmp_path / "checkpoints" / "last.pt")  # what is for everybody is a mean of what each has
    for name, first in (own := [one["statistics"] for one in saved["training"]["ranks"]])[0].items():
        assert torch.allclose(saved["weights"][name], (first + own[1][name]) / 2)
        assert "running" not in name or torch.equal(first, own[1][name]) == (stop == 21)  # at the end of a pass
    resumed = _in(ranks, 2, cases.unkeyed, {"epochs": 3}, tmp_path, resume=True)
    for ours, theirs in zip(resumed, straight, strict=True):
        assert_equal_bits(ours.weights, theirs.weights)
    assert untimed(resumed[0].history) == untimed(straight[0].history)


@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2), (3, 2)])
def test_data_parallel_goes_on_in_another_number(ranks: Ranks, tmp_path: Path, first: int, second: int) -> None:
    """Without noise the number of processes changes the rounding alone."""
    options = {"epochs": 3, "optimizer": OptimizerConfig("sgd", lr=0.1, momentum=0.9)}
    straight = cases.train(cases.plain, dict(options))
    _in(ranks, first, cases.plain, options, tmp_path, stop_at=30)
    resumed = _in(ranks, second, cases.plain, options, tmp_path, resume=True)
    assert furthest(resumed[0].weights, straight.weights) < 10 * ROUNDING  # momentum adds up
    noisy = _in(ranks, first, cases.unkeyed, {"epochs": 2}, tmp_path / "noisy", stop_at=30)
    assert {ended.status for ended in noisy} == {"interrupted"}
    assert {ended.status for ended in _in(ranks, second, cases.unkeyed, {"epochs": 2}, tmp_path / "noisy", resume=True)} == {"finished"}


def test_from_blocks_to_data(ranks: Ranks, tmp_path: Path) -> None:
    straight = cases.train(cases.islands, {"optimizer": SGD})
    _in(ranks, 2, cases.islands, {"optimizer": SGD}, tmp_path, stop_at=21)
    resumed = _in(ranks, 2, cases.islands, {"optimizer": SGD, "parallel": "data"}, tmp_path, resume=True)
    assert resumed[0].status == "finished"
    assert resumed[0].history[0]["rule/loss"] == pytest.approx(straight.history[0]["rule/loss"], rel=1e-6)
    assert resumed[0].history[1]["rule/loss"] == pytest.approx(straight.history[1]["rule/loss"], rel=0.05)  # other statistics


def _in(ranks: Ranks, size: int, make: Any, options: dict[str, Any], folder: Path, **further: Any) -> list[Ended]:
    return ranks.run(size, _train_in, make, options, folder, further) if size > 1 else [_train_in(make, options, folder, further)]


def _train_in(make: Any, options: dict[str, Any], folder: Path, further: dict[str, Any]) -> Ended:
    return cases.train(make, dict(options), folder=folder, **further)


# --- what cannot work ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "make", "options", "words"),
    [
        (2, cases.plain, {"budget": BudgetConfig(seconds=1.0)}, "budget.seconds"),
        (2, cases.plain, {"parallel": "blocks"}, "not independent"),
        (2, cases.plain, {"alignment": AlignmentConfig(every=5)}, "alignment.every"),
        (2, cases.islands, {"clip": ClipConfig(norm=1.0, scope="global")}, "clip.scope"),
        (3, cases.two_islands, {"parallel": "blocks"}, "only 2 blocks"),
        (2, cases.own_steps, {}, "applies its updates itself"),
        (2, cases.solving, {}, "end_phase needs statistics of all examples"),
        (2, cases.by_the_clock, {}, "ends by the clock"),
    ],
)
def test_refusals(ranks: Ranks, size: int, make: Any, options: dict[str, Any], words: str) -> None:
    for said in ranks.run(size, cases.refused, make, options):
        assert words in said
        assert "fix:" in said


def test_an_error_of_one_process_is_told_by_all(ranks: Ranks) -> None:
    with pytest.raises((RuntimeError, BpfreeError)) as caught:
        ranks.run(2, cases.train, cases.failing, {})
    assert "the second process fails" in str(caught.value) or "another process" in str(caught.value)
