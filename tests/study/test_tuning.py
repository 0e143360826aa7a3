"""Tuning. Oracles: Optuna asked by hand; validation accuracies in the runs' own records; a landscape whose best point is known."""

from __future__ import annotations

import json
from pathlib import Path

import optuna
import pytest
from made_studies import cell_record
from study_kit import call, outcomes

from bpfree.metric import LOSS
from bpfree.study import cells
from bpfree.study.file import read_study
from bpfree.study.measures import Measure
from bpfree.study.rows import Trial, Tuned
from bpfree.study.worklist import Worklist

COMMON = "settings: {task: digits, device: cpu, tracking.enabled: false, network.width: 16, budget.epochs: 1}\nfloor: false\nprobe: false\n"
TUNED = f"""
title: Tuned
{COMMON}
seeds: 2
rules: [dfa, {{rule: frozen, tune: false}}]
tune: {{trials: 4, space: {{optimizer.lr: {{low: 1e-4, high: 0.1, log: true}}}}}}
"""


def study(text: str) -> str:
    Path("tuned.yaml").write_text(text)
    return "tuned.yaml"


def worklist_of(text: str) -> Worklist:
    plan = cells.plan(read_study(Path(study(text))))
    return Worklist(plan)


def test_trials_choose_by_validation_and_the_final_seeds_are_trained_afresh(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = study(TUNED)
    assert call("study", "run", name, "--quiet") == 0
    output = capsys.readouterr()
    assert "8 of 8 cells to run" in output.err  # 4 trials, 2 seeds, and 2 of the row that is not tuned
    found = outcomes()
    trials = [outcome for outcome in found if outcome["trial"] is not None]
    final = [outcome for outcome in found if outcome["trial"] is None and outcome["row"] == "dfa"]
    assert [outcome["trial"] for outcome in trials] == [0, 1, 2, 3]
    # trials never saw the test split, and none of their seeds is tested
    assert not any(key.startswith("test/") for outcome in trials for key in outcome["result"])
    assert {outcome["seed"] for outcome in trials} == {1000}
    assert [outcome["seed"] for outcome in final] == [0, 1]
    # the best on validation is what the final cells have
    best = max(trials, key=lambda outcome: outcome["history"][-1]["val/accuracy"])
    rate = best["identity"]["config"]["optimizer.lr"]
    assert {outcome["identity"]["config"]["optimizer.lr"] for outcome in final} == {rate}
    assert rate is not None  # not the default, which one epoch leaves far behind
    # the same points as Optuna's own sampler gives
    told = [outcome["identity"]["config"]["optimizer.lr"] for outcome in trials[1:]]
    assert len(set(told)) == 3
    assert all(1e-4 <= value <= 0.1 for value in told)
    # again: nothing is run
    assert call("study", "run", name, "--quiet") == 0
    again = capsys.readouterr()
    assert "0 of 8 cells to run" in again.err
    assert again.out == output.out


def test_quasi_random_points_are_optunas_and_the_same_in_each_process(workplace: Path) -> None:
    from bpfree.seeds import derive

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    points = [cell.recipe.flat()["optimizer.lr"] for cell in worklist_of(TUNED).ready() if cell.key.trial]
    seed = derive("tuning", "digits", "optimizer.lr") % 2**31
    by_hand = optuna.create_study(sampler=optuna.samplers.QMCSampler(qmc_type="sobol", scramble=True, seed=seed))
    rate = optuna.distributions.FloatDistribution(1e-4, 0.1, log=True)
    assert points == [by_hand.ask({"optimizer.lr": rate}).params["optimizer.lr"] for _ in range(4)][1:]  # its first is no Sobol point
    assert points == [cell.recipe.flat()["optimizer.lr"] for cell in worklist_of(TUNED).ready() if cell.key.trial]


def answer(worklist: Worklist, best: float) -> list[float]:
    """Note results of all that is ready: the nearer the learning rate is to ``best``, the better. Returns the rates."""
    import math

    asked = []
    while ready := [cell for cell in worklist.ready() if cell.key.trial is not None]:
        for cell in ready:
            rate = cell.recipe.flat()["optimizer.lr"] or 1e-3
            asked.append(rate)
            score = 1 - abs(math.log10(rate / best)) / 10
            history = [{"epoch": 1.0, "val/accuracy": score}]
            worklist.store.write(cell_record(cell.key, "finished", history=history))
    return asked


def test_tpe_learns_from_what_it_is_told_and_can_be_resumed(workplace: Path) -> None:
    """On a landscape with one peak its later trials come closer than its first ones; a new process asks for the same."""
    text = TUNED.replace("trials: 4", "trials: 32, search: tpe")
    worklist = worklist_of(text)
    assert len([cell for cell in worklist.ready() if cell.key.trial is not None]) == 1  # one after the other, the default first
    asked = answer(worklist, best=3e-3)
    assert len(asked) == 32
    resumed = worklist_of(text)
    assert [cell for cell in resumed.ready() if cell.key.trial is not None] == []
    line = next(line for line in resumed.table() if line.tuned is not None)
    assert line.tuned is not None
    assert [trial.settings.get("optimizer.lr", 1e-3) for trial in line.tuned.trials] == asked

    def distance(rates: list[float]) -> float:
        import math

        return sum(abs(math.log10(rate / 3e-3)) for rate in rates) / len(rates)

    assert distance(asked[-12:]) < 0.8 * distance(asked[1:11])
    assert line.tuned.best is not None
    assert abs(line.tuned.best.settings["optimizer.lr"] / 3e-3 - 1) < 0.5


@pytest.mark.slow
def test_a_trial_that_diverges_counts_as_one_and_is_not_chosen(workplace: Path) -> None:
    worklist = worklist_of(TUNED)
    for number, cell in enumerate(cell for cell in worklist.ready() if cell.key.trial is not None):
        status = "finished" if number == 2 else "diverged"
        history = [{"epoch": 1.0, "val/accuracy": 0.9}] if number == 2 else []
        worklist.store.write(cell_record(cell.key, status, history=history))  # type: ignore[arg-type]
    line = worklist.table()[0]
    assert line.tuned is not None
    assert line.tuned.complete
    assert [trial.status for trial in line.tuned.trials] == ["diverged", "diverged", "finished", "diverged"]
    assert line.tuned.best is line.tuned.trials[2]
    assert line.tuned.trials[0].values == {"optimizer.lr": 1e-3}  # the default of Adam, where it stands in the figure
    assert [cell.recipe.flat()["optimizer.lr"] for cell in line.cells] == [line.tuned.trials[2].settings["optimizer.lr"]] * 2


def test_the_best_trial_by_hand() -> None:
    trials = [Trial({}, "finished", 90.0), Trial({"a": 1}, "finished", 92.0), Trial({"a": 2}, "finished", 92.0), Trial({"a": 3}, "failed")]
    tuned = Tuned(["a"], trials, planned=4)
    assert tuned.best is trials[1]  # the earliest of equals
    assert tuned.default is trials[0]
    assert tuned.complete
    assert Tuned(["a"], trials, planned=5).complete is False
    assert Tuned(["a"], trials, planned=4, measure=Measure("val", LOSS, "loss")).best is trials[0]
    assert Tuned(["a"], [Trial({}, "finished", float("nan"))], planned=1).best is None


def test_a_best_value_at_the_edge_of_what_was_tried() -> None:
    """Numbers have an edge, names and flags have none; trials without a score widen what was tried, and are not the best."""

    def tuned(best: float, *others: float, key: str = "lr") -> list[str]:
        trials = [Trial({}, "finished", 90.0, values={key: value}) for value in others]
        return Tuned([key], [*trials, Trial({}, "finished", 95.0, values={key: best})], planned=9).at_edge

    assert tuned(0.1, 0.01, 0.001) == tuned(0.001, 0.01, 0.1) == ["lr"]
    assert tuned(0.01, 0.001, 0.1) == []
    assert tuned(0.01) == tuned(0.01, 0.01) == []  # nothing else was tried
    beyond = [
        Trial({}, "finished", 95.0, values={"lr": 0.1}),
        Trial({}, "diverged", values={"lr": 1.0}),
        Trial({}, "finished", 90.0, values={"lr": 0.01}),
    ]
    assert Tuned(["lr"], beyond, planned=3).at_edge == []
    names = [Trial({}, "finished", 90.0 + place, values={"rule": name, "flag": bool(place)}) for place, name in enumerate("ab")]
    assert Tuned(["rule", "flag"], names, planned=2).at_edge == []
    assert Tuned(["lr"], [Trial({}, "diverged", values={"lr": 1.0})], planned=1).at_edge == []


def test_best_val_takes_the_best_epoch(workplace: Path) -> None:
    """Oracle: a curve whose last point is not its best."""
    for select, expected in (("last", 40.0), ("best-val", 80.0)):
        worklist = worklist_of(TUNED.replace("budget.epochs: 1", f"budget.epochs: 1, select: {select}"))
        history = [{"epoch": 1.0, "val/accuracy": 0.8}, {"epoch": 2.0, "val/accuracy": 0.4}]
        for cell in [cell for cell in worklist.ready() if cell.key.trial is not None]:
            worklist.store.write(cell_record(cell.key, "finished", history=history))
        tuned = worklist.table()[0].tuned
        assert tuned is not None
        assert {trial.score for trial in tuned.trials} == {expected}


def test_without_optuna_the_error_says_what_to_install(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    assert call("study", "run", study(TUNED), "--dry-run") == 1
    assert "pip install 'bpfree[tune]'" in capsys.readouterr().err


def test_the_report_says_what_was_tried(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = study(TUNED)
    assert call("study", "run", name, "--quiet") == 0
    page = Path(capsys.readouterr().out.strip().splitlines()[-1])
    text = page.read_text()
    assert "optimizer.lr" in text
    chosen = json.loads(next(iter(Path("runs/studies/tuned/cells").glob("*.json"))).read_text())["identity"]["config"]
    assert chosen["rule.name"] in ("dfa", "frozen")
