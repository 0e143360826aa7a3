"""Reports on results that no one trained (``made_studies``). Oracles: numbers computed here, an HTML parser, the csv module."""

from __future__ import annotations

import csv
import dataclasses
import math
import re
import statistics
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from made_studies import cell_record, lines_of, outcome, planned, tuned
from scipy import stats

from bpfree.document.content import Figure, Section, Table
from bpfree.metric import ACCURACY
from bpfree.record.folder import RunFolder
from bpfree.study.cells import Plan
from bpfree.study.floors import Floors
from bpfree.study.measures import Measure
from bpfree.study.model import Published
from bpfree.study.report import Report, report_on, write_report
from bpfree.study.report.floor import floor_remarks
from bpfree.study.report.leaderboard import best_alternative
from bpfree.study.report.view import View, aligned, compact, timed
from bpfree.study.rows import TableRow, Trial, Tuned
from bpfree.study.store import CellStore
from bpfree.training.predictions import Predictions, write_predictions

WORDS = ["study", "run", "made.yaml"]
VOID = {"meta", "br"}


class Page(HTMLParser):
    """Checks that elements are closed, and keeps tags with attributes, and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def written(folder: Path, made: Plan, lines: Sequence[TableRow]) -> tuple[Report, str, str]:
    report = report_on(made, lines, WORDS)
    page = write_report(report, folder)
    return report, page.read_text(), page.with_suffix(".md").read_text()


def titles(report: Report) -> list[str]:
    return [section.title for section in report.sections() if section.level == 2]


def table(report: Report, name: str) -> tuple[list[str], dict[str, list[str]]]:
    """Headers, and rows by their first cell, of words only."""
    tables = [part for section in report.sections() for part in _tables(section) if part.name == name]
    (found,) = tables
    kept = [place for place, header in enumerate(found.headers) if isinstance(header, str)]
    rows = [[str(row[place]) for place in kept] for row in found.rows]
    return [str(found.headers[place]) for place in kept], {row[0]: row for row in rows}


def _tables(section: Section) -> list[Table]:
    return [part for part in section.parts if isinstance(part, Table)]


# --- the files ----------------------------------------------------------------------------------------------------------

SCRIPT = '<script>alert("1")</script>'


def rich(folder: Path) -> tuple[Plan, list[TableRow]]:
    rows = ["BP", SCRIPT, "DFA | *two*", "frozen"]
    columns = ["first", "<b>second</b>", "third"]
    made = planned(
        folder, rows=rows, columns=columns, seeds=5, controls=["frozen"], targets=dict.fromkeys(columns, 90.0), title=f"A {SCRIPT}"
    )
    lines = lines_of(made, {})
    for line in lines:
        number = rows.index(line.written.label)
        line.records = [outcome(cell, number, blocks=3 if number == 1 else 0) for cell in line.cells]
        line.tuned = tuned(number)
    return made, lines


def test_a_page_is_well_formed_and_opens_offline(tmp_path: Path) -> None:
    made, lines = rich(tmp_path)
    lines[3].records[0] = dataclasses.replace(lines[3].records[0], status="failed", reason=f"in {SCRIPT}", about=None)  # type: ignore[type-var]
    _, page, _ = written(tmp_path, made, lines)
    parsed = Page(page)
    assert "alert" not in re.sub(r"&lt;script&gt;alert\((&quot;)+1(&quot;)+\)&lt;/script&gt;", "", page)
    assert "<b>" not in page
    for tag, attributes in parsed.seen:
        assert tag not in ("link", "iframe", "object", "img", "base")
        assert not {"src", "srcset", "data"} & attributes.keys()
        assert (attributes.get("href") or "#").startswith("#")
    assert "url(" not in page
    assert "@import" not in page
    assert "http" not in page
    assert [tag for tag, _ in parsed.seen].count("script") == 1
    figures, data = ([tag for tag, _ in parsed.seen].count("figure"), page.count("<summary>Data of this figure</summary>"))
    assert figures == data > 5
    drawn = [attributes for tag, attributes in parsed.seen if tag == "svg"]
    assert all(one.get("role") == "img" or one.get("aria-hidden") == "true" for one in drawn)
    assert all(one["aria-label"] for one in drawn if one.get("role") == "img")


def test_sections_and_their_order(tmp_path: Path) -> None:
    made, lines = rich(tmp_path)
    report, page, text = written(tmp_path, made, lines)
    assert titles(report) == [
        "",
        "Results",
        "Results in the order of the study",
        "Time to target",
        "Learning curves",
        "Score against cost",
        "Tuning",
        "Across columns",
        "Against the controls",
        "Block by block",
        "Settings that differ between rows",
        "Methods",
        "Notes",
        "Run it again",
    ]
    for name in titles(report)[1:]:
        assert f">{name}</h2>" in page
    assert "## Learning curves" not in text  # nothing but figures
    assert "## Time to target" in text


def test_markdown_has_the_tables_and_no_markup_of_labels(tmp_path: Path) -> None:
    made, lines = rich(tmp_path)
    _, _, text = written(tmp_path, made, lines)
    assert "<svg" not in text
    assert "\\<script>" in text
    assert not re.search(r"(?<!\\)<script", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    assert "DFA \\| \\*two\\*" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.split(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_results_hold_every_cell(tmp_path: Path) -> None:
    made = planned(tmp_path, seeds=2)
    lines = lines_of(made)
    first = lines[0].records[0]
    assert first is not None
    about = dataclasses.replace(first.seen(), result={})
    lines[1].records = [None, dataclasses.replace(first, status="diverged", reason="not\nfinite", about=about, parallel=3)]
    write_report(report_on(made, lines, WORDS), tmp_path)
    write_report(report_on(made, lines, WORDS), tmp_path, "report-1234")
    with (tmp_path / "results.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert (tmp_path / "report-1234-results.csv").read_text() == (tmp_path / "results.csv").read_text()
    assert len(found) == 6
    assert float(found[0]["test/accuracy"]) == first.result["test/accuracy"]
    assert float(found[0]["val/accuracy"]) == first.history[-1]["val/accuracy"]
    assert (found[0]["row"], found[0]["seed"], found[0]["status"], found[0]["run"]) == ("BP", "0", "finished", "run-BP-0")
    assert "rule=backprop" in found[0]["settings"]
    assert "output=" not in found[0]["settings"]
    assert (found[2]["status"], found[2]["test/accuracy"]) == ("not run", "")
    assert (found[3]["status"], found[3]["reason"], found[3]["cells_at_once"]) == ("diverged", "not finite", "3")
    assert {path.name for path in tmp_path.iterdir()} == {
        *("made.yaml", "report.html", "report.md", "results.csv"),
        *("report-1234.html", "report-1234.md", "report-1234-results.csv"),
        *(path.name for path in tmp_path.iterdir() if path.is_dir()),
    }


def test_a_changed_study_has_names_of_its_own(tmp_path: Path) -> None:
    made = planned(tmp_path)
    changed = planned(tmp_path, words=["budget.epochs=1"])
    assert report_on(made, lines_of(made), WORDS).name == "report"
    assert re.fullmatch("report-[0-9a-f]{8}", report_on(changed, lines_of(changed), WORDS).name)


# --- what it says ---------------------------------------------------------------------------------------------------------


def scored(made: Plan, accuracies: dict[str, list[float | None]]) -> list[TableRow]:
    """Lines whose cells have only a test accuracy; ``None``: not run."""
    lines = lines_of(made, {})
    for line in lines:
        pairs = zip(line.cells, accuracies[line.written.label], strict=True)
        line.records = [
            None if value is None else cell_record(cell.key, status="finished", result={"test/accuracy": value}) for cell, value in pairs
        ]
    return lines


def test_the_leaderboard_is_sorted_and_has_intervals(tmp_path: Path) -> None:
    made = planned(tmp_path, metric="test/accuracy", published={"DFA": 96.5}, controls=["frozen"])
    values: dict[str, list[float | None]] = {"BP": [0.91, 0.92, 0.93], "DFA": [0.96, 0.97, 0.98], "frozen": [0.5, None, None]}
    lines = scored(made, values)
    report, page, _ = written(tmp_path, made, lines)
    headers, rows = table(report, "Leaderboard")
    assert headers == ["row", "rank", "test accuracy, %", "95 % interval", "n", "published", "difference"]
    low, high = stats.t.interval(0.95, 2, loc=97, scale=1 / math.sqrt(3))
    assert list(rows) == ["DFA", "BP", "frozen (control)"]
    assert rows["DFA"] == ["DFA", "1", "97.00", f"{low:.2f} to {high:.2f}", "3", "96.50", "+0.50"]
    assert rows["frozen (control)"] == ["frozen (control)", "3", "50.00", "", "1 of 3", "", ""]
    assert "DFA has the highest mean test accuracy, 97.00 %; BP is second with 92.00 %." in page
    assert "5 of" not in page
    assert "7 of 9 cells are finished." in page


def test_published_memory_stands_beside_ours(tmp_path: Path) -> None:
    """It is a cost and no score: in the table of costs, next to what was measured, and blank where it is not known."""
    made = planned(tmp_path, rows=("BP", "DFA"), metric="memory_mb", published={"DFA": 640})
    lines = lines_of(made)
    for line in lines:
        for found in line.finished:
            found.result["train/peak_memory_mb"] = 12.0
    report, _, _ = written(tmp_path, made, lines)
    headers, rows = table(report, "Costs")
    place = headers.index("memory, MiB")
    assert headers[place + 1] == "published memory, MiB"
    assert {label: row[place : place + 2] for label, row in rows.items()} == {"BP": ["12", ""], "DFA": ["12", "640"]}
    assert "published" not in table(report, "Leaderboard")[0]


def test_what_is_said_of_the_first_two(tmp_path: Path) -> None:
    """Gains of 1.8, 2 and 2.2 differ from zero by Student's t; of -4, 1 and 6 do not; and one seed says nothing."""
    made = planned(tmp_path, rows=("BP", "DFA"), metric="test/accuracy", published={"BP": 1})
    for first, second, said in (
        ([0.918, 0.93, 0.942], [0.90, 0.91, 0.92], "The difference over 3 shared seeds is 2.00 ± 0.12 (standard error)."),
        ([0.90, 0.92, 0.96], [0.94, 0.91, 0.90], "The two cannot be distinguished: the difference over 3 shared seeds is 1.00 ± 2.89"),
        ([0.90, None, None], [0.80, 0.81, 0.82], "They share 1 seed, too few to judge the difference."),
        ([0.90, None, None], [None, 0.80, None], "They share no seed"),
    ):
        _, page, _ = written(tmp_path, made, scored(made, {"BP": first, "DFA": second}))  # type: ignore[dict-item]
        assert said in page


