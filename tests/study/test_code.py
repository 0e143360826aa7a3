"""Studies of rules, networks and tasks that no plugin registers: named by their file, or objects of Python.

Oracles: the hash of the code; a mark that code leaves when it is executed; the same study with names of installed plugins, bit for bit.
"""

from __future__ import annotations

import functools
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from code_kit import FAST, MINE, written
from study_kit import call, outcomes, untimed
from torch import nn

import bpfree
from bpfree import UsageError, sources
from bpfree.baselines import DFA
from bpfree.config import allowing, parse_words
from bpfree.study import cells
from bpfree.study.command import Jobs
from bpfree.study.file import read_study
from bpfree.study.worker import Worker
from bpfree.study.worklist import Worklist
from bpfree.tasks.digits import DIGITS

STUDY = """
title: Mine beside another
rules: [mine.py:Mine, {rule: dfa, label: theirs}]
networks: [{label: n, settings: {network: mine.py:Net, network.width: 6}}]
tasks: [{label: t, settings: {task: mine.py:data}}]
settings: {budget.epochs: 1, device: cpu, tracking.enabled: false}
seeds: 2
floor: false
"""
QUICK = {"budget.epochs": 1, "device": "cpu", "tracking.enabled": False}


@pytest.fixture
def study(workplace: Path) -> Path:
    """A study in a folder of its own, with the file of code beside it."""
    (workplace / "theirs").mkdir()
    written(workplace / "theirs")
    path = Path("theirs/s.yaml")
    path.write_text(STUDY)
    return path


def planned(path: Path) -> cells.Plan:
    registry = allowing(files=[path.parent / "mine.py"])
    return cells.plan(read_study(path, registry=registry), load=True, registry=registry)


def ids(path: Path) -> list[str]:
    return [cell.key.id for cell in planned(path).cells]


# --- files of code ------------------------------------------------------------------------------------------------------


