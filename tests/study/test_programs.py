"""Programs as rows of a study.

Oracles: scikit-learn called directly on the task's arrays; the calls that a program counts; its own sleep.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression, Perceptron, Ridge
from sklearn.metrics import log_loss
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC
from study_kit import call, outcomes, plugin_on_path

from bpfree import Task, TaskSpec, UsageError, runner
from bpfree.config import parse_words, resolve
from bpfree.program import Program, ProgramContext
from bpfree.programs.sklearn import outputs
from bpfree.recipe import Recipe
from bpfree.run import Run
from bpfree.study import cells
from bpfree.study.cells import Plan
from bpfree.study.file import read_study
from bpfree.training.predictions import read_predictions

QUIET = ["tracking.enabled=false", "program=sklearn", "threads=1", "device=cpu"]
PLUGIN = """
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import bpfree

bpfree_api = 2


@dataclass
class Config:
    rate: float = bpfree.option(1.0, "step of the prototypes towards the class means", gt=0)
    end: str = bpfree.option("", "how it ends: raise, or kill")


def train(context):
    calls = Path("calls")
    calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
    inputs, targets = context.arrays("train")
    inputs = torch.as_tensor(inputs).flatten(1)
    means = torch.stack([inputs[torch.as_tensor(targets) == label].mean(0) for label in range(context.spec.outputs)])
    prototypes = torch.zeros_like(means) + 0.001 * torch.randn(means.shape)

    def predict(x):
        time.sleep(0.02)  # never timed
        return -torch.cdist(torch.as_tensor(x).flatten(1), prototypes)

    for epoch in range(context.settings.budget.epochs or 1):
        prototypes += context.options.rate * (means - prototypes)
        context.log(context.score("val", predict))
        if context.options.end == "kill" and len(calls.read_text()) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if context.options.end == "raise":
            raise RuntimeError("out of luck")
    return context.score("test", predict)


@bpfree.hookimpl
def bpfree_programs():
    return {"prototypes": bpfree.Program(train, Config, "moves prototypes to class means", reads=("budget.epochs",))}
"""
STUDY = """
title: Beside
settings: {task: digits, budget.epochs: 3, network.width: 16, batch_size: 32, device: cpu, tracking.enabled: false}
seeds: 2
floor: true
controls: [forest]
rows:
  - {label: BP, settings: {rule: backprop}}
  - {label: forest, program: sklearn, settings: {program.estimator: RandomForestClassifier, program.options: {n_estimators: 10}}}
  - {label: logistic, settings: {program: sklearn, program.options: {C: 0.1}}}