def test_the_better_mean_may_be_of_other_seeds(tmp_path: Path) -> None:
    made = planned(tmp_path, rows=("BP", "DFA"), seeds=4, metric="test/accuracy", published={"BP": 1})
    lines = scored(made, {"BP": [0.91, 0.91, 0.921, 0.999], "DFA": [0.93, 0.93, 0.94, None]})
    _, page, _ = written(tmp_path, made, lines)
    assert "BP has the highest mean test accuracy" in page
    assert "but over the 3 seeds that both have, DFA is better." in page


def test_losses_decide_where_there_are_no_accuracies(tmp_path: Path) -> None:
    made = planned(tmp_path, rows=("BP", "DFA"), seeds=12)
    lines = lines_of(made, {})
    for number, line in enumerate(reversed(lines)):
        line.records = [outcome(cell, number, loss=True) for cell in line.cells]
    report, page, _ = written(tmp_path, made, lines)
    headers, rows = table(report, "Leaderboard")
    assert headers[2] == "test loss"
    assert list(rows) == ["DFA", "BP"]
    assert "bootstrap (percentile)" in page
    assert "validation loss, over epochs" in page


@pytest.mark.parametrize("greater", [True, False])
def test_a_metric_that_is_published_is_reported_in_its_direction(tmp_path: Path, greater: bool) -> None:
    """A share in per cent, beside a number as small as 1e-9. Oracle: the results, by hand."""
    name, share = ("macro_f1", True) if greater else ("residual", False)
    words = ["evaluation.metrics=[macro-f1]"] if greater else []
    made = planned(tmp_path, rows=("BP", "DFA"), seeds=2, words=words)
    described = {"accuracy": {"greater": True, "share": True, "unit": ""}, name: {"greater": greater, "share": share, "unit": ""}}
    if greater:
        row = dataclasses.replace(made.study.rows[0], published={"": {"test/macro_f1": Published(95.0)}})
    else:
        row = dataclasses.replace(made.study.rows[0], published={"": {"test/residual": Published(3e-9)}})
    study = dataclasses.replace(made.study, rows=[row, made.study.rows[1]])
    made = dataclasses.replace(made, study=study)
    lines = lines_of(made, {})
    for line, values in zip(lines, ([0.9, 0.92], [0.8, 0.84]) if greater else ([1e-9, 2e-9], [4e-9, 4e-9]), strict=True):
        line.written = study.rows[lines.index(line)]
        line.records = [
            cell_record(cell.key, status="finished", result={"test/accuracy": 0.5, f"test/{name}": value}, metrics=described)
            for cell, value in zip(line.cells, values, strict=True)
        ]
    report, page, _ = written(tmp_path, made, lines)
    headers, rows = table(report, "Leaderboard")
    assert headers[2] == ("test macro f1, %" if greater else "test residual")
    assert list(rows) == ["BP", "DFA"]
    assert [cells[2] for cells in rows.values()] == (["91.00", "82.00"] if greater else ["1.5e-09", "4e-09"])
    assert (headers[4], rows["BP"][4]) == ("test accuracy, %", "50.00")  # what else was measured
    difference = rows["BP"][-2:]
    assert difference == (["95.00", "-4.00"] if greater else ["3e-09", "-1.5e-09"])
    extreme, means = ("highest", "91.00 %; DFA is second with 82.00 %") if greater else ("lowest", "1.5e-09; DFA is second with 4e-09")
    assert f"BP has the {extreme} mean test {name.replace('_', ' ')}, {means}" in page
    assert "0.0000" not in page
    assert "over seeds and over new examples" not in page
    assert f"floors are measured in accuracy or loss, and the table reports the test {name.replace('_', ' ')}" in " ".join(
        floor_remarks(View(made, lines), Floors(made, tmp_path))
    )


