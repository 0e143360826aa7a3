"""``bpfree evaluate`` beyond single numbers: classes one by one, and their confusions. Oracle: the predictions of the saved rule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from study_kit import call

import bpfree

FAST = ("tracking.enabled=false", "pictures.every=0", "threads=1", "device=cpu", "budget.epochs=1")


def run_of(*words: str) -> str:
    assert call("train", "rule=dfa", *FAST, *words) == 0
    (run,) = Path("runs").iterdir()
    return str(run)


def test_classes_and_confusions_as_table_json_and_picture(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of("task=digits")
    test = bpfree.load_task("digits").test
    inputs, targets = test.batch(torch.arange(len(test)))
    made = bpfree.load(run).predict_classes(inputs)
    matrix = confusion_matrix(targets, made)
    capsys.readouterr()
    assert call("evaluate", run, "--split", "test", "--json", "--confusion", "c.svg") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["confusion"] == matrix.tolist()
    assert [row["f1"] for row in found["classes"]] == pytest.approx(precision_recall_fscore_support(targets, made, zero_division=0)[2])
    assert "dfa on digits, test" in Path("c.svg").read_text()
    assert call("evaluate", run, "--split", "test") == 0
    lines = capsys.readouterr().out.splitlines()
    head = lines.index(next(line for line in lines if line.startswith("true / predicted")))
    assert [[0 if cell == "." else int(cell) for cell in line.split()[1:]] for line in lines[head + 2 : head + 12]] == matrix.tolist()
    assert all(len(line) <= 80 for line in lines[lines.index("") :])


def test_numbers_have_no_classes(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("t.csv").write_text("a,price\n" + "".join(f"{n / 7},{n / 3 + 0.01}\n" for n in range(30)))
    run = run_of("task=csv", "task.path=t.csv", "task.target=price")
    capsys.readouterr()
    assert call("evaluate", run, "--json") == 0
    assert not {"classes", "confusion"} & json.loads(capsys.readouterr().out).keys()
    assert call("evaluate", run, "--confusion", "c.svg") == 2
    assert "no classes that could be confused" in capsys.readouterr().err
    assert call("evaluate", run, "--confusion", "c.gif") == 2
    assert "not written as .gif" in capsys.readouterr().err


def test_of_many_classes_the_worst_are_shown(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from test_confusion import made_of

    from bpfree.cli.evaluate import _print_classes

    _print_classes(made_of(30))
    lines = capsys.readouterr().out.splitlines()
    assert any("10 of 30 classes, those with the lowest F1" in line for line in lines)
    assert lines[3].startswith("quite a long name 0")  # F1 16/18; of class 1 16/18, too
    assert lines[-1].split() == ["quite", "a", "long", "name", "0", "quite", "a", "long", "name", "1", "2", "20.0", "%"]