"""


def study(text: str) -> str:
    Path("mine.yaml").write_text(text)
    return "mine.yaml"


def plan_of(text: str) -> Plan:
    return cells.plan(read_study(Path(study(text))))


def recipe_of(*words: str, spec: TaskSpec | None = None) -> Recipe:
    return resolve(parse_words([*QUIET, *words]), spec=spec)


def arrays(task: Task, split: Any) -> tuple[Any, Any]:
    inputs, targets = split.batch(torch.arange(len(split)))
    return task.spec.normalise(inputs).flatten(1).numpy(), targets.numpy()


# --- scikit-learn ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "made"),
    [
        ("LogisticRegression", {"C": 0.05}, LogisticRegression(C=0.05, random_state=3)),
        ("RandomForestClassifier", {"n_estimators": 15}, RandomForestClassifier(15, random_state=3)),
        ("KNeighborsClassifier", {"n_neighbors": 4}, KNeighborsClassifier(4)),
        ("SVC", {"gamma": 0.001}, SVC(gamma=0.001, random_state=3)),
        ("Perceptron", {}, Perceptron(random_state=3)),
    ],
)
def test_the_numbers_are_those_of_scikit_learn(workplace: Path, digits: Task, name: str, options: dict[str, Any], made: Any) -> None:
    words = [f"program.options.{key}={value}" for key, value in options.items()]
    run = runner.run(recipe_of(f"program.estimator={name}", "seed=3", *words), task=digits, quiet=True)
    made.fit(*arrays(digits, digits.train))
    for split, data in (("val", digits.validation), ("test", digits.test)):
        inputs, targets = arrays(digits, data)
        found = run.result if split == "test" else run.history[-1]
        assert found[f"{split}/accuracy"] == pytest.approx(made.score(inputs, targets), abs=1e-12)
        if hasattr(made, "predict_proba"):
            assert found[f"{split}/loss"] == pytest.approx(log_loss(targets, made.predict_proba(inputs), labels=range(10)), rel=1e-5)
    kept = read_predictions(run.folder or Path())
    assert kept is not None
    assert kept.predicted is not None
    assert kept.predicted.tolist() == made.predict(arrays(digits, digits.test)[0]).tolist()
    assert run.result["train/processor_seconds"] > 0


def test_a_regressor_is_scored_by_the_task(workplace: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(120, 6, generator=generator)
    targets = inputs @ torch.randn(6, 2, generator=generator) + 0.1 * torch.randn(120, 2, generator=generator)
    task = Task.of((inputs[:100], targets[:100]), (inputs[100:], targets[100:]), name="line")
    recipe = recipe_of("program.estimator=Ridge", "program.options.alpha=2", "evaluation.metrics=[r2]", spec=task.spec)
    run = runner.run(recipe, task=task, quiet=True)
    made = Ridge(alpha=2).fit(*arrays(task, task.train))
    x, y = arrays(task, task.test)
    assert run.result["test/loss"] == pytest.approx(0.5 * ((made.predict(x) - y) ** 2).sum(1).mean(), rel=1e-5)
    assert run.result["test/r2"] == pytest.approx(made.score(x, y), rel=1e-5)
    with pytest.raises(UsageError, match="predicts one number"):
        recipe_of("program.estimator=SVR", spec=task.spec)


def test_a_class_that_training_lacks_is_never_predicted(digits: Task) -> None:
    inputs, targets = arrays(digits, digits.train)
    seen = targets != 4
    made = LogisticRegression().fit(inputs[seen], targets[seen])
    scores = outputs(made, inputs[:200], digits.spec)
    assert scores.shape == (200, 10)
    assert (scores.argmax(1) == made.predict(inputs[:200])).all()
    assert (scores.argmin(1) == 4).all()
    assert np.isfinite(scores).all()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["program.estimator=RandomForestClasifier"], "did you mean RandomForestClassifier?"),
        (["program.estimator=os.system"], "scikit-learn has no such classifier"),
        (["program.estimator=sklearn.svm.SVC"], "scikit-learn has no such classifier"),
        (["program.estimator=Ridge"], "is no classifier"),
        (["program.options.c=1"], "program.options.c of LogisticRegression: did you mean C?"),
        (["program.options.C=-1"], "The 'C' parameter of LogisticRegression must be"),
        (["program.options.random_state=1"], "is the run's seed"),
        (["program.estimator=VotingClassifier"], "missing 1 required positional argument: 'estimators'"),
        (["batch_size=128"], "batch_size=128 does nothing with the program sklearn"),
        (["optimizer.lr=0.1", "budget.epochs=3"], "budget.epochs=3 does nothing with the program sklearn"),
        (["network=mlp"], "a program trains, and no rule"),
        (["task.augment=[flip]"], "task.augment does nothing with the program sklearn"),
        (["task.sampling=balanced"], "task.sampling does nothing with the program sklearn"),
        (["rule=dfa"], "either a rule trains or a program"),
        (["program=sklaern"], "did you mean 'sklearn'"),
        (["evaluation.metrics=[r2]"], "r2"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(words: list[str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipe_of(*words)
    assert said in str(caught.value)


@pytest.mark.parametrize("targets", ["multilabel", "soft", "tokens", "none"])
def test_targets_that_no_estimator_takes_are_refused(targets: Any) -> None:
    with pytest.raises(UsageError, match=f"has '{targets}' targets"):
        recipe_of(spec=TaskSpec("odd", (4,), 3, targets))


def test_options_of_no_program_are_refused() -> None:
    with pytest.raises(UsageError, match="no program is named"):
        resolve(parse_words(["rule=dfa", "program.estimator=SVC"]))


def test_a_recorded_configuration_gives_the_same_recipe() -> None:
    recipe = recipe_of("program.options.C=0.5", "seed=4")
    assert resolve(recipe.to_dict()) == recipe
    assert recipe.is_program
    assert recipe.trains == "sklearn"


# --- in a study -----------------------------------------------------------------------------------------------------------


def test_a_study_has_programs_beside_rules(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = study(STUDY)
    assert call("study", "run", name, "--dry-run") == 0
    output = capsys.readouterr().out
    assert "no estimate for 4 cells: the time of a program" in output
    assert "forest and logistic: batch_size, budget.epochs, network.width: not used by these programs." in output
    assert call("study", "run", name, "--quiet") == 0
    report = capsys.readouterr().out
    found = outcomes()
    assert [(each["row"], each["status"]) for each in found] == [(row, "finished") for row in ("BP", "forest", "logistic") for _ in "01"]
    forests = [each for each in found if each["row"] == "forest"]
    assert forests[0]["result"]["test/loss"] != forests[1]["result"]["test/loss"]  # seeds differ
    for each in found[2:]:
        assert "linear_probe" not in " ".join(each["result"])
        assert "train/seconds" in each["result"]
        assert "forward_operations" not in each["result"]
        assert "measured of rules alone" in each["tags"]["not_measured"]
        assert each["identity"]["packages"] == {"scikit-learn": metadata.version("scikit-learn")}
        assert (Path("runs") / each["run"] / "predictions.npz").is_file()
    assert "with the rule backprop and the program sklearn" in Path("runs/studies/mine/report.md").read_text()
    assert "forest and logistic: other trainers" in report
    page = Path("runs/studies/mine/report.html").read_text()
    assert "none (program sklearn)" in page
    # finished: nothing is run again
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("events.jsonl")}
    assert call("study", "run", name, "--quiet") == 0
    assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("events.jsonl")} == before
    assert call("study", "status", name) == 0
    assert "6 cells: 6 finished" in capsys.readouterr().out


def test_a_grid_has_programs(workplace: Path) -> None:
    text = STUDY.partition("controls")[0].replace("network.width: 16, ", "") + (
        "networks: [{label: narrow, settings: {network.width: 8}}, {label: wide, settings: {network.width: 32}}]\n"
        "rules: [dfa, {program: sklearn, label: forest, settings: {program.estimator: RandomForestClassifier}}]\n"
    )
    assert [row.label for row in plan_of(text).rows] == ["dfa (narrow)", "dfa (wide)", "forest"]
    with pytest.raises(UsageError, match="names another rule"):
        plan_of(text.replace("{program.estimator: Ra", "{program: other, program.estimator: Ra"))


def test_a_row_of_its_own_goes_before_what_rows_share(workplace: Path) -> None:
    """A rule in the settings of the study is not used by a row with a program, and the other way round."""
    shared = STUDY.replace("{task: digits,", "{task: digits, rule: dfa,").replace(
        "settings: {rule: backprop}", "settings: {rule.scale: 0.5}"
    )
    plan = plan_of(shared)
    assert [row.recipe.trains for row in plan.rows] == ["dfa", "sklearn", "sklearn"]
    assert "rule.name" in plan.rows[1].recipe.unused
    assert [row.recipe.settings.stream for row in plan.rows] == ["dfa", "sklearn", "sklearn"]
    both = STUDY.replace("settings: {rule: backprop}", "program: sklearn, settings: {rule: backprop}")
    with pytest.raises(UsageError, match="either a rule trains or a program"):
        plan_of(both)
    with pytest.raises(UsageError, match="the program is set twice"):
        plan_of(STUDY.replace("{program.estimator: Ra", "{program: sklearn, program.estimator: Ra"))


def test_identity_follows_options_seed_and_the_version_of_the_package(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ids(text: str) -> list[str]:
        return [cell.key.id for row in plan_of(text).rows for cell in row.cells]

    first = ids(STUDY)
    assert len(set(first)) == 6
    assert ids(STUDY) == first
    assert ids(STUDY.replace("C: 0.1", "C: 0.2"))[:4] == first[:4]
    assert not set(ids(STUDY.replace("C: 0.1", "C: 0.2"))[4:]) & set(first)
    shared = STUDY.replace("batch_size: 32", "batch_size: 48")  # which programs do not read
    assert ids(shared)[2:] == first[2:]
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "99" if name == "scikit-learn" else version(name))
    assert ids(STUDY)[:2] == first[:2]
    assert not set(ids(STUDY)[2:]) & set(first)


def test_programs_are_tuned_like_rules(workplace: Path) -> None:
    """Oracle: the best validation accuracy of the trials' own records."""
    name = study(
        "title: Tuned\nsettings: {task: digits, device: cpu, tracking.enabled: false}\nseeds: 1\nfloor: false\n"
        "rules: [{program: sklearn, label: knn, settings: {program.estimator: KNeighborsClassifier}}]\n"
        "tune: {trials: 4, space: {program.options.n_neighbors: [1, 30, 200]}}\n"
    )
    assert call("study", "run", name, "--quiet") == 0
    found = outcomes()
    trials = [each for each in found if each["trial"] is not None]
    best = max(trials, key=lambda each: each["history"][-1]["val/accuracy"])
    (final,) = [each for each in found if each["trial"] is None]
    key = "program.options.n_neighbors"
    assert final["identity"]["config"].get(key) == best["identity"]["config"].get(key)
    assert not any(key.startswith("test/") for each in trials for key in each["result"])
    assert {each["seed"] for each in trials} == {1000}


