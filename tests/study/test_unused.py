"""Settings of studies and comparisons: a row's own are read or refused, shared ones that a row does not use are listed.

Oracle: tables of what each row reads, written out by hand.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from study_kit import call, outcomes

from bpfree import UsageError
from bpfree.config import parse_words
from bpfree.study import cells
from bpfree.study.comparing import comparison
from bpfree.study.file import read_study
from bpfree.study.tuning import check_tuning


def plan(text: str, *words: str) -> cells.Plan:
    path = Path("table.yaml")
    path.write_text(text)
    return cells.plan(read_study(path), parse_words(words))


def refused(text: str, *words: str) -> str:
    with pytest.raises(UsageError) as caught:
        check_tuning(plan(text, *words))
    return str(caught.value)


def unused(made: cells.Plan) -> dict[str, list[str]]:
    return {place.written.label: sorted(place.recipe.unused) for place in made.rows}


TWO = """
title: Two
settings: {budget.epochs: 1, rule.scale: 0.5, optimizer: {momentum: 0.9}, schedule.final: 0.1}
rows:
  - {label: sgd, settings: {rule: backprop, optimizer.name: sgd, schedule: linear}}
  - {label: dfa, settings: {rule: dfa}}
"""


def test_shared_settings_that_a_row_does_not_use_are_listed_and_left_out(workplace: Path) -> None:
    made = plan(TWO)
    assert unused(made) == {"sgd": ["rule.scale"], "dfa": ["optimizer.momentum", "schedule.final"]}
    sgd, dfa = (place.recipe for place in made.rows)
    assert (sgd.settings.optimizer.momentum, sgd.settings.schedule.final) == (0.9, 0.1)
    assert (dfa.settings.optimizer.momentum, dfa.settings.schedule.final, dfa.options["rule"].scale) == (None, 0.0, 0.5)
    for cell in made.cells:  # what the report offers to run again is what was run
        again = cells.resolve(parse_words(cell.words)).flat()
        assert {key: value for key, value in again.items() if not key.startswith(("tracking", "pictures"))} == {
            key: value for key, value in cell.recipe.flat().items() if not key.startswith(("tracking", "pictures"))
        }


def test_a_shared_option_that_another_option_of_a_row_makes_idle_is_listed(workplace: Path) -> None:
    made = plan(
        "title: T\nsettings: {rule: dfa, network.width: 16, budget.epochs: 1}\n"
        "rows: [{label: a, settings: {network.widths: [8]}}, {label: b}]\n"
    )
    assert unused(made) == {"a": ["network.width"], "b": []}
    assert [place.recipe.options["network"].width for place in made.rows] == [128, 16]


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ("rule: null", "names no rule"),
        ("rule: 5", "unknown rule '5'"),
        ("rule: dfa, rule.scal: 1", "unknown key rule.scal"),
        ("rule: backprop, rule.scale: 1", "unknown key rule.scale"),
        ("rule: dfa, optimizer.momentum: 0.9", "unknown option of adam 'momentum'"),
        ("rule: dfa, schedule.final: 0.2", "schedule.final=0.2 does nothing with schedule.name=constant"),
        ("rule: dfa, rule.name: backprop", "rule.name is given twice"),
        ("rule: {name: dfa}, rule.name: backprop", "rule.name is given twice"),
        ("rule: dfa, optimizer: {}", "optimizer={}: is a section"),
        ("rule: dfa, task: ''", "names no task"),
        ("rule: dfa, output: 007", "not allowed here"),
        ("rule: dfa, optimizer: {1: 2}", "name must be text"),
        ("rule: dfa, stream: ", "has no value"),
    ],
)
def test_a_rows_own_setting_is_read_or_refused(own: str, expected: str, workplace: Path) -> None:
    rows = f"rows: [{{label: a, settings: {{{own}}}}}, {{label: b, settings: {{rule: backprop}}}}]"
    assert expected in refused(f"title: T\nsettings: {{task: digits}}\n{rows}\n")


@pytest.mark.parametrize("layer", ["settings", "column", "override"])
def test_a_shared_setting_that_no_row_uses_is_refused(layer: str, workplace: Path) -> None:
    rows = "rows: [{label: a, settings: {rule: dfa}}, {label: b, settings: {rule: backprop}}]"
    wrong = "rule.scal: 1, schedule.gamma: 0.1"
    if layer == "settings":
        text = refused(f"title: T\nsettings: {{{wrong}}}\n{rows}\n")
    elif layer == "column":
        text = refused(f"title: T\ncolumns: [{{label: c, settings: {{{wrong}}}}}]\n{rows}\n")
    else:
        text = refused(f"title: T\n{rows}\n", "rule.scal=1", "schedule.gamma=0.1")
    assert "rule.scal is used by no row: unknown key rule.scal of rule 'dfa': did you mean rule.scale?" in text
    assert "schedule.gamma is used by no row: schedule.gamma=0.1 does nothing with schedule.name=constant" in text


def test_values_of_a_study_have_the_type_of_their_key(workplace: Path) -> None:
    text = (
        "title: 'T'\nsettings: {stream: 01, tracking: {experiment: 83e2010}}\nrows: [{label: a, settings: {rule: dfa, data.root: 007}}]\n"
    )
    settings = plan(text, "seed=1".replace("seed", "batch_size")).rows[0].recipe.settings
    assert (settings.stream, settings.tracking.experiment, settings.data.root) == ("01", "83e2010", "007")
    words = plan(text).cells[0].words
    assert "stream=01" in words
    assert cells.resolve(parse_words(words)).settings.data.root == "007"


TUNED = """
title: Tuned
settings: {budget.epochs: 1, task: digits}
rows:
  - {label: a, settings: {rule: dfa}}
  - {label: b, settings: {rule: backprop}, tune: {%s}}
