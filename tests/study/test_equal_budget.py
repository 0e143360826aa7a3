"""Own-prediction twins with as many operations as their rows. Oracle: outcomes that are written down here; nothing is trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from bpfree.errors import UsageError
from bpfree.study import cells
from bpfree.study.agenda import Agenda
from bpfree.study.cells import Cell
from bpfree.study.file import read_study
from bpfree.study.report import report_on
from bpfree.study.standing import standing
from bpfree.study.state import Outcome, State

COMMON = (
    "title: Equal\nsettings: {task: digits, device: cpu, threads: 1, network.width: 16, budget.epochs: 1}\nseeds: 2\nequal_budget: true\n"
)
PLAIN = COMMON + "rules: [linear, frozen, dfa]\n"
TUNED = COMMON + "rules: [dfa, {rule: frozen, tune: false}]\ntune: {trials: 4, space: {optimizer.lr: {low: 1e-4, high: 0.1, log: true}}}\n"


def agenda_of(text: str, **options: Any) -> Agenda:
    Path("equal.yaml").write_text(text)
    plan = cells.plan(read_study(Path("equal.yaml")))
    return Agenda(plan, State(plan.output, plan.study.name), **options)


def note(agenda: Agenda, cell: Cell, status: Any = "finished", **result: float) -> None:
    agenda.state.write(Outcome(cell.id, cell.row, cell.column, cell.seed, status, trial=cell.trial, result=result))


def final(agenda: Agenda, row: str) -> list[Cell]:
    return [cell for cell in agenda.cells() if cell.row == row and cell.trial is None]


def spend(agenda: Agenda, row: str, *operations: float) -> None:
    for cell, spent in zip(final(agenda, row), operations, strict=True):
        note(agenda, cell, **{"train/operations": spent, "test/accuracy": 0.9})


def test_each_seed_has_a_twin_with_the_operations_it_took(workplace: Path) -> None:
    agenda = agenda_of(PLAIN)
    assert agenda.count() == 8  # three rows of two seeds, and twins of the one that learns features
    assert final(agenda, "dfa (twin)") == []
    spend(agenda, "dfa", 1e6, 2e6)
    twins = final(agenda, "dfa (twin)")
    assert [(cell.seed, cell.recipe.settings.budget.operations) for cell in twins] == [(0, 1e6), (1, 2e6)]
    assert all(cell.recipe.settings.twin and cell.recipe.settings.budget.epochs is None for cell in twins)
    assert {cell.recipe.settings.stream for cell in twins} == {"dfa"}  # the initial weights of the row
    assert (agenda.count(), agenda.left()) == (8, 6)
    for row in ("linear", "frozen"):
        spend(agenda, row, 1e5, 1e5)
    assert not agenda.complete()
    spend(agenda, "dfa (twin)", 1e6, 2e6)
    assert agenda.complete()
    assert agenda.left() == 0
    line = next(line for line in agenda.lines() if line.row.label == "dfa")
    assert [line.twins[seed].cell for seed in (0, 1)] == [cell.id for cell in twins]
    assert agenda.hidden() == 0


def test_rows_that_are_not_asked_for_have_no_twins_to_run(workplace: Path) -> None:
    spend(agenda_of(PLAIN), "dfa", 1e6, 2e6)
    agenda = agenda_of(PLAIN, rows=["frozen"])
    assert agenda.count() == agenda.left() == len(agenda.cells()) == 2
    assert len(agenda.all_cells()) == 8


def test_twins_are_tuned_with_the_trials_of_their_rows(workplace: Path) -> None:
    """Each by its own scores: the twin's best rate is another one than the row's."""
    agenda = agenda_of(TUNED)
    assert agenda.count() == 2 * 4 + 2 * 2 + 2
    trials = [cell for cell in agenda.ready() if cell.trial is not None]
    rates: dict[str, list[float]] = {"dfa": [], "dfa (twin)": []}
    for cell in trials:
        rate = cell.recipe.flat()["optimizer.lr"] or 1e-3
        rates[cell.row].append(rate)
        peak = 1e-4 if cell.row == "dfa" else 0.1
        known = Outcome(cell.id, cell.row, "", cell.seed, "finished", trial=cell.trial)
        known.history = [{"epoch": 1.0, "val/accuracy": 1 - abs(math.log10(rate / peak)) / 10}]
        agenda.state.write(known)
        assert cell.recipe.settings.evaluation.test is False
    assert rates["dfa"] == rates["dfa (twin)"]
    assert {cell.recipe.flat()["optimizer.lr"] for cell in final(agenda, "dfa")} == {min(rates["dfa"])}
    spend(agenda, "dfa", 1e6, 2e6)
    twins = final(agenda, "dfa (twin)")
    assert [(cell.seed, cell.recipe.settings.budget.operations) for cell in twins] == [(0, 1e6), (1, 2e6)]
    assert {cell.recipe.flat()["optimizer.lr"] for cell in twins} == {max(rates["dfa"])}
    # a trial that is measured anew may choose another rate, in this very process
    best = next(cell for cell in trials if cell.row == "dfa (twin)" and cell.recipe.flat()["optimizer.lr"] == max(rates["dfa"]))
    agenda._done.clear()
    note(agenda, best, "diverged")
    assert {cell.recipe.flat()["optimizer.lr"] for cell in final(agenda, "dfa (twin)")} == {sorted(rates["dfa"])[-2]}


def test_a_row_without_a_result_has_no_twin_until_it_has_one(workplace: Path) -> None:
    agenda = agenda_of(PLAIN, rows=["dfa"])
    assert standing(agenda)[1] == "4 cells: 2 not run, 2 follow when their rows have ended"
    first, second = final(agenda, "dfa")
    note(agenda, first, **{"train/operations": 1e6})
    note(agenda, second, "diverged")
    assert (agenda.count(), agenda.left()) == (3, 1)
    assert "follow" not in standing(agenda)[1]
    spend(agenda, "dfa (twin)", 1e6)
    assert agenda.left() == 0
    assert not agenda.complete()
    again = agenda_of(PLAIN, rows=["dfa"], retry=["diverged"])
    assert (again.count(), again.left(), [cell.id for cell in again.ready()]) == (4, 2, [second.id])
    note(again, second, **{"train/operations": 3e6})
    again.tried(second.id)
    assert [(cell.row, cell.seed) for cell in again.ready()] == [("dfa (twin)", 1)]
    assert again.left() == 1


def test_where_operations_were_not_measured_there_is_no_twin(workplace: Path) -> None:
    agenda = agenda_of(PLAIN, rows=["dfa"])
    for cell in final(agenda, "dfa"):
        note(agenda, cell, **{"test/accuracy": 0.9})
    assert (agenda.count(), agenda.left(), agenda.complete()) == (2, 0, True)


def test_a_twin_that_fails_is_told(workplace: Path) -> None:
    agenda = agenda_of(PLAIN, rows=["dfa"])
    spend(agenda, "dfa", 1e6, 2e6)
    note(agenda, final(agenda, "dfa (twin)")[1], "diverged")
    assert not agenda.complete()
    report = report_on(agenda.plan, agenda.lines(), ["study"])
    assert len(report.failures) == 1
    assert "dfa (twin)" in report.failures[0]
    assert "diverged" in report.failures[0]


def test_what_cannot_have_a_budget_of_operations_is_refused_before_anything_runs(workplace: Path) -> None:
    schedule = "schedule.name: OneCycleLR, schedule.options: {max_lr: 0.1, total_steps: 4}"
    text = PLAIN.replace("budget.epochs: 1", f"budget.epochs: 4, {schedule}")
    assert agenda_of(text.replace("equal_budget: true\n", "")).count() == 6
    with pytest.raises(UsageError, match=r"OneCycleLR is stepped once per epoch.*\(row dfa\)") as caught:
        agenda_of(text)
    assert caught.value.where == "equal_budget"