def test_results_that_are_not_finite(tmp_path: Path) -> None:
    made = planned(tmp_path, rows=("BP", "DFA", "frozen"), metric="test/loss", published={"BP": 1.0})
    lines = lines_of(made)
    for loss, line in zip((math.nan, math.inf, 0.5), lines, strict=True):
        for known in line.records:
            assert known is not None
            known.result["test/loss"] = loss
    report, page, _ = written(tmp_path, made, lines)
    _, rows = table(report, "Leaderboard")
    assert list(rows) == ["frozen", "BP", "DFA"]
    assert [row[1] for row in rows.values()] == ["1", "", ""]
    Page(page)


@pytest.mark.parametrize("finished", [0, 1])
def test_the_least_study(tmp_path: Path, finished: int) -> None:
    made = planned(tmp_path, rows=("BP",), seeds=1)
    report, page, _ = written(tmp_path, made, lines_of(made, None if finished else {}))
    Page(page)
    assert ("Learning curves" in titles(report)) == bool(finished)
    assert ("0 of 1 cells are finished." in page) == (not finished)
    assert ("not run" in page) == (not finished)
    assert "Score against cost" not in page


def test_draws_of_stochastic_predictors(tmp_path: Path) -> None:
    """Mean and standard error over all draws of all seeds."""
    made = planned(tmp_path, rows=("BP", "DFA"), seeds=2)
    lines = scored(made, {"BP": [0.9, 0.92], "DFA": [0.8, 0.8]})
    draws = [[0.89, 0.90, 0.91], [0.91, 0.92, 0.94]]
    for known, values in zip(lines[0].records, draws, strict=True):
        assert known is not None
        known.seen().result |= {f"test/accuracy_draw_{place}": value for place, value in enumerate(values, start=1)} | {
            "test/accuracy_se": 0.01
        }
    _, rows = table(report_on(made, lines, WORDS), "Leaderboard")
    every = [100 * value for values in draws for value in values]
    error = statistics.stdev(every) / math.sqrt(6)
    assert rows["BP"][-1] == f"accuracy {statistics.fmean(every):.2f} +- {error:.2f} (6 draws)"
    assert rows["DFA"][-1] == ""


