"""What a run and a study say as they go and at last. Oracles: numbers written by hand, and the cells of a plan."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bpfree.cli.main import main
from bpfree.metric import ACCURACY, LOSS, recorded_metrics
from bpfree.outcome import outcome
from bpfree.run import Run
from bpfree.study.command import execute
from bpfree.study.executor import Ended
from bpfree.study.progress import StudyProgress
from bpfree.study.store import CellKey, CellRecord

TUNED = """
title: Tuned
settings: {task: digits, budget.epochs: 1, network.width: 4, network.depth: 1, tracking.enabled: false}
seeds: 2
rules: [dfa, {rule: backprop, tune: false}]
tune: {trials: 3, space: {optimizer.lr: [0.001, 0.01, 0.1]}}
floor: false
probe: false
"""


def run_of(**more: Any) -> Run:
    fields: dict[str, Any] = {
        "folder": Path("runs/a b"),
        "status": "finished",
        "epoch": 4,
        "metrics": recorded_metrics([ACCURACY, LOSS]),
        "tags": {"rule": "noprop-dt", "task": "digits", "network": "noprop-mlp", "seed": "3"},
    }
    return Run("a", "a", **{**fields, **more})


def test_a_finished_run_is_told_in_full() -> None:
    result = {"test/accuracy": 0.9, "test/accuracy_se": 0.01, "test/t1/accuracy": 0.8, "test/mean/accuracy": 0.92, "train/seconds": 75.0}
    result |= {"test/linear_probe/accuracy": 0.95, "val/linear_probe/accuracy": 0.94, "train/processor_seconds": 150.0, "train/steps": 10.0}
    result |= {"train/peak_memory_mb": 12.34, "parameters": 1000.0, "parameters_trained": 10.0}
    history = [
        {"epoch": 1.0, "val/accuracy": 0.7, "alignment/b1/cosine": 0.1},
        {"epoch": 2.0, "val/accuracy": 0.6, "alignment/b1/cosine": 0.25},
    ]
    config = {"alignment.every": 5, "evaluation.protocols": ["linear-probe"]}
    assert list(outcome(run_of(result=result, history=history, config=config))) == [
        ("run", "noprop-dt on digits (noprop-mlp), seed 3"),
        ("status", "finished after 4 epochs"),
        ("test accuracy", "90.00 % +- 1.00 % (standard error over draws)"),
        ("validation accuracy", "60.00 % last, 70.00 % best"),
        ("linear-probe", "accuracy 95.00 %, 94.00 % on validation"),
        ("other predictions", "accuracy 92.00 % (mean, the best of 2)"),
        ("alignment", "cosine with the true gradient: b1 0.25"),
        ("training", "75 s (2.5 min of processor time), 10 steps"),
        ("memory", "12.3 MiB of tensors at the peak of a step, without the data"),
        ("parameters", "1,000 (10 trained)"),
        ("record", "runs/a b"),
        ("next", "bpfree evaluate 'runs/a b'\nbpfree train --resume 'runs/a b' budget.epochs=8"),
    ]


def test_what_was_not_measured_is_not_told() -> None:
    lines = dict(outcome(run_of(result={"train/peak_memory_mb": 0.0}, status="interrupted", reason="stopped by SIGINT")))
    assert lines == {
        "run": "noprop-dt on digits (noprop-mlp), seed 3",
        "status": "interrupted after 4 epochs: stopped by SIGINT",
        "record": "runs/a b",
        "next": "bpfree train --resume 'runs/a b'",
    }
    assert "not measured" in dict(outcome(run_of(config={"alignment.every": 5})))["alignment"]
    many = {f"alignment/b{block}/variance": block / 10 for block in range(1, 9)}
    lines = dict(outcome(run_of(config={"alignment.every": 5}, history=[many])))
    assert lines["alignment"] == "relative variance of estimates: mean 0.45 of 8 blocks (b1 0.1 to b8 0.8)"


def test_each_finished_cell_has_a_number_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: 1 to 5 in order, although three workers write their records before the first is shown."""
    cells = [SimpleNamespace(key=CellKey(str(number), f"row{number}", "", 0)) for number in range(5)]
    done: set[str] = set()
    worklist: Any = SimpleNamespace(
        ready=lambda: [cell for cell in cells if cell.key.id not in done],
        to_do=lambda cell: cell.key.id not in done,
        left=lambda: 5 - len(done),
        take=lambda record: None,
        tried=lambda cell: None,
        has_paused=lambda cell: False,
        store=SimpleNamespace(seen=lambda cell: None, read=lambda cell: None),
    )
    waiting: list[Any] = []

    def wait() -> list[Ended]:
        done.update(waiting)
        ended = [Ended(cell, CellRecord(next(each.key for each in cells if each.key.id == cell), "finished")) for cell in waiting[:2]]
        del waiting[:2]
        return ended

    executor: Any = SimpleNamespace(slots=3, start=waiting.append, wait=wait)
    execute(worklist, SimpleNamespace(of=lambda cell: cell.key.id), executor, StudyProgress("mine", 5, 5, quiet=False))  # type: ignore[arg-type]
    numbers = [line.partition("]")[0] for line in capsys.readouterr().err.splitlines()]
    assert numbers == ["[1/5", "[2/5", "[3/5", "[4/5", "[5/5"]


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit):
        main(list(words))
    return capsys.readouterr().out


def test_a_dry_run_counts_the_cells_that_tuning_will_make(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: by hand, three trials, and two seeds of two rows."""
    (workplace / "tuned.yaml").write_text(TUNED)
    table = json.loads(said(capsys, "study", "run", "tuned.yaml", "--dry-run", "--json"))
    assert table["summary"][0] == "7 of 7 cells to run: 3 tuning trials, then 4 final runs"
    states = [(cell["row"], cell["trial"], cell["seed"], cell["state"]) for cell in table["cells"]]
    assert states[:3] == [("dfa", trial, 1000, "not run") for trial in range(3)]
    assert sorted(states[3:]) == [
        *(("backprop", None, seed, "not run") for seed in (0, 1)),
        *(("dfa", None, seed, "after tuning") for seed in (0, 1)),
    ]
    total = sum(cell["seconds"] for cell in table["cells"])
    assert all(cell["seconds"] > 0 for cell in table["cells"])
    assert total > 0


def test_status_names_the_words_of_a_variant(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "plain.yaml").write_text(TUNED.replace("tune: {trials", "notes: none\n#").replace(", tune: false", ""))
    said(capsys, "study", "run", "plain.yaml", "network.depth=2", "--seeds", "1", "-q")
    summary = said(capsys, "study", "status", "plain.yaml")
    assert "4 cells: 4 not run" in summary
    assert "2 finished cells of a variant: repeat network.depth=2 to see them" in summary
    assert "variant" not in said(capsys, "study", "status", "plain.yaml", "network.depth=2")


def test_the_command_to_run_it_again_has_its_rows(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "plain.yaml").write_text(TUNED.replace("tune: {trials", "notes: none\n#").replace(", tune: false", ""))
    made = json.loads(said(capsys, "study", "run", "plain.yaml", "--seeds", "1", "--rows", "dfa", "-q", "--json"))
    assert made["command"] == "bpfree study run plain.yaml --seeds 1 --rows dfa"
