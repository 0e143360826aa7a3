"""What a finished study leaves on the disk. Oracles: bytes of the weights; the files, counted; results as they were before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from study_kit import call, outcomes

import bpfree
from bpfree.recipe import Recipe
from bpfree.scoring import score
from bpfree.training.checkpoint import read_checkpoint

STUDY = """
title: Small
settings: {task: digits, budget.epochs: 1, tracking.enabled: false}
floor: false
probe: false
seeds: 2
rows:
  - {label: last, settings: {rule: dfa}}
  - {label: best, settings: {rule: backprop, select: best-val}}
"""
PER_CELL = 9
"""Files: of the cell a record and a lock; of its run the record, configuration, curves, predictions, a checkpoint, and two to spare."""
BESIDE = 12
"""Files of the study: report, table, data."""
SMALL_FILES = 40_000
"""Bytes of a cell beside its weights."""


@pytest.fixture
def finished(workplace: Path) -> str:
    """A study that has run."""
    Path("small.yaml").write_text(STUDY)
    assert call("study", "run", "small.yaml", "--quiet") == 0
    return "small.yaml"


def test_a_finished_cell_keeps_its_tested_weights_and_no_state_of_training(finished: str) -> None:
    files = [path for path in Path("runs").rglob("*") if path.is_file()]
    assert len(files) <= 4 * PER_CELL + BESIDE
    weights = 0
    for known in outcomes():
        (checkpoint,) = (Path("runs") / known["run"] / "checkpoints").iterdir()
        assert checkpoint.name == ("selected.pt" if known["row"] == "best" else "last.pt")
        content = read_checkpoint(checkpoint)
        assert "training" not in content
        weights += sum(tensor.numel() * tensor.element_size() for tensor in content["weights"].values())
        saved = bpfree.load(Path("runs") / known["run"])
        assert saved.predict(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
        assert score(str(Path("runs") / known["run"]), split="test")[1]["accuracy"] == known["result"]["test/accuracy"]
    assert sum(path.stat().st_size for path in files) <= weights + 4 * SMALL_FILES


def test_a_finished_study_is_reported_without_a_network(finished: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = outcomes()

    def build(*arguments: object) -> None:
        raise AssertionError("a network was built")

    monkeypatch.setattr(Recipe, "build_rule", build)
    assert call("study", "run", finished, "--quiet") == 0
    assert call("study", "report", finished) == 0
    assert call("study", "status", finished) == 0
    assert outcomes() == before


def test_a_finished_cell_is_not_resumed(finished: str, capsys: pytest.CaptureFixture[str]) -> None:
    for known in outcomes():
        assert call("train", "--resume", known["run"], "--quiet") == 0
        assert "this run is already finished" in capsys.readouterr().err
        assert call("train", "--resume", known["run"], "budget.epochs=2", "--quiet") == 1
        assert "of a study's finished cells only the weights are kept" in " ".join(capsys.readouterr().err.split())