def test_the_best_other_prediction_is_chosen_on_validation_and_is_no_protocol(tmp_path: Path) -> None:
    made = planned(tmp_path, rows=("BP",), seeds=1, words=["evaluation.protocols=[linear-probe]"])
    (line,) = lines_of(made)
    known = line.records[0]
    assert known is not None
    known.seen().result |= {"test/b1/accuracy": 0.99, "test/mean/accuracy": 0.9, "test/linear_probe/accuracy": 1.0}
    known.seen().history = [{"epoch": 1.0, "val/b1/accuracy": 0.95, "val/mean/accuracy": 0.1}]
    known.history.append({"epoch": 2.0, "val/b1/accuracy": 0.8, "val/mean/accuracy": 0.85, "val/linear_probe/accuracy": 1.0})
    assert best_alternative(line) == "accuracy 90.00 (mean)"


# --- what it is worth ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 400])
def test_equal_seeds_are_no_certainty(tmp_path: Path, count: int) -> None:
    """Three equal accuracies of 0.9 on 400 examples: the error is the binomial one, sqrt(0.9 * 0.1 / 400) = 1.5 points, of 399 degrees
    of freedom; where the number of examples is not known there is no interval."""
    made = planned(tmp_path, rows=("BP", "DFA"))
    lines = scored(made, {"BP": [0.9, 0.9, 0.9], "DFA": [0.8, 0.82, 0.84]})
    for line in lines:
        for known in line.records:
            assert known is not None
            known.seen().tags |= {"examples": f"1000 train, {count} test"} if count else {}
    report, page, _ = written(tmp_path, made, lines)
    _, rows = table(report, "Leaderboard")
    half = float(stats.t.ppf(0.975, 399)) * 1.5
    assert rows["BP"][3] == (f"{90 - half:.2f} to {90 + half:.2f}" if count else "")
    assert ("90.00 % on the 400 test examples have a binomial standard error of 1.50 points" in page) == bool(count)
    told = "the interval is that over new examples" if count else "no interval is shown"
    assert f"All seeds have the same score in BP: {told}" in page
    assert ("digits (1,000 train, 400 test examples)" in page) == bool(count)


