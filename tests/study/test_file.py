"""Study files. Oracles: what was written; a list of mistakes, each of which must be named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bpfree import UsageError
from bpfree.config import parse_words
from bpfree.plugins import Plugins
from bpfree.study.cells import plan
from bpfree.study.file import find_study, read_study
from bpfree.study.model import Published

DOCS = Path(__file__).parents[2] / "docs" / "studies.md"

TABLE = """
title: Two by two
paper: "Someone, Table 1"
settings: {task: digits, budget: {epochs: 4}, threads: 1}
seeds: [0, 3]
columns:
  - {label: small, settings: {network.width: 16}}
  - {label: large, settings: {network: {width: 32}}}
rows:
  - label: DFA
    settings: {rule: dfa, rule.scale: 0.5}
    published: {small: {test/error: 12.5, train/error: [0.0, 0.1]}, large: {test/error: null}}
  - label: BP
    settings: {rule: backprop}
    columns: {large: {optimizer.lr: 0.01}}
"""


def written(folder: Path, text: str, name: str = "table.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(UsageError) as caught:
        plan(read_study(written(folder, text)))
    return "\n".join(caught.value.problems)


def test_a_file_becomes_cells(tmp_path: Path) -> None:
    study = read_study(written(tmp_path, TABLE))
    assert study.name == "table"
    assert [(row.label, column.label) for row, column in study.cells()] == [("DFA", "small"), ("DFA", "large"), ("BP", "large")]
    assert study.rows[0].published == {"small": {"test/error": Published(12.5), "train/error": Published(0.0, 0.1)}, "large": {}}
    cells = plan(study).cells
    assert [(cell.key.row, cell.key.column, cell.key.seed) for cell in cells[:4]] == [
        ("DFA", "small", 0),
        ("DFA", "large", 0),
        ("BP", "large", 0),
        ("DFA", "small", 3),
    ]
    flat = cells[2].recipe.flat()
    assert [flat[key] for key in ("rule.name", "network.width", "optimizer.lr", "budget.epochs")] == ["backprop", 32, 0.01, 4]


def test_words_win_over_the_file_and_are_told(tmp_path: Path) -> None:
    study = read_study(written(tmp_path, TABLE))
    made = plan(study, parse_words(["budget.samples=500", "optimizer.lr=0.01", "output=elsewhere", "data.root=/data"]), seeds=1)
    assert made.cells[0].recipe.settings.budget.epochs is None
    assert sorted(made.changes) == [
        "budget.epochs=null instead of 4",
        "budget.samples=500 instead of null",
        "optimizer.lr=0.01 instead of null",  # of all but back-propagation, which had it
        "seeds 0 instead of 0, 3",
    ]
    assert made.shortened
    assert plan(study, parse_words(["output=elsewhere", "budget.epochs=4"])).changes == []
    longer = plan(study, parse_words(["budget.epochs=5"]), seeds=3)
    assert longer.changes == ["budget.epochs=5 instead of 4", "seeds 0, 3, 1 instead of 0, 3"]
    assert not longer.shortened
    with pytest.raises(UsageError, match="--seeds N"):
        plan(study, parse_words(["seed=4"]))


MISTAKES = """
titel: A table
seeds: 0
settings: {seed: 1, optimizer.lr: 1, optimizer: {lr: 2}, batch_size: 1, batch_size: 2, output: here}
columns: [{label: a}, {label: a}, {label: b, setings: {}}]
rows:
  - {label: "x,y", published: {c: {test/error: 3}, a: {tset/error: 3, test/error: 3, test/accuracy: high, memory_mb: -640}}}
  - {label: 3, settings: [1], columns: [d]}
  - {label: z, published: {a: {test/accuracy: 30, test/error: [1, 2, 3]}}}
"""


@pytest.mark.parametrize(
    "said",
    [
        "unknown key 'titel': did you mean 'title'?",
        "seeds: must be the number of seeds",
        "seed is not allowed here",
        "output is not allowed here",
        "settings: optimizer.lr is given twice",
        "settings.batch_size is given twice",
        "columns: 'a' is given twice",
        "unknown key 'setings': did you mean 'settings'?",
        "must not contain commas",
        "unknown column 'c'",
        "unknown metric 'tset/error': must be test/NAME or train/NAME",
        "test/accuracy: must be a number",
        "memory_mb=-640 is out of range: in MiB",
        "label: must be text, not 3",
        "unknown column 'd': use one of the known names; known: a",
        "row 2: settings: must be a mapping",
        "row z: published: a: test/error: must be a number",
        "test/accuracy and test/error in one table",
    ],
)
def test_all_mistakes_are_told_at_once(tmp_path: Path, said: str) -> None:
    assert said in refusal(tmp_path, MISTAKES)


def test_published_metrics_are_those_of_the_task_in_range(tmp_path: Path) -> None:
    """Of digits: accuracy, error and loss, and what ``evaluation.metrics`` adds; shares are in per cent."""
    text = """
