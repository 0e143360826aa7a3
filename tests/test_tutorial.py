"""The tutorial, followed to the letter. Oracles: the exit codes of its commands; what is in its results."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path

import pytest
from sitemaker.blocks import Block
from sitemaker.reader import Reader


@pytest.mark.slow
@pytest.mark.timeout(1800)  # its commands take two minutes, and several times that beside other work
def test_the_tutorial_can_be_followed(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    tutorial = importlib.import_module("tutorial")
    reader = Reader(workplace, tutorial.variables(1))
    commands = tutorial.follow(reader)
    assert {line["step"][:1] for line in commands} == set("123456")
    with Path("runs/studies/mine/results.csv").open(newline="", encoding="utf-8") as file:
        cells = list(csv.DictReader(file))
    assert {cell["status"] for cell in cells} == {"finished"}
    assert {(cell["row"], cell["column"]) for cell in cells} >= {("signs", "tumours"), ("signs", "digits")}


def test_a_reader_does_what_a_page_says(workplace: Path) -> None:
    """Files are written, commands and Python run in the folder; the first failure is reported."""
    reader = Reader(workplace, {"PATH": "/usr/bin:/bin"})
    reader.follow(Block("yaml", "written to made.yaml", "a: 1\n", 1))
    reader.follow(Block("bash", "", "cat made.yaml\necho two\n", 2))
    assert reader.shown == "a: 1\ntwo\n"
    assert list(reader.taken) == ["cat made.yaml", "echo two"]
    reader.follow(Block("text", "", "of no account", 3))
    with pytest.raises(AssertionError, match="false\nexited with 1"):
        reader.follow(Block("bash", "", "false", 4))
