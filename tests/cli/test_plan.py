"""A rule's plan on the command line: shown, kept with the run, tracked."""

from __future__ import annotations

from pathlib import Path

import pytest

from bpfree.baselines import DFA
from bpfree.cli.main import main
from bpfree.record.folder import read_run

FAST = ["budget.epochs=1", "tracking.system=false", "threads=1", "device=cpu"]
PLAN = "b1: feedback of 10 errors\nb2: the same"


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule with a plan that depends on its network."""
    monkeypatch.setattr(DFA, "plan", lambda self: PLAN + f"\n{len(self.network.hidden)} hidden blocks\n")


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    return int(caught.value.code or 0)


def test_the_plan_is_shown_kept_and_tracked(planned: None, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the run's first line, on standard error; in the run's folder, its record and its artifacts in the store."""
    assert call("train", "rule=dfa", "network.depth=2", *FAST) == 0
    output = capsys.readouterr()
    assert PLAN not in output.out
    assert output.err.index(PLAN) < output.err.index("started")
    (run,) = (workplace / "runs").iterdir()
    text = f"{PLAN}\n2 hidden blocks\n"
    assert (run / "plan.txt").read_text() == text
    assert read_run(run).artifacts["plan.txt"] == run / "plan.txt"
    assert [path.read_text() for path in (workplace / "mlruns").rglob("plan.txt")] == [text]
    assert call("train", "--resume", str(run), "budget.epochs=2") == 0
    assert PLAN in capsys.readouterr().err


def test_quiet_runs_keep_it_all_the_same(planned: None, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "rule=dfa", "--quiet", "tracking.enabled=false", *FAST) == 0
    assert "feedback" not in capsys.readouterr().err
    assert len(list((workplace / "runs").glob("*/plan.txt"))) == 1


def test_printing_the_plan_trains_nothing(planned: None, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "rule=dfa", "network.depth=3", "--print-plan") == 0
    assert capsys.readouterr().out == f"{PLAN}\n3 hidden blocks\n"
    assert call("train", "rule=backprop", "--print-plan") == 0
    assert capsys.readouterr().out == "the rule 'backprop' reports no plan\n"
    assert call("train", "--resume", "nowhere", "--print-plan") == 2
    assert "cannot be combined with --resume" in capsys.readouterr().err
    assert list(workplace.iterdir()) == []


def test_a_rule_without_a_plan_leaves_no_file(workplace: Path) -> None:
    assert call("train", "rule=dfa", "tracking.enabled=false", *FAST) == 0
    assert not list(workplace.rglob("plan.txt"))
