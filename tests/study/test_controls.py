"""Controls of a study. Oracles: differences, standard errors and shares by hand, from results that are written down here; no training."""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
from made_studies import cell_record
from scipy import stats

from bpfree import UsageError
from bpfree.cli.main import main
from bpfree.config import parse_words
from bpfree.study.cells import Plan, plan
from bpfree.study.controls import Comparison, comparisons
from bpfree.study.file import find_study, read_study
from bpfree.study.report import Report, report_on, write_report
from bpfree.study.store import CellStore

HEAD = """title: Controlled
settings: {task: digits, threads: 1, device: cpu, network.width: 16}
seeds: [0, 1, 2]
controls: [frozen, random]
"""
ROWS = """rows:
  - {label: frozen, settings: {rule: frozen}}
  - {label: dfa, settings: {rule: dfa}}
  - {label: random, settings: {rule: frozen, batch_size: 32}}
  - {label: bp, settings: {rule: backprop}}
"""
COLUMNS = "columns:\n  - {label: short, settings: {budget.epochs: 1}}\n  - {label: long, settings: {budget.epochs: 2}}\n"

# correct test examples of 100, by row and seed
CORRECT = {
    "frozen": {0: 40, 1: 50, 2: 60},
    "dfa": {0: 55, 1: 60, 2: 80},  # over frozen: 15, 10, 20
    "random": {0: 54, 1: 62, 2: 79},  # dfa over it: 1, -2, 1
    "bp": {0: 30, 1: 41, 2: 49},  # over frozen: -10, -9, -11
}


def planned(folder: Path, text: str, name: str = "table.yaml") -> Plan:
    (folder / name).write_text(text)
    return plan(read_study(folder / name), parse_words([f"output={folder}"]))


def finish(made: Plan, results: Mapping[str, Mapping[int, Mapping[str, float]]], column: str = "") -> CellStore:
    """Write cells as if they had been run."""
    state = CellStore(made.output, made.study.name)
    for cell in made.cells:
        if cell.key.column == column and cell.key.seed in results.get(cell.key.row, {}):
            state.write(cell_record(cell.key, status="finished", result=dict(results[cell.key.row][cell.key.seed])))
    return state


def accuracies(correct: Mapping[str, Mapping[int, float]]) -> dict[str, dict[int, dict[str, float]]]:
    return {row: {seed: {"test/accuracy": number / 100} for seed, number in seeds.items()} for row, seeds in correct.items()}


def reported(made: Plan, state: CellStore) -> tuple[Report, dict[tuple[str, str, str], Comparison]]:
    lines = [dataclasses.replace(row, records=[state.seen(cell.key.id) for cell in row.cells]) for row in made.rows]
    report = report_on(made, lines, ["study", "run", "table.yaml"])
    return report, {(each.column, each.row, each.control): each for each in comparisons(made, report.rows)}


def section(report: Report) -> list[list[str]]:
    assert report.controls is not None
    return [list(cells) for cells in report.controls.table]


# --- the numbers ------------------------------------------------------------------------------------------------------


GAINS = {
    ("dfa", "frozen"): [15, 10, 20],
    ("dfa", "random"): [1, -2, 1],
    ("bp", "frozen"): [-10, -9, -11],
    ("bp", "random"): [-24, -21, -30],
}
POOLED = math.sqrt(statistics.fmean(statistics.variance(gains) for gains in GAINS.values()))
"""Over the four comparisons of the column, each of three seeds: eight degrees of freedom."""
ERROR = POOLED / math.sqrt(3)


def p_value(gain: float) -> float:
    return float(2 * stats.t.sf(abs(gain) / ERROR, 8))


