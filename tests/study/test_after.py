"""What follows a study: its run in the tracking store, and its receipt. Oracles: a store that was away; files touched by hand."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from study_kit import call, mlflow_runs

from bpfree.study import cells, receipt
from bpfree.study.agenda import Agenda
from bpfree.study.file import read_study
from bpfree.study.parent import Parent
from bpfree.study.state import Outcome, State
from bpfree.tracking.store import Store

COMMON = (
    "title: T\nsettings: {task: digits, device: cpu, tracking.system: false, network.width: 16, budget.epochs: 1}\nseeds: 2\n"
    "floor: false\nprobe: false\nrules: [dfa]\n"
)
TUNE = "tune: {trials: 1, space: {optimizer.lr: {low: 1e-4, high: 0.1, log: true}}}\n"


def agenda_of(text: str) -> Agenda:
    Path("s.yaml").write_text(text)
    plan = cells.plan(read_study(Path("s.yaml")))
    return Agenda(plan, State(plan.output, plan.study.name))


def test_two_processes_that_begin_at_once_have_one_parent(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agenda = agenda_of(COMMON)
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
    threads = [threading.Thread(target=Parent(agenda.plan, agenda.state).open) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]


def test_a_store_that_was_away_is_told_when_the_command_is_given_again(workplace: Path) -> None:
    Path("away").touch()  # a file where the database's folder will be
    uri = f"tracking.uri=sqlite:///{Path('away').absolute()}/m.db"
    quick = "tracking.system: false, tracking.artifacts: false, tracking.checkpoint: false"
    text = (COMMON + TUNE).replace("seeds: 2", "seeds: 1").replace("tracking.system: false", quick)
    Path("s.yaml").write_text(text)
    assert call("study", "run", "s.yaml", "-q", uri) == 0
    assert not list(Path("runs/studies").glob(".receipt*"))
    Path("away").unlink()
    Path("away").mkdir()
    assert call("study", "run", "s.yaml", "-q", uri) == 0
    runs = mlflow_runs("away/m.db")
    parent = next(run for run in runs if run["name"] == "s")
    assert [run["tags"].get("mlflow.parentRunId") for run in runs if run is not parent] == [parent["id"]] * 2
    assert {run["status"] for run in runs} == {"FINISHED"}
    assert {count for run in runs for count in run["counts"].values()} == {1}
    assert len(list(Path("runs/studies").glob(".receipt*"))) == 1


def test_cells_of_another_store_stay_there(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agenda = agenda_of(COMMON)
    parent = Parent(agenda.plan, agenda.state)
    parent.run_id = "p"
    here = parent._store.shown
    for cell, uri in zip(agenda.plan.cells, (here, "http://elsewhere"), strict=True):
        tracking = {"mlflow_run_id": f"child {cell.seed}", "mlflow_uri": uri}
        agenda.state.write(Outcome(cell.id, "dfa", "", cell.seed, "failed", run="none", tracking=tracking))
    told: list[tuple[str, str, str]] = []
    client = SimpleNamespace(set_tag=lambda *words: told.append(words))
    monkeypatch.setattr(Store, "connect", lambda self: client)
    parent._adopt(agenda.all_cells())
    parent._adopt(agenda.all_cells())
    assert told == [("child 0", "mlflow.parentRunId", "p")]  # once, also those that failed


def test_a_receipt_is_for_the_plugins_that_this_process_would_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "some_rules.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "a")
    first = receipt._places(["some_rules:plugin", "no_such_module"])
    assert first == receipt._places(["some_rules:plugin", "no_such_module"])
    monkeypatch.syspath_prepend(tmp_path / "b")
    assert first != receipt._places(["some_rules:plugin", "no_such_module"])


def test_a_receipt_watches_all_files_of_the_report(workplace: Path) -> None:
    Path("s.yaml").write_text(COMMON.replace("seeds: 2", "seeds: 1").replace("system: false", "enabled: false"))
    assert call("study", "run", "s.yaml", "-q") == 0
    folder = Path("runs/studies/s")
    for name in ("report.html", "report.md", "results.csv"):
        (folder / name).unlink()
        assert call("study", "run", "s.yaml", "-q") == 0
        assert (folder / name).is_file()
    watched = json.loads(next(Path("runs/studies").glob(".receipt*")).read_text())["files"]
    assert str((folder / "results.csv").absolute()) in watched
    predictions = sorted(Path("runs").glob("*/predictions.npz"))
    assert predictions
    assert {str(path.absolute()) for path in predictions} <= set(watched)


def test_a_receipt_ends_with_whatever_it_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    study, page, package = tmp_path / "s.yaml", tmp_path / "page.html", tmp_path / "package"
    package.mkdir()
    for path in (study, page, package / "rule.py"):
        path.write_text("a")
        os.utime(path, ns=(1, 1))

    def known(*words: str) -> str | None:
        return receipt.read_receipt(tmp_path, words or ["run", "s"])

    def written() -> None:
        receipt.write_receipt(tmp_path, ["run", "s"], "text", page, [study], [package])
        assert known() == "text"

    written()
    assert known("run", "t") is None
    for path in (study, page, package / "rule.py"):
        path.write_text("b")  # as large as before
        os.utime(path, ns=(2, 2))
        assert known() is None
        written()
    (package / "more.py").touch()
    assert known() is None
    written()
    for name in ("BPFREE_DATA", "MLFLOW_TRACKING_URI", "BPFREE_DISABLE_PLUGINS"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "elsewhere")
            assert known() is None, name
    with monkeypatch.context() as patch:
        patch.chdir(package)  # where other files have the same names
        assert known() is None
    assert known() == "text"
    study.unlink()
    assert known() is None