def test_the_first_paragraph_stands_alone(tmp_path: Path) -> None:
    """It names data, rules, seeds and budget, and gives the best rows and the control with their intervals."""
    made = planned(tmp_path, controls=["frozen"])
    report, page, text = written(tmp_path, made, lines_of(made))
    quoted = re.search(r'<p class="quote">(.*?)</p>', page)
    assert quoted is not None
    _, rows = table(report, "Leaderboard")
    for part in ("backprop, dfa and frozen on digits", "3 seeds each (0, 1, 2)", "20 epochs", "bpfree 0.1, PyTorch 2.9, Python 3.12"):
        assert part in quoted[1]
    for label in ("BP", "DFA", "frozen"):
        found = next(row for name, row in rows.items() if name.startswith(label))
        assert f"{label} {found[2]} ({found[3]})" in quoted[1]
    assert f"> {quoted[1]}\n" in text


def test_methods_say_how_it_was_done(tmp_path: Path) -> None:
    made = planned(tmp_path, words=["optimizer.lr=0.25"])
    lines = lines_of(made)
    for known in lines[0].records:
        assert known is not None
        known.seen().tags |= {"examples": "1000 train, 100 validation, 300 test", "data_fingerprint": "abcdef"}
    _, _, text = written(tmp_path, made, lines)
    methods = text.split("## Methods")[1].split("\n## ")[0]
    for part in (
        "digits (1,000 train, 100 validation, 300 test examples), digest abcdef, same",
        "Budget: 20 epochs. Batches: 64 examples. Optimisers: adam, rate 0.25.",
        "10 % of the training examples are held out for validation; the last weights are tested.",
        "3 repetitions (seeds 0, 1, 2)",
        "No setting was tuned",
        "Software: bpfree 0.1, PyTorch 2.9, Python 3.12.",
        "| a processor, threads 1, torch 2.9, python 3.12, bpfree 0.1 | 9 |",
    ):
        assert part in methods


def with_predictions(made: Plan, lines: Sequence[TableRow], classes: int, target: np.ndarray) -> None:
    """Row r takes every (r + 2)th example for the next class; seeds begin at another one."""
    for number, line in enumerate(lines):
        for record in line.finished:
            wrong = np.arange(len(target)) % (number + 2) == record.key.seed % (number + 2)
            predicted = np.where(wrong, (target + 1) % classes, target).astype(np.uint8)
            folder = made.output / record.run
            folder.mkdir(parents=True)
            kept = Predictions(predicted, (predicted == target).astype(np.uint8), target=target.astype(np.uint8))
            write_predictions(folder / "predictions.npz", kept)


def test_class_by_class(tmp_path: Path) -> None:
    """Scores, paired differences and confusions of each class. Oracle: counted here, example by example."""
    made = planned(tmp_path, rows=("BP", "DFA"), seeds=2)
    lines = scored(made, {"BP": [0.5, 0.5], "DFA": [0.66, 0.66]})
    for line in lines:
        for record in line.finished:
            record.run = f"run-{line.written.label}-{record.key.seed}"
    target = np.array([0] * 5 + [1] * 7 + [3] * 6)
    with_predictions(made, lines, 10, target)
    report, _, text = written(tmp_path, made, lines)
    headers, rows = table(report, "Classes")
    assert headers == ["class", "examples", "DFA, right %", "BP, right %", "difference", "verdict"]
    assert list(rows) == ["0", "1", "3"]  # class 2 has no examples
    for label, members in (("0", range(5)), ("1", range(5, 12)), ("3", range(12, 18))):
        shares = [statistics.fmean(100 * (place % cycle != seed % cycle) for seed in (0, 1) for place in members) for cycle in (3, 2)]
        assert rows[label][1:4] == [f"{len(members)}", *(f"{share:.1f}" for share in shares)]
        assert rows[label][4].split(" +- ")[0] == f"{shares[0] - shares[1]:+.1f}"
    headers, rows = table(report, "Confusions")
    wrong = statistics.fmean(100 * (place % 3 == seed % 3) for seed in (0, 1) for place in range(5))
    assert rows["0"][1:4] == [f"{100 - wrong:.1f}", f"{wrong:.1f}", ""]
    assert rows["2"][1:] == [""] * 10
    assert "Class by class" in text


def test_of_many_classes_the_most_frequent_confusions_are_listed(tmp_path: Path) -> None:
    made = planned(tmp_path, rows=("BP",), seeds=1)
    (line,) = lines_of(made)
    target = np.repeat(np.arange(30), 4)
    target[-1] = 7
    with_predictions(made, [line], 30, target)
    _, rows = table(report_on(made, [line], WORDS), "Confusions")
    assert len(rows) == 12
    assert rows["7"] == ["7", "8", "2", "40.0"]  # of five examples, those at 28 and at 30; the one at 119 is right