tune: {trials: 2, space: {rule.scale: [0.5, 1.0]}, settings: {%s}}
"""


def test_a_tuned_setting_that_a_row_does_not_use_is_refused_for_that_row(workplace: Path) -> None:
    text = refused(TUNED % ("", ""))
    assert "rule.scale is tuned and not used: unknown key rule.scale of rule 'backprop'" in text
    assert "remove it with tune: {rule.scale: null} in the row" in text
    assert "(row b)" in text
    check_tuning(plan(TUNED % ("rule.scale: null", "")))
    assert "schedule.final is used by no row" in refused(TUNED % ("rule.scale: null, optimizer.lr: [0.1, 0.2]", "schedule.final: 0.1"))


def test_a_tuned_setting_may_hang_on_another_that_is_tuned(workplace: Path) -> None:
    both = "rule.scale: null, schedule.name: [constant, cosine], schedule.final: {low: 0.1, high: 0.5}"
    made = plan(TUNED % (both, ""))
    check_tuning(made)
    place = made.rows[1]
    more = [cells.Leaf("schedule.final", 0.2, "tuning", shared=True)]
    assert cells.recipe_with(place, more)[0].settings.schedule.final == 0.0
    more.append(cells.Leaf("schedule.name", "cosine", "tuning", shared=True))
    assert cells.recipe_with(place, more)[0].settings.schedule.final == 0.2


def test_a_grid_lists_the_networks_that_do_not_reach_a_rule_and_keeps_to_its_rules(workplace: Path) -> None:
    grid = "title: G\nnetworks: [{label: n, settings: {network: {name: mlp, width: 16}}}]\nsettings: {budget.epochs: 1}\n"
    made = plan(f"{grid}rules: [dfa, noprop-dt, {{rule: backprop, settings: {{network: vgg}}}}]\ntasks: [mnist]\n")
    assert unused(made) == {"dfa": [], "noprop-dt": ["network.name", "network.width"], "backprop": []}
    listed = plan(f"{grid}rules: [dfa, softhebb]\ntasks: [digits]\n")  # softhebb's own widths hold for the common network too
    assert unused(listed) == {"dfa": [], "softhebb": ["network.width"]}
    assert "network.width is used by no row" in refused(f"{grid}rules: [softhebb]\ntasks: [digits]\n")
    assert "names another rule" in refused(f"{grid}rules: [{{rule: dfa, settings: {{rule: backprop}}}}]\n")
    nested = plan(f"{grid}rules: [{{rule: dfa, settings: {{rule: {{scale: 2}}}}}}]\n").rows[0].recipe
    assert (nested.names["rule"], nested.options["rule"].scale) == ("dfa", 2.0)


def test_a_comparison_lists_what_a_rule_does_not_use_and_refuses_a_second_rule(workplace: Path) -> None:
    common = parse_words(["network.width=16", "rule.scale=0.5", "budget.epochs=1"])
    made = cells.plan(comparison(["dfa", "noprop-dt"], common, references=False))
    assert unused(made) == {"dfa": [], "noprop-dt": ["network.width", "rule.scale"]}
    for words, shared in ((["dfa,rule=backprop"], []), (["dfa,rule="], []), (["dfa,rule.name=backprop"], []), (["dfa"], ["rule=backprop"])):
        with pytest.raises(
            UsageError, match=r"two rules|rules are compared|name each rule as a word of its own|cannot be a common setting"
        ):
            comparison(words, parse_words(shared))
    with pytest.raises(UsageError, match=r"unknown key rule\.scal"):
        cells.plan(comparison(["dfa,rule.scal=1"], []))


def test_plan_report_and_record_say_so(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "table.yaml"
    Path(name).write_text(TWO.replace("settings: {budget", "settings: {tracking.enabled: false, network.depth: 1, budget"))
    said = "dfa: optimizer.momentum, schedule.final: not used by this rule."
    assert call("study", "run", name, "--dry-run", "--seeds", "1") == 0
    assert said in capsys.readouterr().out
    assert call("study", "run", name, "--quiet", "--seeds", "1") == 0
    output = capsys.readouterr().out
    assert said in Path(output.strip().splitlines()[-1]).with_suffix(".md").read_text()
    assert {outcome["row"]: outcome["tags"].get("unused") for outcome in outcomes()} == {
        "sgd": "rule.scale",
        "dfa": "optimizer.momentum, schedule.final",
    }