def test_a_study_runs_resumes_and_reports(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    allowed = ["--allow-code", "theirs/mine.py"]
    assert call("study", "run", str(study)) == 2
    assert "executed only if the command line names it" in capsys.readouterr().err
    assert call("study", "run", str(study), *allowed, "-q") == 0
    assert "Again: bpfree study run theirs/s.yaml --allow-code theirs/mine.py" in capsys.readouterr().out
    found = outcomes()
    assert [(each["row"], each["status"]) for each in found] == [("mine.py:Mine", "finished")] * 2 + [("theirs", "finished")] * 2
    assert found[0]["identity"]["config"]["rule.name"] == "mine.py:Mine"
    assert "mine.py:Mine" in found[0]["identity"]["sources"]
    assert str(study.parent.resolve()) not in str(found[0]["identity"])
    assert call("study", "run", str(study), *allowed) == 0
    assert "0 of 4 cells to run" in capsys.readouterr().err
    assert call("study", "status", str(study), *allowed) == 0
    assert "4 finished" in capsys.readouterr().out


@pytest.mark.slow
def test_workers_are_given_the_code(study: Path) -> None:
    """Processes of a pool: the same numbers as here, bit for bit."""
    for output, jobs in (("here", "1"), ("there", "2")):
        assert call("study", "run", str(study), "--allow-code", "theirs/mine.py", "-q", "-j", jobs, f"output={output}") == 0
    here, there = outcomes("here/studies"), outcomes("there/studies")
    assert [untimed(each["result"]) for each in here] == [untimed(each["result"]) for each in there]
    assert all(each["result"]["test/accuracy"] >= 0 for each in here)


@pytest.mark.slow
def test_jobs_of_a_cluster_are_given_the_code(study: Path) -> None:
    """submitit, with its processes on this machine."""
    words = ["--executor", "slurm", "--with", "cluster=local", "--rows", "mine.py:Mine", "--seeds", "1"]
    assert call("study", "run", str(study), "--allow-code", "theirs/mine.py", "-q", *words) == 0
    assert [each["status"] for each in outcomes()] == ["finished"]


def test_what_was_planned_is_what_is_executed(study: Path) -> None:
    """A job takes the text along: a file that is edited, or is not on another machine, changes nothing."""
    worklist = Worklist(planned(study))
    cell = worklist.ready()[0]
    job = pickle.loads(pickle.dumps(Jobs(worklist).of(cell)))
    (study.parent / "mine.py").write_text("raise SystemExit('another version')")
    record = Worker().run(job)
    assert record is not None
    assert (record.status, record.reason) == ("finished", "")
    assert (job.folder / "code" / "mine.py").read_text() == MINE


def test_an_interrupted_cell_is_resumed_where_its_file_is_now(study: Path) -> None:
    """Its checkpoint names the file's former place."""
    study.write_text(STUDY.replace("budget.epochs: 1", "budget.epochs: 3, checkpoint.every: 1"))
    worklist = Worklist(planned(study))
    cell = worklist.ready()[0]
    job = Jobs(worklist).of(cell)
    with pytest.raises(KeyboardInterrupt):
        Worker().run(Interrupting.of(job))
    known = worklist.store.read(cell.key.id)
    assert known is not None
    assert known.status == "interrupted"
    study.parent.rename("moved")
    moved = Worklist(planned(Path("moved/s.yaml")))
    again = moved.ready()[0]
    assert again.key.id == cell.key.id
    record = Worker().run(Jobs(moved).of(again))
    assert record is not None
    assert (record.status, record.reason) == ("finished", "")
    assert record.seen().resumed


class Interrupting:
    """A job whose run is stopped in its second epoch, as from a keyboard."""

    @staticmethod
    def of(job: Any) -> Any:
        from bpfree import runner

        real = runner.run

        def stopped(recipe: Any, *, observers: Any, **options: Any) -> Any:
            runner.run = real
            return real(recipe, observers=[*observers, Interrupting()], **options)

        runner.run = stopped
        return job

    @bpfree.hookimpl
    def epoch_end(self, run: Any) -> None:
        if run.epoch == 2:
            raise KeyboardInterrupt


def test_the_hash_of_the_code_is_part_of_a_cells_key(study: Path) -> None:
    before, path = ids(study), study.parent / "mine.py"
    path.write_text(MINE.replace("A fixed random", "Some") + "# a remark\n")
    assert ids(study) == before  # comments and docstrings are no code
    path.write_text(MINE.replace("(error @", "(2 * error @"))
    after = ids(study)
    assert not set(after) & set(before)
    study.parent.rename("moved")
    assert ids(Path("moved/s.yaml")) == after  # nor is the place a part of it


def test_two_files_of_one_name(study: Path) -> None:
    (study.parent / "sub").mkdir()
    written(study.parent / "sub")
    study.write_text(STUDY.replace("{rule: dfa, label: theirs}", "{rule: sub/mine.py:Mine, label: theirs}"))
    registry = allowing(files=[study.parent / "mine.py", study.parent / "sub" / "mine.py"])
    with pytest.raises(UsageError, match="two files of code are called mine"):
        cells.plan(read_study(study, registry=registry), registry=registry)


def test_compare(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Words allow the files that they name, and those of ``--allow-code`` alone."""
    mark = workplace / "mark"
    written(workplace)
    written(workplace, mark=mark, name="other.py")
    words = ["network=mine.py:Net", "task=mine.py:data", *FAST]
    assert call("compare", "mine.py:Mine", "dfa,rule.scale=2", *words, "--seeds", "1", "-q") == 0
    table = capsys.readouterr().out
    assert "mine.py:Mine, dfa,rule.scale=2 on mine.py:data" in table
    assert {"linear", "frozen", "mine.py:Mine", "backprop"} <= {each["row"] for each in outcomes()}
    assert not mark.exists()
    assert call("compare", "mine.py:Mine", "missing.py:Mine", *words) == 2
    assert "cannot read the file of code" in capsys.readouterr().err


# --- objects of Python ------------------------------------------------------------------------------------------------


class Mine(DFA):
    """A rule of this module: the one that it inherits from, by another name."""


class Net(nn.Sequential):
    """A network with an option."""

    def __init__(self, outputs: int, width: int = 8) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, outputs))


def task() -> bpfree.Task:
    return bpfree.Task.from_source(DIGITS)


def accuracies(report: Any) -> dict[str, float]:
    return {row.label: row.finished[0].result["test/accuracy"] for row in report.rows}


def test_compare_takes_objects(workplace: Path) -> None:
    """Oracle: the same network under its registered name, and the rule under that of its base: the same draws, the same numbers."""
    settings = {**QUICK, "network.depth": 1, "network.width": 8, "stream": "same"}
    options: dict[str, Any] = {"seeds": 1, "references": False, "settings": settings}
    by_name = accuracies(bpfree.compare(["dfa"], network="mlp", **options))
    by_object = accuracies(bpfree.compare([Mine, "dfa"], network=bpfree.mlp, task=task(), **options))
    assert by_object == {"Mine": by_name["dfa"], "dfa": by_name["dfa"]}
    assert len(outcomes()) == 3
    bpfree.compare([Mine, "dfa"], network=bpfree.mlp, task=task(), **options)
    assert len(outcomes()) == 3  # found again, and not run again


def test_a_study_takes_objects(workplace: Path) -> None:
    """In rows, columns and settings of all; with options; the task by a function of it."""
    made = bpfree.Study(
        "mine",
        "Mine",
        settings={**QUICK, "task": task, "network.width": 5},
        seeds=[0],
        rows=[bpfree.Row("a", {"rule": Mine, "network": Net}), bpfree.Row("b", {"rule": "dfa", "network": Net, "network.width": 6})],
        floor=False,
    )
    report = bpfree.run_study(made)
    parameters = [row.finished[0].result["parameters"] for row in report.rows]
    assert parameters == [65 * 5 + 60, 65 * 6 + 70]
    assert [row.finished[0].tags["network"] for row in report.rows] == ["Net", "Net"]
    assert "Again" not in report.text()


@pytest.mark.slow
def test_objects_travel_to_workers(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By reference to their module, which the worker imports."""
    folder = workplace / "package"
    folder.mkdir()
    written(folder, name="mine_in_a_module.py")
    monkeypatch.syspath_prepend(str(folder))
    import mine_in_a_module as theirs

    try:
        options: dict[str, Any] = {"seeds": 2, "references": False, "settings": QUICK}
        here = accuracies(bpfree.compare([theirs.Mine], network=theirs.Net, task=theirs.data, **options, output="here"))
        there = accuracies(bpfree.compare([theirs.Mine], network=theirs.Net, task=theirs.data, **options, output="there", jobs=2))
        assert here == there
    finally:
        sys.modules.pop("mine_in_a_module", None)


def test_a_tasks_data_and_spec_are_part_of_a_cells_key(workplace: Path) -> None:
    def key(made: bpfree.Task) -> str:
        return (
            cells.plan(bpfree.Study("s", settings=QUICK, seeds=[0], rows=[bpfree.Row("a", {"rule": Mine, "task": made})])).cells[0].key.id
        )

    whole = task()
    other = bpfree.Task(whole.spec, whole.train.subset(torch.arange(200)), whole.validation, whole.test)
    scaled = bpfree.Task(bpfree.TaskSpec("digits", (1, 8, 8), 10, std=(2.0,)), whole.train, whole.validation, whole.test)
    assert key(whole) == key(task())
    assert len({key(whole), key(other), key(scaled)}) == 3


def test_the_bases_of_a_rule_are_part_of_a_cells_key(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of a library that is no plugin, of which a file of code makes use."""
    (workplace / "lib").mkdir()
    library = written(workplace / "lib", name="a_library_of_rules.py")
    monkeypatch.syspath_prepend(str(workplace / "lib"))
    written(workplace, "from a_library_of_rules import Mine as Base\n\n\nclass Mine(Base):\n    pass\n")
    found = []
    try:
        for code in (MINE, MINE.replace("(error @", "(2 * error @")):
            library.write_text(code)
            for name in [name for name in sys.modules if name == "a_library_of_rules" or name.startswith("bpfree_code_mine")]:
                del sys.modules[name]
            sources.hash_of.cache_clear()
            bpfree.installed_plugins()._coded.clear()
            registry = allowing(files=["mine.py"])
            study = bpfree.Study("s", settings=QUICK, seeds=[0], rows=[bpfree.Row("a", {"rule": "mine.py:Mine"})])
            found.append(cells.plan(study, registry=registry).cells[0].key)
    finally:
        sys.modules.pop("a_library_of_rules", None)
    assert found[0].identity["sources"]["mine.py:Mine"] == found[1].identity["sources"]["mine.py:Mine"]
    assert found[0].id != found[1].id


def test_a_task_keeps_its_validation_split(workplace: Path) -> None:
    whole = task()
    assert whole.validation is not None
    own = bpfree.Task(whole.spec, whole.train, whole.validation.subset(torch.arange(50)), whole.test)
    plan = cells.plan(bpfree.Study("s", settings=QUICK, rows=[bpfree.Row("a", {"rule": Mine, "task": own})]))
    built = plan.cells[0].recipe.build_task()
    assert built.validation is not None
    assert len(built.validation) == 50


def capturing(scale: float) -> type[DFA]:
    class Scaled(DFA):
        def signals(self, *arguments: Any) -> Any:
            return [scale * signal for signal in super().signals(*arguments)]

    return Scaled


@pytest.mark.parametrize(
    ("kind", "thing", "message"),
    [
        ("rule", capturing(2.0), "captures the variables scale"),
        ("network", functools.partial(Net, width=4), "of type partial, not a function that returns a network"),
        ("network", Net(10), "give the class, or a function that makes it"),
        ("rule", Net, "the class Net, not a subclass of bpfree.Rule"),
        ("task", object(), "of type object, not a bpfree.Task"),
    ],
)
def test_objects_that_a_study_does_not_take(workplace: Path, kind: str, thing: Any, message: str) -> None:
    row = bpfree.Row("a", {"rule": "dfa", kind: thing})
    with pytest.raises(UsageError, match=message):
        cells.plan(bpfree.Study("s", settings=QUICK, rows=[row]))


def test_what_a_script_defines_stays_in_its_process(workplace: Path) -> None:
    """Where the main script has no file, as in an interactive session, its source cannot be read, which is said first."""
    own = type("Own", (DFA,), {"__module__": "__main__"})
    with pytest.raises(UsageError, match=r"is defined in the main script|source of Own cannot be read"):
        bpfree.compare([own], seeds=2, references=False, settings=QUICK, jobs=2)


def test_things_of_one_name_are_told_apart(workplace: Path) -> None:
    """Also from what is installed: ``dfa`` of the core stays what it is."""
    mine = type("dfa", (DFA,), {"__module__": __name__})
    plan = cells.plan(bpfree.Study("s", settings=QUICK, rows=[bpfree.Row("a", {"rule": mine}), bpfree.Row("b", {"rule": "dfa"})]))
    assert [row.recipe.names["rule"] for row in plan.rows] == ["dfa (Python)", "dfa"]
    kinds = [row.recipe.registry.get("rules", row.recipe.names["rule"]) for row in plan.rows]
    assert kinds == [mine, DFA]


def test_python_settings_name_code_as_words_do(workplace: Path) -> None:
    """A path in a setting is no permission: it may come from anywhere."""
    mark = workplace / "mark"
    written(workplace, mark=mark)
    with pytest.raises(UsageError, match="only if the command line names it"):
        bpfree.compare(["mine.py:Mine"], seeds=1)
    with pytest.raises(UsageError, match="only if the command line names it"):
        cells.plan(bpfree.Study("s", rows=[bpfree.Row("a", {"rule": "mine.py:Mine"})]), parse_words(["seed_=1"])[:0])
    assert not mark.exists()