@pytest.mark.parametrize("kind", ["error", "accuracy"])
def test_gains_are_paired_and_positive_where_the_row_is_better(tmp_path: Path, kind: str) -> None:
    """Whatever is reported, an error or an accuracy, the gain is the same. Oracle of errors: SciPy's t, Holm's correction by hand."""
    made = planned(tmp_path, HEAD + ROWS.replace("{rule: dfa}}", f"{{rule: dfa}}, published: {{test/{kind}: 20}}}}"))
    report, found = reported(made, finish(made, accuracies(CORRECT)))
    assert made.study.published_metric("test") == f"test/{kind}"
    assert [(each[1], each[2]) for each in found] == list(GAINS)
    for (_, row, control), each in found.items():
        assert each.gains == pytest.approx(GAINS[row, control])
        assert each.standard_error == pytest.approx(ERROR)
        assert each.difference.p == pytest.approx(p_value(statistics.fmean(GAINS[row, control])))
    ordered = sorted(found.values(), key=lambda each: each.difference.p)
    stepped = [(4 - rank) * each.difference.p for rank, each in enumerate(ordered)]
    assert [each.difference.adjusted for each in ordered] == pytest.approx([min(1, max(stepped[: rank + 1])) for rank in range(4)])
    verdicts = {(row, control): each.verdict for (_, row, control), each in found.items()}
    assert verdicts == {
        ("dfa", "frozen"): "row better",
        ("dfa", "random"): "not distinguishable",
        ("bp", "frozen"): "control better",
        ("bp", "random"): "control better",
    }
    assert [cells[:4] for cells in section(report)] == [
        ["dfa", "frozen", "+15.00", f"{ERROR:.2f}"],
        ["dfa", "random", "+0.00", f"{ERROR:.2f}"],
        ["bp", "frozen", "-10.00", f"{ERROR:.2f}"],
        ["bp", "random", "-25.00", f"{ERROR:.2f}"],
    ]
    assert report.controls is not None
    stated = {"error": "the control's test error minus the row's", "accuracy": "the row's test accuracy minus the control's"}
    assert stated[kind] in report.controls.legend
    assert "positive means that the row is better" in report.controls.legend
    assert "5 % over the family of 4 comparisons (Holm)" in report.controls.legend
    assert "Fewer than five seeds give intervals, no claims" in report.controls.legend


def test_only_seeds_that_both_have_count(tmp_path: Path) -> None:
    """Unpaired seeds would change mean and error; what is not finished, or not measured, is no result."""
    made = planned(tmp_path, HEAD + ROWS)
    state = finish(made, accuracies({"frozen": {0: 40, 1: 50}, "dfa": {1: 61, 2: 99}, "bp": {0: 60, 1: 64, 2: 90}}))
    for cell in made.cells:
        if cell.key.seed == 2 and cell.key.row in ("frozen", "random"):
            broken = {"frozen": "diverged", "random": "failed"}[cell.key.row]
            state.write(cell_record(cell.key, status=broken, result={"test/accuracy": 0.1}))  # type: ignore[arg-type]
        if cell.key.seed == 0 and cell.key.row == "random":
            state.write(cell_record(cell.key, status="finished", result={"test/loss": 1.0}))
    report, _ = reported(made, state)
    # the one pair of two seeds, 20 and 14, has the only deviation, with which both are judged
    assert [cells[:5] for cells in section(report)] == [
        ["dfa", "frozen", "+11.00", f"{statistics.stdev([20, 14]):.2f}", "1 of 3"],
        ["bp", "frozen", "+17.00", "3.00", "2 of 3"],
    ]


def test_the_section_appears_with_its_results(tmp_path: Path) -> None:
    made = planned(tmp_path, HEAD + COLUMNS + ROWS.replace("{rule: backprop}}", "{rule: backprop}, columns: [long]}"))
    state = CellStore(made.output, made.study.name)
    assert reported(made, state)[0].controls is None
    finish(made, accuracies({"dfa": {0: 50}, "bp": {0: 50}}), "short")
    assert reported(made, state)[0].controls is None
    finish(made, accuracies({"random": {0: 40}}), "short")
    assert list(reported(made, state)[1]) == [("short", "dfa", "random")]
    finish(made, accuracies(CORRECT), "long")
    report, found = reported(made, state)
    assert list(found) == [
        ("short", "dfa", "random"),
        *[("long", row, control) for row in ("dfa", "bp") for control in ("frozen", "random")],
    ]
    assert report.controls is not None
    numbers = ["gain, points", "std. error", "n", "p (Holm)", "detectable", "seeds for 1 point"]
    assert report.controls.headers == ["row", "column", "control", *numbers, "verdict"]
    assert list(report.controls.numeric) == [3, 4, 5, 6, 7, 8]
    assert section(report)[0] == ["dfa", "short", "random", "+10.00", "", "1 of 3", "", "", "", "one seed only"]