title: A table
settings: {task: digits, rule: dfa}
columns: [{label: a}, {label: b, settings: {evaluation.metrics: [macro-f1]}}]
rows:
  - {label: x, published: {a: {test/macro_f1: 90}, b: {test/macro_f1: 90}}}
  - {label: y, published: {a: {train/macro_f2: 90}, b: {test/macro_f1: 300}}}
"""
    said = refusal(tmp_path, text)
    assert "published: unknown metric 'test/macro_f1': measure it: evaluation.metrics=[NAME]" in said
    assert "known: test/accuracy, test/loss, test/error (row x)" in said
    assert "published: unknown metric 'train/macro_f2'" in said
    assert "published: test/macro_f1=300 is out of range: in per cent, from 0 to 100 (row y)" in said
    far = "title: A table\nsettings: {task: digits}\ntarget: -1\nrows: [{label: x, settings: {rule: dfa}}]"
    assert "target: -1 is out of range: accuracy is in per cent, from 0 to 100" in refusal(tmp_path, far)
    good = "title: A table\nsettings: {task: digits, rule: dfa}\nrows: [{label: x, published: {test/error: 3}}]"
    assert plan(read_study(written(tmp_path, good))).rows[0].published("test/error") == Published(3.0)


def test_wrong_settings_are_told_at_once_with_their_row(tmp_path: Path) -> None:
    text = refusal(
        tmp_path,
        """
title: A table
settings: {task: digits, batchsize: 3}
rows:
  - {label: a, settings: {rule: dffa}}
  - {label: b, settings: {rule: dfa, rule.scal: 2}}
  - {label: c, settings: {rule: dfa, budget.epochs: 0}}
""",
    )
    assert text.count("batchsize") == 1
    for said in (
        "did you mean batch_size? (settings of the study)",
        "did you mean 'dfa'?",
        "(rule.name; row a)",
        "did you mean rule.scale? (row b)",
        "must be >= 1 (row c)",
    ):
        assert said in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("!!python/object/apply:os.system [ls]", "not valid YAML"),
        ("title: [", "not valid YAML"),
        ("- a list", "must be a mapping"),
        ("title: A\nrows: []", "needs rows"),
        ("title: A\nrows: [{label: a, columns: [b]}]", "the study has no columns"),
        ("title: A\ncolumns: [{label: b}]\nrows: [{label: a, columns: []}]", "must name at least one"),
    ],
)
def test_files_that_are_none(tmp_path: Path, text: str, said: str) -> None:
    assert said in refusal(tmp_path, text)


def test_every_installed_study_is_right() -> None:
    registry = Plugins()
    assert "digits-floor-ceiling" in registry.names("studies")
    planned = {name: len(plan(find_study(name, registry), registry=registry).cells) for name in registry.names("studies")}
    assert [name for name, cells in planned.items() if cells == 0] == []


def test_the_documented_format_is_the_format(tmp_path: Path) -> None:
    """The YAML blocks of the page: a grid, a table, one that tunes, one that prunes, and one with other trainers."""
    texts = re.findall(r"^```yaml\n(.*?)^```", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    grid, table, tuned, pruned, beside = (read_study(written(tmp_path, text)) for text in texts)
    assert "dfa (narrow)" in [row.label for row in grid.rows]
    assert [len(study.columns) for study in (grid, table, tuned)] == [2, 2, 1]
    assert table.rows[0].published
    assert tuned.tune is not None
    assert [len(row.space) for row in tuned.rows] == [1, 2, 0]
    assert pruned.tune is not None
    assert (pruned.tune.pruner, pruned.tune.rung, pruned.tune.reduction) == ("asha", 1, 3)
    assert [len(plan(study).rows) for study in (grid, table, tuned, pruned, beside)] == [17, 5, 3, 2, 3]
    assert [row.recipe.trains for row in plan(beside).rows] == ["backprop", "sklearn", "sklearn"]


def test_unknown_studies(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'digits-floor-ceiling'"):
        find_study("digits-floor")
    with pytest.raises(UsageError, match="cannot read the study"):
        find_study(str(tmp_path / "none.yaml"))


def test_a_row_names_its_rule_or_the_study_does_for_all(tmp_path: Path) -> None:
    rows = "rows: [{label: A, settings: {network.width: 16}}, {label: B, settings: {rule: dfa}}]\n"
    said = refusal(tmp_path, f"title: T\n{rows}")
    assert "no rule is set" in said
    assert "(row A)" in said
    bare = "title: T\nrows: [{label: A}]\n"
    assert "no rule is set" in refusal(tmp_path, bare)
    for shared in ("settings: {rule: dfa}", "settings: {rule: {name: dfa}}", "columns: [{label: c, settings: {rule.name: dfa}}]"):
        cells = plan(read_study(written(tmp_path, f"{bare}{shared}\n"))).cells
        assert {cell.recipe.names["rule"] for cell in cells} == {"dfa"}
    assert plan(read_study(written(tmp_path, bare)), parse_words(["rule=dfa"]), seeds=1).cells[0].recipe.names["rule"] == "dfa"
