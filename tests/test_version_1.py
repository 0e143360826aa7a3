"""Runs and studies of bpfree 0.1. Oracles: what that version wrote, kept in ``fixtures/version-0.1`` as its README says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import bpfree
from bpfree import Task
from bpfree.cli.main import main
from bpfree.legacy import is_of_version_1, refuse_version_1
from bpfree.metric import ACCURACY, ERROR
from bpfree.scoring import score
from bpfree.study.measures import Measure
from bpfree.study.store import CellStore

FIXTURES = Path(__file__).parent / "fixtures" / "version-0.1"


def call(*words: str) -> int:
    """A command in this process; returns its exit code."""
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    return int(caught.value.code or 0)


@pytest.fixture
def old(workplace: Path) -> Path:
    """A copy of the fixtures, in which nothing of them can be changed by a test."""
    return Path(shutil.copytree(FIXTURES, workplace / "old"))


def results(run: Path) -> dict[str, float]:
    """What the old version measured at the end."""
    return json.loads((run / "run.json").read_text())["result"]  # type: ignore[no-any-return]


def test_a_run_predicts_and_is_scored(old: Path, digits: Task, capsys: pytest.CaptureFixture[str]) -> None:
    run, expected = old / "finished", results(old / "finished")
    scores = bpfree.load(run).predict(digits.test.inputs[:])
    right = (scores.argmax(1) == digits.test.targets).float().mean()
    assert right.item() == pytest.approx(expected["test/accuracy"])
    assert score(str(run), split="test")[1]["loss"] == pytest.approx(expected["test/loss"])
    assert call("evaluate", str(run), "--split", "test", "--json") == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(expected["test/accuracy"])


def test_an_unfinished_run_can_be_scored_too(old: Path, digits: Task) -> None:
    """Oracle: its predictions for the validation split, counted here."""
    assert digits.validation is not None
    guesses = bpfree.load(old / "unfinished").predict(digits.validation.inputs[:]).argmax(1)
    assert score(str(old / "unfinished"))[1]["accuracy"] == pytest.approx((guesses == digits.validation.targets).float().mean().item())


def cells(folder: Path) -> dict[tuple[str, int], float]:
    """The old version's test accuracies in per cent, by row and seed."""
    known = [json.loads(path.read_text()) for path in folder.rglob("cells/*.json")]
    return {(cell["row"], cell["seed"]): 100 * cell["result"]["test/accuracy"] for cell in known}


def test_a_study_is_reported_with_a_remark_and_run_again(
    old: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(old / "study")
    words = ("tiny.yaml", "output=output", "device=cpu", "tracking.enabled=false")
    assert call("study", "report", *words) == 0
    out = capsys.readouterr().out
    before, written = cells(Path("output")), list(Path("output").rglob("cells/*.json"))
    for row in ("frozen", "dfa"):
        mean = sum(value for (label, _), value in before.items() if label == row) / 2
        (line,) = [line for line in out.splitlines() if line.startswith(f"{row} ")]
        assert f" {mean:.2f} +- " in line
    assert "4 cells measured by bpfree 0.1.0 from other sources than those installed here" in out
    for _ in range(2):  # planned, and as it was kept
        assert call("study", "status", *words) == 0
        out = capsys.readouterr().out
        assert out.count(" finished ") == 4
        assert "4 finished, 4 of them from other sources" in out

    assert call("study", "status", *words, "network.width=9") == 0  # another network
    assert "4 not run" in capsys.readouterr().out
    assert call("study", "run", *words, "--dry-run") == 0
    assert "4 of 4 cells to run" in capsys.readouterr().out
    assert call("study", "run", *words, "--rows", "dfa", "--seeds", "1", "--quiet") == 0
    assert call("study", "status", *words) == 0
    assert "4 finished, 3 of them from other sources" in capsys.readouterr().out
    assert all((FIXTURES / "study" / path).read_bytes() == path.read_bytes() for path in written)


def test_a_folder_is_told_by_what_it_lacks(old: Path) -> None:
    assert is_of_version_1(old / "unfinished")
    with pytest.raises(bpfree.UsageError, match=r"a run of bpfree 0\.1 cannot be resumed by this version"):
        refuse_version_1(old / "unfinished", "resumed")
    (old / "unfinished" / "events.jsonl").touch()
    assert not is_of_version_1(old / "unfinished")
    refuse_version_1(old / "unfinished", "resumed")


def test_the_fixtures_are_small_and_name_no_place() -> None:
    files = [path for path in FIXTURES.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 200_000
    assert not [path for path in files for place in (b"/home/", b"/root", b"/tmp/") if place in path.read_bytes()]


@pytest.mark.parametrize("words", [["train", "--resume"], ["track", "send"]])
def test_an_unfinished_run_is_refused(old: Path, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    before = {path: path.read_bytes() for path in (old / "unfinished").rglob("*") if path.is_file()}
    assert call(*words, str(old / "unfinished")) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"a run of bpfree 0.1 cannot be {'resumed' if words[0] == 'train' else 'sent'} by this version" in error
    assert "finish it with bpfree 0.1, or start a new run" in error
    assert {path: path.read_bytes() for path in (old / "unfinished").rglob("*") if path.is_file()} == before


def test_cells_without_metrics_are_judged_by_their_accuracy(old: Path) -> None:
    """Oracle: 0.1 knew accuracies and losses alone."""
    paths = list((old / "study").rglob("cells/*.json"))
    assert paths
    for path in paths:
        record = CellStore(path.parents[3], path.parents[1].name).read(path.stem)
        assert record is not None
        assert record.primary == ACCURACY
        shown = Measure("test", ERROR, ACCURACY.name).of(record.result)
        assert shown == pytest.approx(100 - 100 * json.loads(path.read_text())["result"]["test/accuracy"])