# --- a plugin's own -------------------------------------------------------------------------------------------------------

OWN = """
title: Own
settings: {task: digits, device: cpu, tracking.to: [csv], budget.epochs: 4}
seeds: 1
floor: false
rows: [{label: mine, program: prototypes, settings: {program.rate: 0.5, program.end: "%s"}}]
"""


def test_a_plugins_program_logs_epochs_and_its_scoring_is_not_timed(workplace: Path) -> None:
    """Oracle: half of the way to the class means remains after each epoch; 0.02 s of sleep for each of 5 predictions."""
    with plugin_on_path(workplace, "prototypes", PLUGIN):
        assert call("study", "run", study(OWN % ""), "--quiet") == 0
    (found,) = outcomes()
    assert found["status"] == "finished"
    assert [epoch["epoch"] for epoch in found["history"]] == [1, 2, 3, 4]
    assert found["history"][-1]["val/accuracy"] > 0.8
    assert found["result"]["train/seconds"] < 0.1 + 0.02
    lines = (Path("runs") / found["run"] / "metrics.csv").read_text()
    assert lines.count("val/accuracy") == 4
    assert "test/accuracy" in lines


def test_an_interrupted_program_starts_anew_and_a_failed_one_is_a_row(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with plugin_on_path(workplace, "prototypes", PLUGIN):
        name = study(OWN % "kill")
        assert call("study", "run", name, "--quiet") == 143
        (found,) = outcomes()
        assert found["status"] == "interrupted"
        assert found["reason"] == "stopped by SIGTERM"
        assert call("study", "run", name, "--quiet") == 0
        (found,) = outcomes()
        assert found["status"] == "finished"
        assert len(found["history"]) == 4  # those of the second attempt alone
        assert Path("calls").read_text() == "xx"
        assert call("study", "run", name, "--quiet") == 0
        assert Path("calls").read_text() == "xx"
        name = study((OWN % "raise").replace("Own", "Failing"))
        assert call("study", "run", name, "--quiet") == 1
        failed = next(each for each in outcomes() if each["status"] != "finished")
        assert (failed["status"], failed["reason"]) == ("failed", "RuntimeError: out of luck")
        capsys.readouterr()
        assert call("study", "retry", "failed", name, "--quiet") == 1
        assert "1 of 1 cells to run" in capsys.readouterr().err


def test_a_finished_run_whose_cell_was_not_noted_is_not_run_again(workplace: Path) -> None:
    with plugin_on_path(workplace, "prototypes", PLUGIN):
        name = study(OWN % "")
        assert call("study", "run", name, "--quiet") == 0
        (path,) = Path("runs/studies").rglob("cells/*.json")
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "status": "running"}))
        assert call("study", "run", name, "--quiet") == 0
    (found,) = outcomes()
    assert found["status"] == "finished"
    assert "test/accuracy" in found["result"]
    assert Path("calls").read_text() == "x"


