"""Grids of rules, networks and tasks. Oracle: the table written out by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from study_kit import plugin_on_path

from bpfree import UsageError
from bpfree.plugins import installed_plugins
from bpfree.study import cells
from bpfree.study.file import read_study
from bpfree.study.model import Choices, Range, Study


def read(text: str) -> Study:
    path = Path("grid.yaml")
    path.write_text(text)
    return read_study(path)


def problems(text: str) -> str:
    with pytest.raises(UsageError) as caught:
        read(text)
    return "\n".join(caught.value.problems)


def table(study: Study) -> list[tuple[str, list[str], dict[str, Any]]]:
    return [(row.label, list(row.columns), dict(row.settings)) for row in study.rows]


GRID = """
title: Grid
rules:
  - linear
  - dfa
  - {rule: noprop-dt, label: noprop, settings: {rule.T: 5}}
  - {rule: backprop, settings: {optimizer.lr: 0.01}, published: {digits: {test/error: 2}}}
networks:
  - {label: small, settings: {network: mlp, network.width: 16}}
  - {label: deep, settings: {network: mlp, network.depth: 4}}
tasks: [digits, {label: letters, settings: {task: npz, task.path: letters.npz}, target: 80}]
exclude:
  - {rule: dfa, network: deep}
  - {rule: [noprop], task: letters}
target: 90
"""


def test_rules_times_networks_are_rows_and_tasks_are_columns(workplace: Path) -> None:
    study = read(GRID)
    both = ["digits", "letters"]
    small, deep = {"network": "mlp", "network.width": 16}, {"network": "mlp", "network.depth": 4}
    assert table(study) == [
        ("linear", both, {"rule": "linear"}),  # it has its own network, and so has NoProp
        ("dfa (small)", both, {**small, "rule": "dfa"}),
        ("noprop", ["digits"], {"rule": "noprop-dt", "rule.T": 5}),
        ("backprop (small)", both, {**small, "rule": "backprop", "optimizer.lr": 0.01}),
        ("backprop (deep)", both, {**deep, "rule": "backprop", "optimizer.lr": 0.01}),
    ]
    assert [(column.label, dict(column.settings)) for column in study.columns] == [
        ("digits", {"task": "digits"}),
        ("letters", {"task": "npz", "task.path": "letters.npz"}),
    ]
    assert study.targets == {"digits": 90, "letters": 80}
    assert study.rows[-1].published["digits"]["test/error"].mean == 2


def test_one_network_needs_no_name_and_a_rule_may_have_another(workplace: Path) -> None:
    study = read(
        "title: One\nnetworks: [{label: small, settings: {network.width: 16}}]\n"
        "rules: [dfa, {rule: backprop, settings: {network: vgg}}]\ntasks: [mnist]\n"
    )
    assert table(study) == [
        ("dfa", ["mnist"], {"network.width": 16, "rule": "dfa"}),
        ("backprop", ["mnist"], {"rule": "backprop", "network": "vgg"}),
    ]


def test_without_tasks_there_is_one_column(workplace: Path) -> None:
    study = read("title: None\nrules: [dfa, backprop]\nexclude: [{rule: backprop}]\n")
    assert table(study) == [("dfa", [""], {"rule": "dfa"})]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rules: [dffa]", "unknown rule 'dffa': did you mean 'dfa'?"),
        ("rules: [{rule: dfa, setings: {}}]", "unknown key 'setings': did you mean 'settings'?"),
        ("rules: [{label: x}]", "one of rule, program, preset and presets"),
        ("rules: [dfa]\nrows: []", "remove rows or the grid"),
        ("rules: [dfa]\nexclude: [{rule: dffa}]", "unknown rule 'dffa': did you mean 'dfa'?"),
        ("rules: [dfa]\nexclude: [{colour: red}]", "exclude: must be mappings"),
        ("rules: [{preset: nothing}]", "unknown preset 'nothing'"),
        ("rules: dfa", "rules: must be a list"),
        ("networks: [{label: a}]", "a grid needs rules"),
        ("rules: [dfa, dfa]", "'dfa' is given twice"),
        ("rules: [dfa]\njobs: 0", "jobs: must be a whole number above 0"),
        ("rules: [dfa]\ntimeout: soon", "timeout: must be a number above 0"),
        ("rules: [dfa]\ntarget: high", "target: must be a number, not 'high'"),
        ("rules: [dfa]\ntune: {space: {optimizer.lr: [1, 2]}}", "tune: trials: must be the number of trials"),
        ("rules: [dfa]\ntune: {trials: 4, space: {optimizer.lr: {low: 1, high: 0.1}}}", "low must be less than high"),
        ("rules: [dfa]\ntune: {trials: 4, space: {optimizer.lr: {low: 0, high: 1, log: true}}}", "positive on a logarithmic scale"),
        ("rules: [dfa]\ntune: {trials: 4, search: grid, space: {a.b: [1, 2]}}", "unknown search 'grid'"),
        ("rules: [dfa]\ntune: {trials: 4, seeds: [1], space: {a.b: [1, 2]}}", "1 are seeds of the study"),
        ("rules: [dfa]\ntune: {trials: 4}", "names no setting to tune"),
        ("rules: [{rule: dfa, tune: {optimizer.lr: [1, 2]}}]", "the study has no tune with trials"),
    ],
)
def test_what_is_wrong_is_said(workplace: Path, text: str, said: str) -> None:
    assert said in problems(f"title: Wrong\n{text}\n")


def test_a_row_changes_what_is_tuned(workplace: Path) -> None:
    study = read(
        "title: Tuned\nrules:\n  - dfa\n  - {rule: backprop, tune: false}\n"
        "  - {rule: frozen, tune: {optimizer.lr: null, batch_size: [16, 32]}}\n"
        "tune: {trials: 4, seeds: 2, space: {optimizer.lr: {low: 1e-4, high: 0.1, log: true}}}\n"
    )
    rate = Range(1e-4, 0.1, log=True)
    assert [dict(row.space) for row in study.rows] == [{"optimizer.lr": rate}, {}, {"batch_size": Choices([16, 32])}]
    assert study.tune is not None
    assert (study.tune.trials, study.tune.search, list(study.tune.seeds)) == (4, "quasi-random", [1000, 1001])


# --- presets ----------------------------------------------------------------------------------------------------------


PRESETS = """
import bpfree