def test_cells_without_targets_have_no_classes(tmp_path: Path) -> None:
    """Predictions of version 0.1 are without targets."""
    made = planned(tmp_path, rows=("BP",), seeds=1)
    (line,) = lines_of(made)
    folder = made.output / line.finished[0].run
    folder.mkdir(parents=True)
    write_predictions(folder / "predictions.npz", Predictions(np.zeros(4, np.uint8), np.ones(4, np.uint8)))
    assert "Class by class" not in titles(report_on(made, [line], WORDS))


def test_of_more_than_eight_rows_the_best_are_drawn_strongly(tmp_path: Path) -> None:
    """Rows with greater numbers learn less; the legend is in the order of their scores."""
    made = planned(tmp_path, rows=[f"row {number}" for number in range(11)], seeds=2)
    lines = lines_of(made)
    report, page, _ = written(tmp_path, made, lines)
    ranked = [row.written.label for row in View(made, lines).ranked("")]
    figure = next(part for section in report.sections() if section.title == "Learning curves" for part in section.parts)
    assert isinstance(figure, Figure)
    assert [key.label for key in figure.keys] == ranked
    assert [key.faint for key in figure.keys] == [False] * 8 + [True] * 3
    assert page.count('<figure class="many">') == 2
    few = planned(tmp_path, rows=[f"row {number}" for number in range(8)], seeds=2)
    assert "faint" not in re.sub("<style>.*?</style>", "", written(tmp_path, few, lines_of(few))[1], flags=re.DOTALL)


# --- time -----------------------------------------------------------------------------------------------------------------


def with_curves(made: Plan, curves: dict[str, list[list[float]]]) -> list[TableRow]:
    """Validation accuracies by epoch, an epoch taking a second and a hundred examples."""
    lines = lines_of(made, {})
    for line in lines:
        line.records = []
        for cell, curve in zip(line.cells, curves[line.written.label], strict=True):
            history = [
                {"epoch": float(place), "seconds": float(place), "samples": 100.0 * place, "val/accuracy": value}
                for place, value in enumerate(curve, start=1)
            ]
            line.records.append(cell_record(cell.key, status="finished", result={"test/accuracy": curve[-1]}, history=history))
    return lines


def test_time_to_target(tmp_path: Path) -> None:
    made = planned(tmp_path, rows=("BP", "DFA", "frozen"), targets={"": 90.0})
    curves = {
        "BP": [[0.5, 0.9, 0.8], [0.95, 0.5, 0.5], [0.1, 0.1, 0.9]],
        "DFA": [[0.9, 0.9, 0.9], [0.5, 0.5, 0.91], [0.1, 0.2, 0.3]],
        "frozen": [[0.9, 0.9, 0.9], [0.5, 0.5, 0.5], [0.1, 0.2, 0.3]],
    }
    lines = with_curves(made, curves)
    headers, rows = table(report_on(made, lines, WORDS), "Time to target")
    assert headers == ["row", "reached", "seconds", "examples drawn", "epochs"]
    assert rows == {
        "BP": ["BP", "all 3", "2.0", "200", "2"],
        "DFA": ["DFA", "2 of 3", "3.0", "300", "3"],
        "frozen": ["frozen", "1 of 3", "inf", "inf", "inf"],
    }
    known = lines[1].records[2]
    assert known is not None
    known.status, known.seen().result, known.parallel = "diverged", {}, 2
    _, rows = table(report_on(made, lines, WORDS), "Time to target")
    assert rows["DFA"][1:3] == ["2 of 3", "3.0*"]  # a cell that diverged misses; seconds of shared machines are marked
    known.status = "interrupted"
    _, rows = table(report_on(made, lines, WORDS), "Time to target")
    assert rows["DFA"][1:5] == ["all 2", "2.0", "200", "2"]  # it may still reach it


