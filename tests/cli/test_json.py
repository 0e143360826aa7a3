"""`--json` prints JSON alone on standard output. Oracles: the parser of the standard library, and what the tables show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bpfree import installed_plugins
from bpfree.cli.main import main
from bpfree.cli.output import finite

STUDY = """
title: Small
settings: {task: digits, budget.epochs: 1, network.width: 4, network.depth: 1, tracking.enabled: false}
seeds: 1
rows: [{label: a, settings: {rule: dfa}}, {label: b, settings: {rule: dfa, optimizer.lr: 1.0e+30}}]
floor: false
probe: false
"""


def refuse(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def parsed(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    with pytest.raises(SystemExit):
        main([*words, "--json"])
    return json.loads(capsys.readouterr().out, parse_constant=refuse)


@pytest.mark.parametrize("kind", ["rules", "networks", "tasks", "programs", "metrics"])
def test_each_listing_has_the_names(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = installed_plugins().names(kind)
    assert [entry["name"] for entry in parsed(capsys, kind)] == names
    one = parsed(capsys, kind, names[0])
    assert one["name"] == names[0]


@pytest.mark.parametrize(
    "words",
    [("plugins", "list"), ("plugins", "info", "core"), ("registry", "list"), ("registry", "show", "noprop"), ("registry", "validate")],
)
def test_plugins_and_registry(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed(capsys, *words)


def test_studies_and_checks(capsys: pytest.CaptureFixture[str]) -> None:
    assert [entry["study"] for entry in parsed(capsys, "study", "list")] == installed_plugins().names("studies")
    assert [row["row"] for row in parsed(capsys, "study", "show", "digits-floor-ceiling")["rows"]]
    assert "learning" in [check["check"] for check in parsed(capsys, "certify", "--list")]


def test_a_study_from_its_dry_run_to_its_status(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One of its cells diverges, so that there are numbers that JSON does not have."""
    (workplace / "small.yaml").write_text(STUDY)
    dry = parsed(capsys, "study", "run", "small.yaml", "--dry-run")
    assert [(cell["row"], cell["to_run"]) for cell in dry["cells"]] == [("a", True), ("b", True)]
    assert all(cell["seconds"] > 0 for cell in dry["cells"])
    ran = parsed(capsys, "study", "run", "small.yaml")
    assert [(cell["row"], cell["status"]) for cell in ran["cells"]] == [("a", "finished"), ("b", "diverged")]
    assert ran["cells"][0]["result"]["test/accuracy"] >= 0
    assert Path(ran["report"]).is_file()
    assert parsed(capsys, "study", "report", "small.yaml")["cells"] == ran["cells"]
    status = parsed(capsys, "study", "status", "small.yaml")
    assert [(cell["row"], cell["seed"], cell["state"]) for cell in status["cells"]] == [("a", 0, "finished"), ("b", 0, "diverged")]
    assert parsed(capsys, "study", "retry", "timeout", "small.yaml") == {"study": "small", "cells_run": 0}
    scored = parsed(capsys, "evaluate", ran["cells"][0]["run"])
    assert 0 <= scored["accuracy"] <= 1


def test_a_comparison_and_a_run(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("budget.epochs=1", "network.width=4", "tracking.enabled=false")
    made = parsed(capsys, "compare", "dfa", "--only", "--seeds", "1", *words)
    assert [cell["row"] for cell in made["cells"]] == ["dfa"]
    run = parsed(capsys, "train", "rule=dfa", *words)
    assert run["status"] == "finished"
    assert run["result"]["test/accuracy"] == made["cells"][0]["result"]["test/accuracy"]


def test_numbers_that_json_does_not_have_are_null() -> None:
    assert finite({"a": [1.5, float("nan"), {"b": float("-inf")}], 3: "x"}) == {"a": [1.5, None, {"b": None}], "3": "x"}