bpfree_api = 2


@bpfree.hookimpl
def bpfree_presets():
    return {"quickstart/dfa": {"rule": "dfa", "rule.scale": 0.5}, "preset/wide": {"rule": "dfa", "network.width": 512}}
"""


@pytest.fixture
def site(workplace: Path) -> Iterator[Path]:
    """A plugin that ships two presets."""
    with plugin_on_path(workplace / "site", "preset", PRESETS):
        yield workplace


def test_presets_of_plugins(site: Path) -> None:
    study = read(
        "title: Presets\nrules:\n  - {preset: preset/wide, label: wide, settings: {rule.scale: 2}}\n  - {presets: 'quickstart/d*'}\n"
        "networks: [{label: a, settings: {network.width: 16}}]\n"
    )
    assert table(study) == [
        ("wide", [""], {"rule": "dfa", "network.width": 512, "rule.scale": 2}),  # its own width stays
        ("dfa", [""], {"network.width": 16, "rule": "dfa", "rule.scale": 0.5}),
    ]


def test_several_presets_of_one_rule_go_by_their_own_names(workplace: Path) -> None:
    """Those of different rules by their rule's."""
    code = PRESETS.replace('"quickstart/dfa"', '"pair/half"').replace('"preset/wide"', '"pair/wide"')
    code = code.replace("512}}", '512}, "pair/alone": {"rule": "backprop"}}')
    with plugin_on_path(workplace / "site", "preset", code):
        study = read("title: Presets\nrules: [{presets: 'pair/*'}]\n")
        assert [(row.label, row.settings["rule"]) for row in study.rows] == [("backprop", "backprop"), ("half", "dfa"), ("wide", "dfa")]
        single = read("title: Presets\nrules: [{presets: 'pair/w*'}, {preset: pair/half}]\n")
        assert [row.label for row in single.rows] == ["dfa", "pair/half"]


def test_the_quickstart_has_a_row_for_each_installed_plugin_beside_floor_and_ceiling(site: Path) -> None:
    from bpfree.study.file import find_study

    labels = [row.label for row in find_study("quickstart").rows]
    assert labels[:2] == ["linear", "frozen"]
    assert labels[-1] == "backprop"
    marked = [name.removeprefix("quickstart/") for name in installed_plugins().names("presets") if name.startswith("quickstart/")]
    assert labels[2:-1] == marked
    assert "dfa" in marked
    owners = [installed_plugins().owner("presets", f"quickstart/{name}").name for name in marked]
    assert len(set(owners)) == len(owners)  # one each


# --- seeds by axis ----------------------------------------------------------------------------------------------------


def test_rules_of_a_repetition_share_the_order_of_the_data_and_not_their_initialisation(workplace: Path) -> None:
    """Oracle: the first batches of the runs, and their first weights."""
    import torch

    from bpfree.tasks.loading import Loader

    study = read("title: Seeds\nrules: [dfa, backprop]\ntasks: [digits]\nseeds: 2\n")
    plan = cells.plan(study)
    found: dict[tuple[str, int], Any] = {}
    for cell in plan.cells:
        recipe = cell.recipe
        task = recipe.build_task()
        loader = Loader(task.train, task.spec, batch_size=8, device=torch.device("cpu"), seed=recipe.settings.seed)
        batch = next(iter(loader.batches(0, 0)))
        found[cell.key.row, cell.key.seed] = (batch.inputs, next(recipe.build_rule(task.spec).parameters()).detach())
    assert torch.equal(found["dfa", 0][0], found["backprop", 0][0])
    assert not torch.equal(found["dfa", 0][0], found["dfa", 1][0])
    assert not torch.equal(found["dfa", 0][1], found["backprop", 0][1])
    assert "stream=dfa" in plan.cells[0].words
    shared = cells.plan(read("title: Shared\nrules: [dfa, backprop]\nsettings: {stream: both}\nseeds: 1\n"))
    first, second = (next(cell.recipe.build_rule(cell.recipe.spec()).parameters()) for cell in shared.cells)
    assert torch.equal(first, second)
