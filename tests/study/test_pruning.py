"""Pruning by rung. Oracles: Optuna's pruner, asked for one trial after the other; decisions found by hand; the trials' own records; the
weights of a study that is not pruned."""

from __future__ import annotations

import math
import random
from pathlib import Path

import optuna
import pytest
from study_kit import call, outcomes, untimed

from bpfree import UsageError
from bpfree.study import cells
from bpfree.study.file import read_study
from bpfree.study.pruning import Decision, Reached, decide, is_promoted, rungs_of
from bpfree.study.worklist import Worklist

STUDY = """
title: Pruned
settings: {task: digits, device: cpu, tracking.enabled: false, network.width: 16, budget.epochs: 4}
floor: false
probe: false
seeds: 1
rules: [backprop, dfa]
tune: {trials: 6, space: {optimizer.lr: {low: 1e-4, high: 0.3, log: true}}, pruner: asha, rung: 1, reduction: 2}
"""


def study(text: str) -> str:
    Path("pruned.yaml").write_text(text)
    return "pruned.yaml"


def ended(curves: list[list[float]], rungs: list[int], reduction: int, *, greater: bool) -> list[int | None]:
    """At which rung Optuna prunes each trial, one after the other; ``None``: it does not."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=rungs[0], reduction_factor=reduction, min_early_stopping_rate=0)
    asked = optuna.create_study(direction="maximize" if greater else "minimize", pruner=pruner)
    found: list[int | None] = []
    for curve in curves:
        trial, at = asked.ask(), None
        for rung in rungs:
            trial.report(curve[rung - 1], rung)
            if trial.should_prune():
                at = rung
                break
        asked.tell(trial, state=optuna.trial.TrialState.PRUNED) if at else asked.tell(trial, curve[-1])
        found.append(at)
    return found


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("reduction", [2, 3])
@pytest.mark.parametrize("greater", [True, False])
def test_decisions_are_those_of_optunas_pruner(seed: int, reduction: int, greater: bool) -> None:
    draws = random.Random(seed)
    rungs = rungs_of(1, reduction, 10)
    curves = [[draws.randint(0, 12) / 12 for _ in range(10)] for _ in range(14)]  # with equal scores among them
    found = decide([Reached({rung: curve[rung - 1] for rung in rungs}) for curve in curves], rungs, reduction, greater=greater)
    pruned = [decision.rung if decision.state == "pruned" else None for decision in found]
    assert pruned == ended(curves, rungs, reduction, greater=greater)
    assert any(pruned)
    assert None in pruned


@pytest.mark.parametrize("seed", range(8))
def test_the_order_in_which_trials_train_changes_nothing(seed: int) -> None:
    """Workers take any trial that may train, in any order: what is pruned is the same, and every trial ends."""
    draws, rungs = random.Random(seed), rungs_of(1, 2, 8)
    curves = [[draws.random() for _ in range(8)] for _ in range(9)]
    reached: list[dict[int, float]] = [{} for _ in curves]
    done = [False] * len(curves)
    while True:
        decisions = decide([Reached(scores, end) for scores, end in zip(reached, done, strict=True)], rungs, 2, greater=True)
        free = [place for place, decision in enumerate(decisions) if decision.state == "train" and not done[place]]
        if not free:
            break
        place = draws.choice(free)
        rung = decisions[place].rung
        if rung is None:
            done[place] = True
        else:
            reached[place][rung] = curves[place][rung - 1]
    assert [decision.rung if decision.state == "pruned" else None for decision in decisions] == ended(curves, rungs, 2, greater=True)
    assert all(end or decision.state == "pruned" for end, decision in zip(done, decisions, strict=True))


def test_decisions_by_hand() -> None:
    """One of two continues. The second trial failed, the third is better than the first, the fourth worse than both; the fifth waits for
    the first at rung 2, which has not got there; what was not measured prunes no one."""
    trials = [
        Reached({1: 0.5}),
        Reached({}, ended=True),
        Reached({1: 0.7, 2: 0.1}),
        Reached({1: 0.2}),
        Reached({}),
        Reached({1: 0.9}),
    ]
    assert decide(trials, [1, 2], 2, greater=True) == [
        Decision("train", 2),
        Decision("train"),
        Decision("wait", 2),
        Decision("pruned", 1),
        Decision("train", 1),
        Decision("wait", 1),
    ]
    assert decide([Reached({1: 0.5}), Reached({1: math.nan})], [1], 2, greater=True) == [Decision("train"), Decision("train")]
    assert is_promoted(0.5, [0.5], 4, greater=True)
    assert [is_promoted(value, [1.0, 2.0, 3.0, 4.0], 2, greater=False) for value in (1.0, 2.0, 3.0)] == [True, True, False]
    assert rungs_of(1, 3, 27) == [1, 3, 9]
    assert rungs_of(5, 3, 5) == []


def test_each_row_is_pruned_by_the_rule_and_the_best_is_taken(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = study(STUDY)
    assert call("study", "run", name, "--dry-run") == 0
    assert "pruned trials will cost less: after 1, 2, 4 ... epochs one of 2 trials continues" in capsys.readouterr().out
    assert call("study", "run", name, "--quiet") == 0
    found = outcomes()
    for row in ("backprop", "dfa"):
        trials = [each for each in found if each["row"] == row and each["trial"] is not None]
        assert len(trials) == 6
        # Optuna needs the scores of rungs that a pruned trial has not reached nowhere
        curves = [[metrics["val/accuracy"] for metrics in each["history"]] + [math.nan] * (4 - len(each["history"])) for each in trials]
        expected = ended(curves, [1, 2], 2, greater=True)
        assert [len(each["history"]) if each["status"] == "pruned" else None for each in trials] == expected
        assert {each["status"] for each in trials} == {"pruned", "finished"}
        best = max((each for each in trials if each["status"] == "finished"), key=lambda each: each["history"][-1]["val/accuracy"])
        final = next(each for each in found if each["row"] == row and each["trial"] is None)
        assert final["identity"]["config"]["optimizer.lr"] == best["identity"]["config"]["optimizer.lr"]
        assert final["status"] == "finished"
    page = Path("runs/studies/pruned/report.html").read_text()
    assert "Trials were pruned, by the same rule for each row" in page
    assert " pruned</td>" in page
    capsys.readouterr()
    assert call("study", "status", name) == 0
    assert "not among the best trials so far after epoch 1" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("events.jsonl")}
    assert call("study", "run", name, "--quiet") == 0
    assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("events.jsonl")} == before


def test_trials_that_go_on_are_those_of_a_study_without_pruning(workplace: Path) -> None:
    """Paused at rungs and resumed, they end with the same numbers; and a study that prunes no more trains the pruned ones to their end."""
    name = study(STUDY.replace("rules: [backprop, dfa]", "rules: [dfa]"))
    assert call("study", "run", name, "--quiet") == 0
    pruned = {each["trial"]: each for each in outcomes() if each["trial"] is not None}
    text = Path(name).read_text()
    study(text.replace(", pruner: asha, rung: 1, reduction: 2", ""))
    assert call("study", "run", name, "--quiet", "output=plain") == 0
    plain = {each["trial"]: each for each in outcomes("plain/studies") if each["trial"] is not None}
    assert {each["cell"] for each in plain.values()} == {each["cell"] for each in pruned.values()}
    for number, each in pruned.items():
        curve = [untimed(metrics) for metrics in plain[number]["history"]]
        assert [untimed(metrics) for metrics in each["history"]] == curve[: len(each["history"])]
        if each["status"] == "finished":
            assert untimed(each["result"]) == untimed(plain[number]["result"])
    assert call("study", "run", name, "--quiet") == 0  # over what was pruned
    later = {each["trial"]: each for each in outcomes() if each["trial"] is not None}
    assert {each["status"] for each in later.values()} == {"finished"}
    for number, each in later.items():
        assert [untimed(metrics) for metrics in each["history"]] == [untimed(metrics) for metrics in plain[number]["history"]]


def test_two_workers_prune_what_one_prunes(workplace: Path) -> None:
    name = study(STUDY.replace("rules: [backprop, dfa]", "rules: [dfa]"))
    assert call("study", "run", name, "--quiet") == 0
    assert call("study", "run", name, "--quiet", "--jobs", "2", "output=pool") == 0
    alone = {(each["cell"], each["status"], len(each["history"])) for each in outcomes()}
    assert {(each["cell"], each["status"], len(each["history"])) for each in outcomes("pool/studies")} == alone


def test_tpe_is_told_of_pruned_trials(workplace: Path) -> None:
    text = STUDY.replace("rules: [backprop, dfa]", "rules: [backprop]").replace("tune: {trials: 6", "tune: {search: tpe, trials: 7")
    name = study(text)
    assert call("study", "run", name, "--quiet") == 0
    plan = cells.plan(read_study(Path(name)))
    tuner = next(iter(Worklist(plan)._tuners.values()))
    trials = tuner.tuned().trials
    assert len(trials) == 7
    told = [trial.state for trial in tuner._study.trials]
    wanted = {"pruned": optuna.trial.TrialState.PRUNED, "finished": optuna.trial.TrialState.COMPLETE}
    assert told[:5] == [wanted[trial.status] for trial in trials[1:6]]
    assert optuna.trial.TrialState.PRUNED in told


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("budget.epochs: 4", "budget.seconds: 4", "compares trials after epochs"),
        ("rung: 1", "rung: 4", "the first rung must be less than"),
        ("budget.epochs: 4", "budget.epochs: 4, evaluation.every: 2", "there is no evaluation until then"),
        ("rules: [backprop, dfa]", "rules: [dfa, {program: sklearn, tune: {program.options.C: [1, 2], optimizer.lr: null}}]", "no epochs"),
        ("pruner: asha", "pruner: hyperband", "unknown pruner 'hyperband'"),
        ("pruner: asha", "pruner: none", "need pruner: asha"),
        ("reduction: 2", "reduction: 1", "set 2 or more"),
        ("rung: 1", "rung: 0.5", "tune: rung: must be a whole number"),
    ],
)
def test_what_cannot_be_pruned_alike_is_refused(workplace: Path, old: str, new: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        Worklist(cells.plan(read_study(Path(study(STUDY.replace(old, new))))))
    assert said in str(caught.value)


def test_a_smoke_run_of_a_study_is_another_study(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Quick cells and their floors have identities of their own, and the report says what they are."""
    text = "title: Q\nsettings: {task: digits, device: cpu, tracking.enabled: false, budget.epochs: 20}\nseeds: 1\nrules: [linear, dfa]\n"
    name = study(text)
    whole = {cell.key.id for cell in cells.plan(read_study(Path(name))).cells}
    assert call("study", "run", name, "--quick", "--quiet") == 0
    report = capsys.readouterr().out
    assert "The study was shortened" in report
    assert "quick=true instead of false" in report
    assert "This is a smoke run (quick)" in report
    found = outcomes()
    assert not {each["cell"] for each in found} & whole
    assert {each["tags"]["quick"] for each in found} == {"True"}
    assert {each["result"]["train/samples"] for each in found} == {1920.0}
    floors = list(Path("runs/studies/pruned/floors").glob("*.json"))
    assert floors
    assert call("study", "status", name, "--quick") == 0
    assert "2 cells: 2 finished" in capsys.readouterr().out
    assert call("study", "status", name) == 0
    assert "2 cells: 2 not run" in capsys.readouterr().out
