"""What processes tell each other, and the command line in several of them. Oracles: what each was given; what a person is to read."""

from __future__ import annotations

import os
from pathlib import Path

import parallel_cases as cases
import pytest
import torch
from parallel_ranks import Ranks
from study_kit import call
from training_rules import assert_equal_bits

from bpfree.cli import main as cli
from bpfree.training.checkpoint import read_checkpoint

pytestmark = pytest.mark.time_dependent
WORDS = ("rule=dfa", "network=mlp", "network.width=8", "task=digits", "threads=1", "device=cpu", "pictures.every=0")
UNTRACKED = (*WORDS, "budget.epochs=1", "tracking.enabled=false")


def test_tensors_of_any_type_are_sent(ranks: Ranks) -> None:
    """Also of types that the back end does not know, of no elements, and not in order."""
    first, second = ranks.run(2, cases.sent)
    for ours, theirs, wanted in zip(first, second, cases.things(0), strict=True):
        assert ours.dtype == theirs.dtype == wanted.dtype
        assert torch.equal(ours.cpu().view(torch.uint8), wanted.contiguous().view(torch.uint8))
        assert torch.equal(theirs.view(torch.uint8), wanted.contiguous().view(torch.uint8))


def test_numbers_are_compared_and_added_up(ranks: Ranks) -> None:
    """Of three processes with 1, 2, 3 and 0, -1, -2."""
    assert ranks.run(3, cases.numbers) == [([3.0, 0.0], [6.0, -3.0])] * 3


def test_means_leave_alone_what_is_the_same_everywhere(ranks: Ranks) -> None:
    """A mask of infinities, and numbers whose sum is too large for their type; the rest is a mean."""
    for found in ranks.run(2, cases.averaged):
        assert found.tolist() == [float("inf"), -float("inf"), torch.finfo(torch.float32).max, 0.25, 1.5]


def test_what_fails_in_one_process_is_told_by_the_first(ranks: Ranks, tmp_path: Path) -> None:
    """Before training: a command line whose data lie in the first process alone, and one that no process understands."""
    answers = ranks.run(2, cases.command_line, tmp_path, ("train", *UNTRACKED, "task=npz", "task.path=only.npz"), "only.npz")
    assert [code for code, _ in answers] == [2, 2]
    assert "process 1 failed" in answers[0][1]
    assert "only.npz" in answers[0][1]
    assert not answers[1][1]
    answers = ranks.run(2, cases.command_line, tmp_path, ("train", "--resume", "nothing"))
    assert [code for code, _ in answers] == [2, 2]
    assert "nothing" in answers[0][1]
    assert "the first process failed" not in answers[0][1]
    assert not answers[1][1]


def test_a_folder_that_one_process_alone_sees(ranks: Ranks, tmp_path: Path) -> None:
    """Training, continuing, and finding that nothing is left to do; each process has a folder of its own to work in."""
    (one, _), (other, _) = ranks.run(2, cases.command_line, tmp_path, ("train", *UNTRACKED))
    assert (one, other) == (0, 0)
    (run,) = (tmp_path / "0" / "runs").iterdir()
    assert not (tmp_path / "1" / "runs").exists()
    for changes, epochs in ((("budget.epochs=2",), 2), ((), 2)):
        answers = ranks.run(2, cases.command_line, tmp_path, ("train", "--resume", f"runs/{run.name}", *changes))
        assert [code for code, _ in answers] == [0, 0]
        assert read_checkpoint(run / "checkpoints" / "last.pt")["training"]["position"]["epoch"] == epochs
    assert "is already finished" in answers[0][1]
    assert not answers[1][1]


def test_a_study_is_not_for_a_launcher(ranks: Ranks, tmp_path: Path) -> None:
    words = ("study", "run", "digits-floor-ceiling", "budget.epochs=1", "--seeds", "1", "--rows", "linear", "--quiet")
    (code, said), _ = ranks.run(2, cases.command_line, tmp_path, words)
    assert code == 2
    assert "a study starts its own processes" in said


@pytest.mark.parametrize("variables", [{"RANK": "1"}, {"RANK": "1", "WORLD_SIZE": "1"}])
def test_a_rank_without_a_world_is_no_reason_to_be_silent(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert call("train", "rule=nothing-of-the-kind") == 2
    assert "nothing-of-the-kind" in capsys.readouterr().err


def test_others_leave_the_first_one_time_to_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher ends all processes once one has ended: one that would say nothing waits."""
    order: list[str] = []
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: order.append("waits"))
    monkeypatch.setattr(os, "_exit", lambda code: order.append(f"ends with {code}"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, code, wanted in (("0", 2, []), ("1", 2, ["waits"]), ("1", 0, []), ("1", 1, [])):
        monkeypatch.setenv("RANK", rank)
        order.clear()
        with pytest.raises(SystemExit):  # because the process did not end
            cli._leave(code)
        assert order == [*wanted, f"ends with {code}"]


def test_frozen_weights_that_a_block_moves_itself_go_with_it(ranks: Ranks) -> None:
    """They are in no group. Oracle: a single process, bit for bit."""
    one = cases.train(cases.moving, {})
    for ended in ranks.run(2, cases.train, cases.moving, {}):
        assert_equal_bits(ended.weights, one.weights)