def run_program(train: Any, workplace: Path) -> Run:
    """Run a function as a program on the digits."""
    recipe = recipe_of("task=digits")
    registry = recipe.registry
    before = registry._registered["programs"]["sklearn"]
    registry._registered["programs"]["sklearn"] = (Program(train), before[1])
    try:
        return runner.run(recipe, quiet=True)
    finally:
        registry._registered["programs"]["sklearn"] = before


def test_what_a_context_refuses(workplace: Path) -> None:
    def guess(x: Any) -> Any:
        return np.zeros((len(x), 10))

    def twice(context: ProgramContext) -> Mapping[str, float]:
        return context.score("test", guess) | context.score("test", guess)

    def words(context: ProgramContext) -> Mapping[str, Any]:
        return {"test/accuracy": "high"}

    def peeks(context: ProgramContext) -> Mapping[str, float]:
        context.arrays("test")  # type: ignore[arg-type]
        return {}

    for train, said in (
        (twice, "the test split is scored once"),
        (words, "gives metrics by name"),
        (peeks, "no split 'test' to learn from"),
    ):
        with pytest.raises(UsageError, match=said):
            run_program(train, workplace)


def test_a_prediction_that_is_no_number_is_divergence(workplace: Path) -> None:
    def train(context: ProgramContext) -> Mapping[str, float]:
        return context.score("val", lambda x: np.full((len(x), 10), np.nan))

    assert run_program(train, workplace).status == "diverged"


def test_draws_of_torch_follow_the_seed_and_the_callers_generator_stays(workplace: Path) -> None:
    drawn: list[float] = []

    def train(context: ProgramContext) -> Mapping[str, float]:
        drawn.append(float(torch.rand(())))
        return {"test/loss": drawn[-1]}

    torch.manual_seed(5)
    expected = torch.get_rng_state()
    run_program(train, workplace)
    assert torch.equal(torch.get_rng_state(), expected)
    torch.manual_seed(6)
    run_program(train, workplace)
    assert drawn[0] == drawn[1]


def test_programs_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("programs") == 0
    assert "sklearn" in capsys.readouterr().out
    assert call("programs", "sklearn") == 0
    assert "estimator" in capsys.readouterr().out


def test_train_takes_a_program(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "program=sklearn", "tracking.enabled=false", "--quick") == 0
    output = capsys.readouterr()
    assert "sklearn on digits" in output.err
    assert "a smoke run" in output.out
    assert call("train", "program=sklearn", "--print-config") == 0
    assert "bpfree programs lists them" in capsys.readouterr().out
