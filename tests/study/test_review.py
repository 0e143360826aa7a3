"""Corners of studies. Oracles: what was written by hand; locks taken here; another copy of a module; properties of Sobol points."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from made_studies import cell_record
from study_kit import call, outcomes

from bpfree.baselines import DFA
from bpfree.config import parse_words
from bpfree.errors import BpfreeError, UsageError
from bpfree.plugins import installed_plugins
from bpfree.run import Run
from bpfree.study import cells, command, concurrency
from bpfree.study.comparing import comparison
from bpfree.study.executors import InProcess, Pool
from bpfree.study.file import read_study
from bpfree.study.report.view import timed
from bpfree.study.store import CellKey, CellStore
from bpfree.study.worker import CellObserver, Job, TaskCache, Worker
from bpfree.study.worklist import Worklist

COMMON = (
    "title: T\nsettings: {task: digits, device: cpu, tracking.enabled: false, network.width: 16, budget.epochs: 1}\nseeds: 2\n"
    "floor: false\nprobe: false\n"
)
TUNED = COMMON + "rules: [dfa]\ntune: {trials: 3, space: {optimizer.lr: {low: 1e-4, high: 0.1, log: true}}}\n"


def worklist_of(text: str, *, retry: tuple[str, ...] = (), **options: Any) -> Worklist:
    Path("s.yaml").write_text(text)
    plan = cells.plan(read_study(Path("s.yaml")), **options)
    return Worklist(plan, retry=retry)


def refused(text: str) -> str:
    with pytest.raises(UsageError) as caught:
        worklist_of(text)
    return f"{caught.value.what} {caught.value.where}"


# --- tuning -------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_tuned_is_refused_at_once(workplace: Path) -> None:
    """Not in the middle of the study, when TPE first asks for it."""
    told = refused(
        TUNED.replace("{optimizer.lr: {low: 1e-4, high: 0.1, log: true}}", "{optimizer.name: [adam, sdg], budget.epochs: [1, 2]}")
    )
    assert "did you mean 'sgd'" in told
    assert "budget.epochs cannot be tuned" in told
    assert "task.validation is 0" in refused(TUNED.replace("budget.epochs: 1", "budget.epochs: 1, task.validation: 0"))
    for key, values in (
        ("task.validation", "[0.1, 0.3]"),
        ("task.split_seed", "[1, 2]"),
        ("stream", "[a, b]"),
        ("select", "[last, best-val]"),
    ):
        assert f"{key} cannot be tuned" in refused(TUNED.replace("{optimizer.lr:", f"{{{key}: {values}, optimizer.lr:"))
    worklist_of(TUNED.replace("{optimizer.lr:", "{batch_size: [32, 64], optimizer.lr:"))


def test_no_trial_sees_the_test_split_whatever_the_file_says(workplace: Path) -> None:
    worklist = worklist_of(TUNED.replace("trials: 3,", "trials: 3, settings: {evaluation.test: true},"))
    trials = [cell for cell in worklist.ready() if cell.key.trial is not None]
    assert len(trials) == 3
    assert not any(cell.recipe.settings.evaluation.test for cell in trials)


def test_more_seeds_are_none_that_tuning_chose_by(workplace: Path) -> None:
    worklist = worklist_of(TUNED.replace("trials: 3,", "trials: 3, seeds: [3, 5],"), seeds=6)
    assert list(worklist.plan.seeds) == [0, 1, 2, 4, 6, 7]
    assert worklist_of(TUNED, seeds=1).plan.seeds == [0]


def test_choices_of_a_trial_that_is_run_again_wait_for_it(workplace: Path) -> None:
    first = worklist_of(TUNED)
    trials = [cell for cell in first.ready() if cell.key.trial is not None]
    history = [{"epoch": 1.0, "val/accuracy": 0.5}]
    for cell, status in zip(trials, ("finished", "failed", "finished"), strict=True):
        first.store.write(cell_record(cell.key, status, history=history))  # type: ignore[arg-type]
    assert [cell.key.trial for cell in first.ready()] == [None, None]
    again = worklist_of(TUNED, retry=("failed",))
    assert [cell.key.trial for cell in again.ready()] == [1]
    again.tried(trials[1].key.id)
    assert [cell.key.trial for cell in again.ready()] == [None, None]


def test_a_trial_that_diverges_for_one_of_its_seeds_has_no_score(workplace: Path) -> None:
    worklist = worklist_of(TUNED.replace("trials: 3,", "trials: 3, seeds: [7, 8],"))
    for cell in [cell for cell in worklist.ready() if cell.key.trial is not None]:
        status, score = (
            ("diverged", 0.9) if (cell.key.trial, cell.key.seed) == (1, 8) else ("finished", 0.9 if cell.key.trial == 1 else 0.5)
        )
        history = [{"epoch": 1.0, "val/accuracy": score}]
        worklist.store.write(cell_record(cell.key, status, history=history))  # type: ignore[arg-type]
    tuned = worklist.table()[0].tuned
    assert tuned is not None
    assert [(trial.status, trial.score) for trial in tuned.trials] == [("finished", 50.0), ("diverged", None), ("finished", 50.0)]
    assert tuned.best is tuned.trials[0]


def test_quasi_random_points_fill_the_space(workplace: Path) -> None:
    """Of eight Sobol points in a row each lies in an eighth of its own, in every coordinate; beside a choice too."""
    space = "{optimizer.lr: {low: 1e-4, high: 0.1, log: true}, optimizer.name: [adam, sgd], optimizer.weight_decay: {low: 0.0, high: 0.8}}"
    worklist = worklist_of(TUNED.replace("trials: 3", "trials: 9").replace("{optimizer.lr: {low: 1e-4, high: 0.1, log: true}}", space))
    points = [cell.recipe.flat() for cell in worklist.ready() if cell.key.trial]
    assert sorted(int(8 * (math.log10(point["optimizer.lr"]) + 4) / 3) for point in points) == list(range(8))
    assert sorted(int(10 * point["optimizer.weight_decay"]) for point in points) == list(range(8))
    assert {point["optimizer.name"] for point in points} == {"adam", "sgd"}


# --- cells --------------------------------------------------------------------------------------------------------------


def test_a_cell_is_known_by_all_that_its_numbers_depend_on(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def arrays(name: str, seed: int) -> None:
        inputs = np.random.default_rng(seed).normal(size=(40, 4)).astype("float32")
        np.savez(name, x=inputs, y=np.arange(40) % 2)
        os.utime(name, ns=(seed, seed))

    def known(settings: str = "", rule: str = "dfa", path: str = "d.npz") -> list[str]:
        common = f"settings: {{task: npz, task.path: {path}, network.width: 4, tracking.enabled: false{settings}}}"
        return [cell.key.id for cell in worklist_of(f"title: T\n{common}\nseeds: 2\nrules: [{rule}]\n", load=True).plan.cells]

    arrays("d.npz", 1)
    base = known()
    assert len(set(base)) == 2
    # labels, and what says only where and how
    assert known(rule="{rule: dfa, label: other}") == base
    for words in (
        "tracking.system: false",
        "log_interval: 9",
        "data.resident: no",
        "checkpoint.every: 3",
        "threads: 1",
        "alignment.every: 7",
    ):
        assert known(f", {words}") == base, words
    Path("moved").mkdir()
    shutil.copy2("d.npz", "moved/other.npz")
    assert known(path="moved/other.npz") == base
    if not torch.cuda.is_available():
        assert known(", device: cpu") == known(", device: auto") == base
    # what numbers depend on
    different = ("evaluation.draws: 3", "evaluation.every: 2", "budget.epochs: 3", "threads: 2", "stream: x", "twin: true")
    for words in different:
        assert not set(known(f", {words}")) & set(base), words
    assert not set(known(rule="backprop")) & set(base)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "0.0")
        assert not set(known()) & set(base)
    with monkeypatch.context() as patch:
        patch.setattr(cells, "resolve_device", lambda name: torch.device("cuda"))
        assert not set(known()) & set(base)
    arrays("d.npz", 2)  # as large as before
    assert not set(known()) & set(base)


def test_where_a_study_is_says_nothing_of_its_runs_but_its_name_does(workplace: Path) -> None:
    worklist = worklist_of(COMMON + "rules: [dfa]\n")
    job = job_of(worklist)
    assert job.folder.name == dataclasses.replace(job, store=CellStore(Path("elsewhere"), "s")).folder.name
    other = dataclasses.replace(job.key, id="other")
    assert len({job.store.run_of(job.key), CellStore(job.store.output, "other").run_of(job.key), job.store.run_of(other)}) == 3


def test_seeds_are_the_outer_loop_and_what_follows_is_counted(workplace: Path) -> None:
    worklist = worklist_of(TUNED.replace("[dfa]", "[dfa, {rule: backprop, tune: false}, {rule: frozen, tune: false}]"))
    assert [(cell.key.row, cell.key.trial, cell.key.seed) for cell in worklist.ready() if cell.key.trial is None] == [
        ("backprop", None, 0),
        ("frozen", None, 0),
        ("backprop", None, 1),
        ("frozen", None, 1),
    ]
    assert worklist.count() == worklist.left() == 3 + 6
    worklist.tried(worklist.ready()[0].key.id)
    assert worklist.left() == 8


def test_the_time_of_a_cell_counts_over_interruptions(workplace: Path) -> None:
    worklist = worklist_of(COMMON + "rules: [dfa]\n")
    alone: Any = SimpleNamespace(most=1, look=lambda: None)
    before = cell_record(worklist.plan.cells[0].key, "interrupted", elapsed=50.0)
    outcome = worklist.store.begin(worklist.plan.cells[0].key, before)
    with pytest.raises(BpfreeError, match="not done after 40 s"):
        CellObserver(job_of(worklist, timeout=40.0), outcome, alone).progress(Run("r", "r"))
    # whose time was up has it again when it is asked for again
    again = worklist.store.begin(worklist.plan.cells[0].key, dataclasses.replace(before, status="timeout"))
    assert again.elapsed == 0
    CellObserver(job_of(worklist, timeout=40.0), again, alone).progress(Run("r", "r"))


def test_a_budget_of_another_kind_replaces_that_of_the_study(workplace: Path) -> None:
    grid = (
        "rules: [dfa, {rule: dfa, label: s, settings: {budget.samples: 500}}, {rule: dfa, label: f, settings: {budget: {forwards: 900}}}]\n"
    )
    budgets = [place.recipe.settings.budget for place in worklist_of(COMMON + grid).plan.rows]
    assert [(budget.epochs, budget.samples, budget.forwards) for budget in budgets] == [
        (1, None, None),
        (None, 500, None),
        (None, None, 900),
    ]


def test_a_set_that_names_no_files_is_the_same_cell_for_those_who_must_not_load(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registered = installed_plugins()._registered["tasks"]
    source, owner = registered["digits"]
    monkeypatch.setitem(registered, "digits", (dataclasses.replace(source, files=None), owner))
    ran = worklist_of(COMMON + "rules: [dfa]\n", load=True).plan
    looked = worklist_of(COMMON + "rules: [dfa]\n", load=False).plan
    assert ran.cells[0].key.identity["data"] is not None
    assert looked.cells[0].key.id == ran.cells[0].key.id


def test_a_rule_that_exits_ends_its_cell_alone(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def leave(*arguments: Any) -> None:
        raise SystemExit(3)

    monkeypatch.setattr(DFA, "credit", leave)
    Path("s.yaml").write_text(COMMON.replace("seeds: 2", "seeds: 1") + "rules: [dfa, linear]\n".replace("linear", "backprop"))
    assert call("study", "run", "s.yaml", "-q") == 1
    assert {outcome["row"]: (outcome["status"], outcome["reason"]) for outcome in outcomes()} == {
        "dfa": ("failed", "SystemExit: 3"),
        "backprop": ("finished", ""),
    }
    capsys.readouterr()
    assert call("study", "run", "s.yaml", "-q") == 1
    assert (
        "0 of 2 cells to run, 1 are finished, 1 ended without a result (to run them again: bpfree study retry failed s.yaml)"
        in capsys.readouterr().err
    )


def test_who_asks_for_processes_has_one_for_the_last_cell_too(workplace: Path) -> None:
    worklist = worklist_of(COMMON.replace("seeds: 2", "seeds: 1") + "rules: [dfa]\n")
    pool = command.executor_for(worklist, command.Options(jobs=2))
    assert isinstance(pool, Pool)
    assert pool.slots == 1
    assert isinstance(command.executor_for(worklist, command.Options()), InProcess)
    with pytest.raises(UsageError, match="--executor ray"):
        command.executor_for(worklist, command.Options(settings=["gpus=1"]))


def test_a_comparison_has_the_same_name_wherever_it_is_tracked() -> None:
    def name(*words: str) -> str:
        return comparison(["dfa"], parse_words(words)).name

    assert name("task=digits", "tracking.enabled=false", "data.root=x") == name("task=digits")
    assert name("task=digits", "budget.epochs=3") != name("task=digits")


# --- company ------------------------------------------------------------------------------------------------------------


def job_of(worklist: Worklist, **changes: Any) -> Job:
    return dataclasses.replace(Job(worklist.plan.cells[0].key, worklist.store, [], {}), **changes)


def test_the_mark_of_company_stays_with_the_seconds(workplace: Path) -> None:
    """A cell that continues from its checkpoint has seconds in it that it shared; one that begins again has not."""
    worklist = worklist_of(COMMON + "rules: [dfa]\n")
    before = cell_record(worklist.plan.cells[0].key, "timeout", parallel=2)
    assert worklist.store.begin(worklist.plan.cells[0].key, before).parallel == 2
    assert worklist.store.begin(worklist.plan.cells[0].key, before, restart=True).parallel == 1
    # and it is written as soon as it is known, as the process may be killed
    outcome = worklist.store.begin(worklist.plan.cells[0].key, None)
    watch = CellObserver(job_of(worklist), outcome, SimpleNamespace(most=3, look=lambda: None))  # type: ignore[arg-type]
    watch.note()
    known = worklist.store.read(outcome.key.id)
    assert known is not None
    assert known.parallel == 3


def test_who_looks_too_early_makes_nobody_invisible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process takes a file that is not locked yet for that of a dead one."""
    lock = fcntl.flock
    removed: list[Path] = []

    def raced(file: Any, operation: int) -> None:
        if not removed:
            removed.extend(tmp_path.iterdir())
            removed[0].unlink()
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", raced)
    with concurrency.present(tmp_path):
        assert len(removed) == 1
        assert [concurrency._is_held(path) for path in tmp_path.iterdir()] == [True]
        with concurrency.present(tmp_path) as second:
            assert second.most == 2
    assert list(tmp_path.iterdir()) == []