def test_seconds_of_cells_that_waited_are_marked_and_not_drawn(tmp_path: Path) -> None:
    """BP had its processor though others ran beside it; DFA was alone among cells, on a machine that did something else."""
    made = planned(tmp_path, rows=("BP", "DFA"))
    lines = lines_of(made)
    for line, share in zip(lines, (0.95, 0.07), strict=True):
        for known in line.records:
            assert known is not None
            known.parallel = 4 if share > 0.9 else 1
            known.seen().tags |= {"threads": "1", "device": "cpu"}
            known.result["train/processor_seconds"] = share * known.result["train/seconds"]
            for metrics in known.history:
                metrics["processor_seconds"] = share * metrics["seconds"]
    report, page, _ = written(tmp_path, made, lines)
    headers, rows = table(report, "Costs")
    assert headers[1:3] == ["seconds", "processor seconds"]
    assert "*" not in rows["BP"][1]
    assert rows["DFA"][1].endswith("*")
    wall, processor = float(rows["DFA"][1].strip("*")), float(rows["DFA"][2])
    assert processor == pytest.approx(0.07 * wall, rel=0.1)
    assert f"The seconds of {len(lines[1].cells)} cells cannot be compared" in report.text()
    assert "their threads had a processor for less than 90% of the time" in report.text()
    assert "over seconds of training" in page  # of BP alone
    assert [len(timed(line)) for line in lines] == [len(lines[0].cells), 0]


def test_seconds_of_cells_that_shared_their_machine_are_marked_where_nothing_else_is_known(tmp_path: Path) -> None:
    """On a GPU, and of cells from before processor seconds were measured."""
    made = planned(tmp_path, rows=("BP", "DFA"))
    lines = lines_of(made)
    for line in lines:
        for known in line.records:
            assert known is not None
            known.parallel = 4
    report, page, _ = written(tmp_path, made, lines)
    assert "over seconds of training" not in page
    assert "validation accuracy, %, over epochs" in page
    assert page.count("Plots over seconds leave out cells") == 2
    _, rows = table(report, "Costs")
    assert all(row[1].endswith("*") for row in rows.values())
    assert "cells cannot be compared" in report.text()
    assert re.search(r"^BP .* \d+\.\d\* ", report.text(), re.MULTILINE)


def test_costs_that_were_not_measured_are_blank(tmp_path: Path) -> None:
    made = planned(tmp_path, rows=("BP", "DFA"))
    lines = lines_of(made)
    for known in lines[1].records:
        assert known is not None
        del known.result["train/peak_memory_mb"], known.result["train/samples_per_second"]
        for metrics in known.history:
            del metrics["peak_memory_mb"]
    report, _, _ = written(tmp_path, made, lines)
    headers, rows = table(report, "Costs")
    place = headers.index("memory, MiB")
    assert rows["BP"][place]
    assert rows["DFA"][place] == ""


def test_curves_come_from_the_runs(tmp_path: Path) -> None:
    """A record in a study's folder names the run, whose log has the curve."""
    made = planned(tmp_path, rows=("BP",), seeds=1)
    (cell,) = made.cells
    store = CellStore(made.output, made.study.name)
    record = store.begin(cell.key, None)
    record.status = "finished"
    with RunFolder(record.place or "").log as log:
        log.append("begin", format=2, id="a", name="a", config={}, tags={}, total_epochs=2, resumed=False, epoch=0)
        for epoch in (1, 2):
            log.append("epoch", epoch=epoch, metrics={"epoch": epoch, "samples": 5 * epoch, "val/accuracy": 0.5})
    store.write(record)
    assert "history" not in store.path_of(cell.key.id).read_text()
    known = store.read(cell.key.id)
    assert "Learning curves" in titles(report_on(made, lines_of(made, {cell.key.id: known}), WORDS))


# --- tuning, profiles, failures ---------------------------------------------------------------------------------------------


def test_the_table_of_trials(tmp_path: Path) -> None:
    made = planned(tmp_path, rows=("BP", "DFA"), seeds=1)
    lines = lines_of(made)
    trials = [
        Trial({}, "finished", 90.0, 10.0),
        Trial({"optimizer.lr": 0.123456}, "finished", 92.5, 20.0),
        Trial({"optimizer.lr": 1.0}, "diverged"),
    ]
    lines[0].tuned = Tuned(["optimizer.lr"], trials, 4)
    lines[1].tuned = Tuned(["optimizer.lr"], [Trial({}, "failed")], 1)
    report, page, _ = written(tmp_path, made, lines)
    headers, rows = table(report, "Tuning")
    assert headers == ["row", "trials", "without a score", "default, %", "chosen, %", "gain", "seconds", "chosen settings"]
    assert rows["BP"] == ["BP", "3 of 4", "1 diverged", "90.00", "92.50", "+2.50", "30", "optimizer.lr=0.1235 (so far)"]
    assert rows["DFA"] == ["DFA", "1", "1 failed", "", "", "", "", "none: no trial has a score"]
    assert "over optimizer.lr" in page


