"""What follows a study: its run in the tracking store, and its report. Oracles: a store that was away; files removed by hand."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from study_kit import call, mlflow_runs

from bpfree.record.folder import RunFolder, read_run
from bpfree.study import cells, study_run
from bpfree.study.file import read_study
from bpfree.study.study_run import StudyRun
from bpfree.study.worklist import Worklist
from bpfree.tracking.store import Store

COMMON = (
    "title: T\nsettings: {task: digits, device: cpu, tracking.system: false, network.width: 16, budget.epochs: 1}\nseeds: 2\n"
    "floor: false\nprobe: false\nrules: [dfa]\n"
)
TUNE = "tune: {trials: 1, space: {optimizer.lr: {low: 1e-4, high: 0.1, log: true}}}\n"


def worklist_of(text: str) -> Worklist:
    Path("s.yaml").write_text(text)
    plan = cells.plan(read_study(Path("s.yaml")))
    return Worklist(plan)


def test_two_processes_that_begin_at_once_have_one_parent(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worklist = worklist_of(COMMON)
    inside: list[str] = []
    most: list[int] = []

    def opened(self: Store, opening: Any, *, search: bool) -> bool:
        inside.append("")
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        opening.run_id = "r"
        return True

    for name, done in (("check", lambda self: None), ("probe", lambda self: None), ("open", opened)):
        monkeypatch.setattr(Store, name, done)
    threads = [threading.Thread(target=StudyRun(worklist.plan, worklist.store).open) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]


def test_the_second_of_two_that_have_read_no_note_yet_takes_the_identity_of_the_first(workplace: Path) -> None:
    worklist = worklist_of(COMMON)
    first, second = (StudyRun(worklist.plan, worklist.store) for _ in range(2))
    first.open()
    second.open()
    assert first.run_id == second.run_id == mlflow_runs()[0]["id"]
    assert len(mlflow_runs()) == 1


def test_a_store_that_was_away_is_told_when_the_command_is_given_again(workplace: Path) -> None:
    Path("away").touch()  # a file where the database's folder will be
    uri = f"tracking.uri=sqlite:///{Path('away').absolute()}/m.db"
    quick = "tracking.system: false, tracking.artifacts: false, tracking.checkpoint: false"
    text = (COMMON + TUNE).replace("seeds: 2", "seeds: 1").replace("tracking.system: false", quick)
    Path("s.yaml").write_text(text)
    assert call("study", "run", "s.yaml", "-q", uri) == 0
    Path("away").unlink()
    Path("away").mkdir()
    assert call("study", "run", "s.yaml", "-q", uri) == 0
    runs = mlflow_runs("away/m.db")
    parent = next(run for run in runs if run["name"] == "s")
    assert [run["tags"].get("mlflow.parentRunId") for run in runs if run is not parent] == [parent["id"]] * 2
    assert {run["status"] for run in runs} == {"FINISHED"}
    assert {count for run in runs for count in run["counts"].values()} == {1}


def test_cells_of_another_store_stay_there(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two finished runs, one of which names another store, the other becomes the study's, once."""
    worklist = worklist_of(COMMON)
    parent = StudyRun(worklist.plan, worklist.store)
    parent.run_id = "p"
    completed: list[Path] = []
    monkeypatch.setattr(study_run, "complete", lambda folder, uri: completed.append(folder))
    for cell, uri in zip(worklist.plan.cells, (parent._store.uri, "http://elsewhere"), strict=True):
        record = worklist.store.begin(cell.key, None)
        record.status = "failed"
        config = {"tracking.uri": uri, "tracking.enabled": True}
        with RunFolder(record.place or "").log as log:
            log.append("begin", format=2, id=record.run, name="a", config=config, tags={}, total_epochs=2, resumed=False, epoch=0)
            log.append("end", status="failed", reason="", epoch=0, result={}, tags={})
        worklist.store.write(record)
    parent._adopt(worklist.all_cells())
    parent._adopt(worklist.all_cells())
    folders = [worklist.store.output / worklist.store.run_of(cell.key) for cell in worklist.plan.cells]
    assert [read_run(folder).tags for folder in folders] == [{"mlflow.parentRunId": "p"}, {}]
    assert (folders[0] / "events.jsonl").read_text().count("mlflow.parentRunId") == 1
    assert set(completed) == {folders[0]}


def test_a_finished_study_writes_files_of_its_report_that_are_gone(workplace: Path) -> None:
    Path("s.yaml").write_text(COMMON.replace("seeds: 2", "seeds: 1").replace("system: false", "enabled: false"))
    assert call("study", "run", "s.yaml", "-q") == 0
    folder = Path("runs/studies/s")
    for name in ("report.html", "report.md", "results.csv"):
        (folder / name).unlink()
    assert call("study", "run", "s.yaml", "-q") == 0
    assert {"report.html", "report.md", "results.csv"} <= {path.name for path in folder.iterdir()}