def test_company_is_counted_by_machine_and_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with concurrency.present(tmp_path) as first:
        with concurrency.present(tmp_path):
            first.look()
        first.look()
        assert first.most == 2
    monkeypatch.setattr(concurrency, "_host", lambda: "there")
    with concurrency.present(tmp_path):
        monkeypatch.setattr(concurrency, "_host", lambda: "here")
        with concurrency.present(tmp_path) as alone:
            assert alone.most == 1


def test_a_worker_leaves_what_is_finished_and_tells_a_refusal_from_a_failure(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worklist = worklist_of(COMMON + "rules: [dfa]\n")
    job = job_of(worklist, again=True)

    def broken(*arguments: Any) -> None:
        raise RuntimeError("in its constructor")

    with monkeypatch.context() as patch:
        patch.setattr(DFA, "__init__", broken)
        failed = Worker().run(job)
        assert failed is not None
        assert (failed.status, failed.reason) == ("failed", "RuntimeError: in its constructor")
    elsewhere = [*(leaf for leaf in job.key.leaves if leaf.key != "task.name"), *parse_words(["task=npz", "task.path=not-here.npz"])]
    refused = Worker().run(dataclasses.replace(job, key=dataclasses.replace(job.key, leaves=elsewhere)))
    assert refused is not None
    assert refused.status == "refused"
    # another process was faster, while this one was told to run it again
    worklist.store.write(cell_record(job.key, "finished", result={"test/accuracy": 0.25}))
    known = Worker().run(job)
    assert known is not None
    assert known.result == {"test/accuracy": 0.25}


def test_cells_of_two_tasks_have_each_their_own_data(workplace: Path) -> None:
    tasks = [{"label": "a", "settings": {"task": "digits"}}, {"label": "b", "settings": {"task": "digits", "task.validation": 0.3}}]
    worklist = worklist_of(f"title: T\nsettings: {{tracking.enabled: false}}\nrules: [dfa]\ntasks: {json.dumps(tasks)}\n")
    loaded = TaskCache()
    sizes = [len(loaded.get(place.recipe).train) for place in worklist.plan.rows]
    assert sizes[0] > sizes[1]
    assert loaded.get(worklist.plan.rows[1].recipe) is loaded.get(worklist.plan.rows[1].recipe)


def test_looking_at_a_cell_leaves_nothing_behind(workplace: Path) -> None:
    state = CellStore(Path("runs"), "s")
    state.write(cell_record(CellKey("a" * 16, "dfa", "", 0), "running"))
    seen = state.seen("a" * 16)
    assert seen is not None
    assert seen.status == "interrupted"
    assert [path.name for path in Path("runs").rglob("*") if path.is_file()] == [f"{'a' * 16}.json"]
    with state.lock("a" * 16):
        seen = state.seen("a" * 16)
        assert seen is not None
        assert seen.status == "running"


def test_timings_of_parallel_cells_are_marked_in_every_column(workplace: Path) -> None:
    worklist = worklist_of(COMMON.replace("budget.epochs: 1", "budget.seconds: 2") + "rules: [dfa, backprop]\n")
    for cell in worklist.ready():
        result = {"test/accuracy": 0.5, "train/seconds": 2.0, "train/samples_per_second": 4321.0}
        worklist.store.write(cell_record(cell.key, "finished", result=result, parallel=1 + (cell.key.row == "dfa")))
    text = command.report(worklist, ["study"], None)[0].text()
    dfa, backprop = (next(line for line in text.splitlines() if line.startswith(row)) for row in ("dfa", "backprop"))
    assert "4,321*" in dfa
    assert dfa.count("*") == 2
    assert "*" not in backprop
    assert "nor can results of runs with a time budget" in text
    assert [len(timed(line)) for line in worklist.table()] == [0, 2]  # these are drawn over seconds
