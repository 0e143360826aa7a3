"""Rules that cheat, and the tables of what the examination says of them. Oracle: how each was written to cheat."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from adversary import CHEATERS
from adversary.kit import Cheater
from certify_disguises import DISGUISES
from honest_rules import HONEST

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = (
    *("CopiedOnce", "LateStarter", "BasisVectors", "OneBit", "ReadsWhileItRuns", "ReadsTheCheckpoint", "LocalSocket"),
    *("NearestNeighbours", "PredictsWithAnother", "LooksAhead"),
)
"""One of each family."""


@pytest.fixture(scope="module")
def cheaters() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("certify_adversaries")
    for name in ("certify_adversaries", "measure"):
        sys.modules.pop(name, None)


def test_there_are_thirty_in_ten_families_and_more() -> None:
    assert len({cheater.family for cheater in CHEATERS}) == 10
    assert len({cheater.rule for cheater in CHEATERS}) == len(CHEATERS) >= 30


def test_the_page_is_that_of_the_results(cheaters: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rule was examined, no honest one is judged wrongly, and at most five cheating ones are called local."""
    results = json.loads((ROOT / "benchmarks" / "results" / "cheaters-cpu.json").read_text())["results"]
    names = {line["rule"] for line in results["cheating"]}
    assert names == {cheater.rule.__name__ for cheater in CHEATERS} | {rule.__name__ for rule in DISGUISES}
    assert {line["rule"]: line["right"] for line in results["honest"]} == {known.rule.__name__: True for known in HONEST}
    assert sum(line["verdict"] == "called local" for line in results["cheating"]) <= 5
    page = tmp_path / "certificates.md"
    page.write_text(cheaters.DOCS.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(cheaters, "DOCS", page)
    cheaters.write(results)
    assert page.read_text(encoding="utf-8") == (ROOT / "docs" / "certificates.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_one_of_each_family_is_caught(name: str, cheaters: Any) -> None:
    (cheater,) = (known for known in CHEATERS if known.rule.__name__ == name)
    with cheaters.elsewhere():
        assert cheaters.line_of(cheater)["verdict"] == "caught"


def test_the_sample_has_all_families() -> None:
    families: dict[str, Cheater] = {cheater.family: cheater for cheater in CHEATERS if cheater.rule.__name__ in SAMPLE}
    assert len(families) == len(SAMPLE)