def test_a_chosen_value_at_the_edge_is_marked(tmp_path: Path) -> None:
    made = planned(tmp_path, rows=("BP", "DFA"), seeds=1)
    lines = lines_of(made)
    for line, scores in zip(lines, ([90.0, 91.0, 92.0], [90.0, 92.0, 91.0]), strict=True):
        rates = (0.01, 0.1, 1.0)
        values = zip(rates, scores, strict=True)
        line.tuned = Tuned(
            ["optimizer.lr"], [Trial({"optimizer.lr": lr}, "finished", x, values={"optimizer.lr": lr}) for lr, x in values], 3
        )
    report, page, _ = written(tmp_path, made, lines)
    _, rows = table(report, "Tuning")
    assert rows["BP"][-1] == "optimizer.lr=1.0 (at the edge of what was tried: optimizer.lr)"
    assert rows["DFA"][-1] == "optimizer.lr=0.1"
    headers, rows = table(report, "Rules and networks")
    place = headers.index("tuned")
    assert (rows["BP"][place], rows["DFA"][place]) == ("1 (3 trials, at the edge of what was tried)", "1 (3 trials)")
    assert page.count('class="ring"') == 2
    assert "BP: 92.00 at optimizer.lr = 1 (chosen, at the edge of what was tried)" in page
    with (tmp_path / "results.csv").open(newline="") as file:
        listed = [row for row in csv.DictReader(file) if row["trial"]]
    assert [(row["row"], row["trial"], row["settings"], row["val/accuracy"]) for row in listed[:2]] == [
        ("BP", "0", "optimizer.lr=0.01", "0.9"),
        ("BP", "1", "optimizer.lr=0.1", "0.91"),
    ]
    assert len(listed) == 6


def test_profiles_need_three_columns_and_five_seeds(tmp_path: Path) -> None:
    for columns, seeds, there in ((("a", "b", "c"), 5, True), (("a", "b", "c"), 4, False), (("a", "b"), 5, False)):
        made = planned(tmp_path, columns=columns, seeds=seeds)
        report, page, _ = written(tmp_path, made, lines_of(made))
        assert ("Across columns" in titles(report)) == there
        assert ("Performance profiles and probabilities of improvement need" in page) == (not there)


def test_rows_with_too_few_seeds_are_left_out_of_profiles(tmp_path: Path) -> None:
    made = planned(tmp_path, columns=("a", "b", "c"), seeds=5)
    lines = lines_of(made)
    lines[0].records[0] = None
    report, page, _ = written(tmp_path, made, lines)
    _, rows = table(report, "Probability of improvement")
    assert list(rows) == ["DFA", "frozen"]
    assert "(fewer than 5 finished seeds in some column): BP." in page


def test_the_probability_of_improvement_beside_scipys(tmp_path: Path) -> None:
    made = planned(tmp_path, rows=("BP", "DFA"), columns=("a", "b", "c"), seeds=5)
    lines = lines_of(made)
    for line in lines:
        for place, known in enumerate(line.records):
            assert known is not None
            known.result["test/accuracy"] = 0.8 + 0.01 * ((7 * place + len(line.written.label)) % 5)
    scores = {(line.written.label, line.column): list(line.by_seed(Measure("test", ACCURACY, "accuracy")).values()) for line in lines}
    oracle = statistics.fmean(stats.mannwhitneyu(scores["BP", column], scores["DFA", column]).statistic / 25 for column in "abc")
    _, rows = table(report_on(made, lines, WORDS), "Probability of improvement")
    assert rows["BP"][list(rows).index("DFA") + 1].startswith(f"{oracle:.2f} (")


def test_failures_are_a_table_and_in_the_text(tmp_path: Path) -> None:
    made = planned(tmp_path, seeds=2)
    lines = lines_of(made)
    for line, status, reason in zip(lines, ("diverged", "timeout", "refused"), ("loss is nan", "", "no data"), strict=True):
        known = line.records[1]
        assert known is not None
        known.status, known.reason, known.seen().result = status, reason, {}  # type: ignore[assignment]
    report, page, _ = written(tmp_path, made, lines)
    _, rows = table(report, "Failures")
    assert rows["BP"] == ["BP", "1", "diverged", "loss is nan"]
    assert rows["DFA"] == ["DFA", "1", "timeout", ""]
    assert report.failures == ["BP seed 1: diverged: loss is nan", "DFA seed 1: timeout", "frozen seed 1: refused: no data"]
    assert report.text().splitlines()[-1] == "Again: bpfree study run made.yaml"
    assert "not finished" not in page


def test_texts_of_numbers() -> None:
    assert [compact(value) for value in (0.5, 12, 999.4, 999.6, 43_125, 5.2e6, 1e12)] == [
        "0.5",
        "12",
        "999",
        "1.00k",
        "43.1k",
        "5.20M",
        "1.00T",
    ]
    assert aligned([1.234, 100.0, None]) == ["1.2", "100.0", ""]
    assert aligned([0.1234, 2.0]) == ["0.12", "2.00"]
    assert aligned([20.0, 1000.0]) == ["20", "1,000"]
