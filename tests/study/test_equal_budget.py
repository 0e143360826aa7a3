"""Own-prediction twins with as many operations as their rows. Oracle: outcomes that are written down here; nothing is trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from made_studies import cell_record

from bpfree.errors import UsageError
from bpfree.study import cells
from bpfree.study.file import read_study
from bpfree.study.report import report_on
from bpfree.study.rows import Cell
from bpfree.study.status import status_table
from bpfree.study.worklist import Worklist

COMMON = (
    "title: Equal\nsettings: {task: digits, device: cpu, threads: 1, network.width: 16, budget.epochs: 1}\nseeds: 2\nequal_budget: true\n"
)
PLAIN = COMMON + "rules: [linear, frozen, dfa]\n"
TUNED = COMMON + "rules: [dfa, {rule: frozen, tune: false}]\ntune: {trials: 4, space: {optimizer.lr: {low: 1e-4, high: 0.1, log: true}}}\n"


def worklist_of(text: str, **options: Any) -> Worklist:
    Path("equal.yaml").write_text(text)
    plan = cells.plan(read_study(Path("equal.yaml")))
    return Worklist(plan, **options)


def note(worklist: Worklist, cell: Cell, status: Any = "finished", **result: float) -> None:
    worklist.store.write(cell_record(cell.key, status, result=result))


def final(worklist: Worklist, row: str) -> list[Cell]:
    return [cell for cell in worklist.cells() if cell.key.row == row and cell.key.trial is None]


def spend(worklist: Worklist, row: str, *operations: float) -> None:
    for cell, spent in zip(final(worklist, row), operations, strict=True):
        note(worklist, cell, **{"train/operations": spent, "test/accuracy": 0.9})


def test_each_seed_has_a_twin_with_the_operations_it_took(workplace: Path) -> None:
    worklist = worklist_of(PLAIN)
    assert worklist.count() == 8  # three rows of two seeds, and twins of the one that learns features
    assert final(worklist, "dfa (twin)") == []
    spend(worklist, "dfa", 1e6, 2e6)
    twins = final(worklist, "dfa (twin)")
    assert [(cell.key.seed, cell.recipe.settings.budget.operations) for cell in twins] == [(0, 1e6), (1, 2e6)]
    assert all(cell.recipe.settings.twin and cell.recipe.settings.budget.epochs is None for cell in twins)
    assert {cell.recipe.settings.stream for cell in twins} == {"dfa"}  # the initial weights of the row
    assert (worklist.count(), worklist.left()) == (8, 6)
    for row in ("linear", "frozen"):
        spend(worklist, row, 1e5, 1e5)
    assert not worklist.complete()
    spend(worklist, "dfa (twin)", 1e6, 2e6)
    assert worklist.complete()
    assert worklist.left() == 0
    line = next(line for line in worklist.table() if line.written.label == "dfa")
    assert [record.key.id for record in line.twin.records] == [cell.key.id for cell in twins]
    assert worklist.hidden() == 0


def test_rows_that_are_not_asked_for_have_no_twins_to_run(workplace: Path) -> None:
    spend(worklist_of(PLAIN), "dfa", 1e6, 2e6)
    worklist = worklist_of(PLAIN, rows=["frozen"])
    assert worklist.count() == worklist.left() == len(worklist.cells()) == 2
    assert len(worklist.all_cells()) == 8


def test_twins_are_tuned_with_the_trials_of_their_rows(workplace: Path) -> None:
    """Each by its own scores: the twin's best rate is another one than the row's."""
    worklist = worklist_of(TUNED)
    assert worklist.count() == 2 * 4 + 2 * 2 + 2
    trials = [cell for cell in worklist.ready() if cell.key.trial is not None]
    rates: dict[str, list[float]] = {"dfa": [], "dfa (twin)": []}
    for cell in trials:
        rate = cell.recipe.flat()["optimizer.lr"] or 1e-3
        rates[cell.key.row].append(rate)
        peak = 1e-4 if cell.key.row == "dfa" else 0.1
        known = cell_record(cell.key, "finished")
        known.seen().history = [{"epoch": 1.0, "val/accuracy": 1 - abs(math.log10(rate / peak)) / 10}]
        worklist.store.write(known)
        assert cell.recipe.settings.evaluation.test is False
    assert rates["dfa"] == rates["dfa (twin)"]
    assert {cell.recipe.flat()["optimizer.lr"] for cell in final(worklist, "dfa")} == {min(rates["dfa"])}
    spend(worklist, "dfa", 1e6, 2e6)
    twins = final(worklist, "dfa (twin)")
    assert [(cell.key.seed, cell.recipe.settings.budget.operations) for cell in twins] == [(0, 1e6), (1, 2e6)]
    assert {cell.recipe.flat()["optimizer.lr"] for cell in twins} == {max(rates["dfa"])}
    # a trial that is measured again may choose another rate, in this very process
    best = next(cell for cell in trials if cell.key.row == "dfa (twin)" and cell.recipe.flat()["optimizer.lr"] == max(rates["dfa"]))
    worklist._done.clear()
    note(worklist, best, "diverged")
    assert {cell.recipe.flat()["optimizer.lr"] for cell in final(worklist, "dfa (twin)")} == {sorted(rates["dfa"])[-2]}


def status_of(worklist: Worklist) -> str:
    return status_table(lambda: worklist, worklist.store.folder_of_all, words=[])[1]


def test_a_row_without_a_result_has_no_twin_until_it_has_one(workplace: Path) -> None:
    worklist = worklist_of(PLAIN, rows=["dfa"])
    assert status_of(worklist) == "4 cells: 2 not run, 2 follow when their rows have ended"
    first, second = final(worklist, "dfa")
    note(worklist, first, **{"train/operations": 1e6})
    note(worklist, second, "diverged")
    assert (worklist.count(), worklist.left()) == (3, 1)
    assert "follow" not in status_of(worklist)
    spend(worklist, "dfa (twin)", 1e6)
    assert worklist.left() == 0
    assert not worklist.complete()
    again = worklist_of(PLAIN, rows=["dfa"], retry=["diverged"])
    assert (again.count(), again.left(), [cell.key.id for cell in again.ready()]) == (4, 2, [second.key.id])
    note(again, second, **{"train/operations": 3e6})
    again.tried(second.key.id)
    assert [(cell.key.row, cell.key.seed) for cell in again.ready()] == [("dfa (twin)", 1)]
    assert again.left() == 1


def test_where_operations_were_not_measured_there_is_no_twin(workplace: Path) -> None:
    worklist = worklist_of(PLAIN, rows=["dfa"])
    for cell in final(worklist, "dfa"):
        note(worklist, cell, **{"test/accuracy": 0.9})
    assert (worklist.count(), worklist.left(), worklist.complete()) == (2, 0, True)


def test_a_twin_that_fails_is_told(workplace: Path) -> None:
    worklist = worklist_of(PLAIN, rows=["dfa"])
    spend(worklist, "dfa", 1e6, 2e6)
    note(worklist, final(worklist, "dfa (twin)")[1], "diverged")
    assert not worklist.complete()
    report = report_on(worklist.plan, worklist.table(), ["study"])
    assert len(report.failures) == 1
    assert "dfa (twin)" in report.failures[0]
    assert "diverged" in report.failures[0]


def test_what_cannot_have_a_budget_of_operations_is_refused_before_anything_runs(workplace: Path) -> None:
    schedule = "schedule.name: OneCycleLR, schedule.options: {max_lr: 0.1, total_steps: 4}"
    text = PLAIN.replace("budget.epochs: 1", f"budget.epochs: 4, {schedule}")
    assert worklist_of(text.replace("equal_budget: true\n", "")).count() == 6
    with pytest.raises(UsageError, match=r"OneCycleLR is stepped once per epoch.*\(row dfa\)") as caught:
        worklist_of(text)
    assert caught.value.where == "equal_budget"
