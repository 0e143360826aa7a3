"""The shipped studies: complete, in the paper's words, and able to run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bpfree_forward_gradient.rules import LocalForwardGradient

import bpfree
from bpfree import AlignmentConfig, BudgetConfig, Task, TrainConfig
from bpfree.cli.main import main
from bpfree.study.cells import plan
from bpfree.study.file import find_study
from bpfree.tasks.digits import DIGITS
from bpfree.training.trainer import Trainer

ROWS = ["BP", "L-BP", "LG-BP", "FG-W", "FG-A", "LG-FG-W", "LG-FG-A"]
# Ren et al. 2022, Table 3, test error / train error in per cent
TABLE = {
    "S/1/1": "2.66/0.00 2.38/0.00 2.43/0.00 9.25/8.93 3.24/1.53 9.25/8.93 3.24/1.53",
    "M/1/16": "2.41/0.00 2.16/0.00 2.81/0.00 8.56/8.64 3.76/1.75 5.66/4.59 2.55/0.00",
    "M/8/16": "33.62/0.00 30.75/0.00 33.84/0.05 55.95/54.28 59.72/41.29 52.70/51.71 30.68/19.39",
}


@pytest.mark.parametrize(("name", "columns"), [("forward-gradient-mnist", ["S/1/1", "M/1/16"]), ("forward-gradient-cifar10", ["M/8/16"])])
def test_the_papers_table(name: str, columns: list[str]) -> None:
    study = find_study(name)
    assert [row.label for row in study.rows] == ROWS
    for column in columns:
        published = [row.published["" if len(columns) == 1 else column] for row in study.rows]
        values = [f"{found['test/error'].mean:.2f}/{found['train/error'].mean:.2f}" for found in published]
        assert " ".join(values) == TABLE[column]


@pytest.mark.parametrize("name", ["forward-gradient-mnist", "forward-gradient-cifar10"])
def test_the_papers_protocol(name: str) -> None:
    """Whole training set, nothing selected, one direction of gaussian noise per step."""
    for cell in plan(find_study(name)).cells:
        flat = cell.recipe.flat()
        assert (flat["task.validation"], flat["select"], flat["batch_size"]) == (0, "last", 100)
        if "forward" in flat["rule.name"]:
            assert (flat["rule.noise"], flat["rule.tangents"]) == ("gaussian", 1)


@pytest.mark.slow
def test_a_study_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On small data and a small network; every row gets a result."""
    monkeypatch.chdir(tmp_path)
    words = ["task=digits", "network.widths=[16]", "tracking.enabled=false", "device=cpu"]
    with pytest.raises(SystemExit) as ended:
        main(["study", "run", "forward-gradient-mlp", "--seeds", "1", "--quiet", *words])
    assert ended.value.code == 0
    table = capsys.readouterr().out
    for row in find_study("forward-gradient-mlp").rows:
        assert row.label in table


def test_alignment_with_what_is_estimated() -> None:
    """The readout takes its exact gradient; a hidden block's estimate points along its local loss's gradient, with a large variance."""
    digits = Task.from_source(DIGITS)
    torch.manual_seed(0)
    rule = LocalForwardGradient(bpfree.mlp(digits.spec), digits.spec)
    run = Trainer(rule, digits, TrainConfig(budget=BudgetConfig(epochs=2), alignment=AlignmentConfig(every=5, draws=4))).fit()
    metrics = run.history[-1]
    assert metrics["alignment/readout/objective_cosine"] == pytest.approx(1, abs=1e-4)
    for block in ("b1", "b2", "b3", "b4"):
        assert 0.1 < metrics[f"alignment/{block}/objective_cosine"] < 0.95
        assert metrics[f"alignment/{block}/objective_norm_ratio"] > 1
        assert metrics[f"alignment/{block}/variance"] > 0.1
        assert f"alignment/{block}/cosine" in metrics