def test_losses_are_compared_as_they_are(tmp_path: Path) -> None:
    """Less is better; an infinite loss is no gain; nothing is said of points."""
    np = pytest.importorskip("numpy")
    inputs = np.random.default_rng(0).normal(size=(60, 4)).astype("float32")
    np.savez(tmp_path / "real.npz", x=inputs, y=inputs[:, :2] * 0.5)
    rows = "rows: [{label: frozen, settings: {rule: frozen}}, {label: dfa, settings: {rule: dfa}, published: {test/loss: 1}}]\n"
    head = f"title: Arrays\nsettings: {{task: npz, threads: 1, task.path: {tmp_path}/real.npz}}\nseeds: 2\ncontrols: [frozen]\n"
    made = planned(tmp_path, head + rows, "real.yaml")
    losses = {"frozen": {0: {"test/loss": 1.5}, 1: {"test/loss": math.inf}}, "dfa": {0: {"test/loss": 0.25}, 1: {"test/loss": 0.25}}}
    report, _ = reported(made, finish(made, losses))
    assert section(report) == [["dfa", "frozen", "+1.25", "", "1 of 2", "", "", "one seed only"]]
    assert report.table[0][:2] == ["frozen (control)", "inf"]  # without a deviation
    assert report.controls is not None
    assert "percentage" not in report.controls.legend


# --- the file -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("controls", "said"),
    [
        (
            "[frosen, other]",
            ["unknown row 'frosen': did you mean 'frozen'? known:", "unknown row 'other': use one of the known names; known: frozen, dfa"],
        ),
        ("frozen", ["controls: must be a list, not 'frozen'"]),
        ("[3, {frozen: 1}]", ["must be text, not 3", "must be text, not {'frozen': 1}"]),
        ("[dfa, dfa]", ["controls: 'dfa' is given twice"]),
        ("[bp, frozen, dfa, random]", ["controls: names every row"]),
    ],
)
def test_wrong_controls_are_told_with_everything_else(tmp_path: Path, controls: str, said: Iterable[str]) -> None:
    with pytest.raises(UsageError) as caught:
        planned(tmp_path, (HEAD + ROWS).replace("[frozen, random]", controls).replace("title: ", "titel: "))
    for text in (*said, "did you mean 'title'?"):
        assert text in "\n".join(caught.value.problems)


def test_controls_do_not_change_the_cells(tmp_path: Path) -> None:
    with_them, without = planned(tmp_path, HEAD + ROWS), planned(tmp_path, (HEAD + ROWS).replace("controls: [frozen, random]\n", ""))
    assert [cell.key.id for cell in with_them.cells] == [cell.key.id for cell in without.cells]
    report, found = reported(without, finish(without, accuracies(CORRECT)))
    assert report.controls is None
    assert not found
    assert [line[0] for line in report.table] == ["frozen", "dfa", "random", "bp"]


def test_the_preset_has_its_twin_as_control() -> None:
    assert find_study("digits-floor-ceiling").controls == ["frozen"]


# --- as a person sees it --------------------------------------------------------------------------------------------------


def test_terminal_and_page(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = HEAD + ROWS.replace("label: dfa", 'label: "<dfa>"')
    Path("table.yaml").write_text(text)
    made = plan(read_study(Path("table.yaml")))
    finish(made, accuracies({"frozen": CORRECT["frozen"], "<dfa>": CORRECT["dfa"]}))

    def call(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["study", *words])
        assert not ended.value.code
        return capsys.readouterr().out

    assert re.search(r"^controls +frozen, random$", call("show", "table.yaml"), re.MULTILINE)
    output = call("report", "table.yaml")
    for said in (
        r"^frozen \(control\) +50\.00 \+- 10\.00 +3",
        r"^random \(control\) +not run",
        r"^<dfa> +65\.00",
        r"^Against the controls$",
        r"^<dfa> +frozen +\+15\.00 +2\.89 +3 +0\.035 +[\d.]+ +\d+ +row better$",
        r"^Gain: the row's test accuracy minus the control's",
    ):
        assert re.search(said, output, re.MULTILINE), said
    page = Path(output.strip().splitlines()[-1]).read_text()
    cells = ["&lt;dfa&gt;", "frozen", "+15.00", "2.89", "3", "0.035"]
    assert "".join(f"<td>{cell}</td>" for cell in cells) in page.replace(' class="words"', "")
    assert page.count(">Against the controls</h2>") == 1
    assert "<td>random (control)</td>" in page


def test_a_page_without_comparisons_has_no_section(tmp_path: Path) -> None:
    made = planned(tmp_path, HEAD + ROWS)
    report, _ = reported(made, CellStore(made.output, made.study.name))
    assert "Against" not in write_report(report, tmp_path).read_text()
