"""``bpfree study status`` from kept cells. Oracle: the same command where nothing is kept, which plans the study."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from study_kit import call, forget_plugins, plugin_on_path

from bpfree.study import cells

PLUGIN = """
import bpfree
from bpfree.baselines import DFA

bpfree_api = 2


class Mine(DFA):
    scale = 1.0


@bpfree.hookimpl
def bpfree_rules():
    return {"mine": Mine}
"""
STUDY = """
title: Kept
settings: {task: npz, task.path: data.npz, network.width: 4, device: cpu, budget.epochs: 1}
seeds: 2
floor: false
probe: false
rows: [{label: one, settings: {rule: mine}}, {label: two, settings: {rule: backprop}}]
"""


def data(seed: int) -> None:
    draws = np.random.default_rng(seed)
    np.savez("data.npz", x=draws.normal(size=(20, 3)), y=draws.integers(0, 2, 20))


def ids(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """The cells that are shown: twice with what is kept, once without, and the same."""
    said = []
    for kept in (True, True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not kept:
                patch.setattr("bpfree.kept.kept", lambda name, make, **options: make()[0])
            assert call("study", "status", "kept.yaml", *words) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2]
    return [line.split()[-1] for line in said[0].splitlines() if line.startswith(("one ", "two "))]


def test_kept_cells_are_those_of_a_new_plan(workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("kept.yaml").write_text(STUDY)
    data(0)
    Path("runs/studies/kept/cells").mkdir(parents=True)
    with plugin_on_path(workplace / "site", "mine", PLUGIN):
        first = ids(capsys)
        assert len(set(first)) == 4
        record = {"cell": first[0], "row": "one", "column": "", "seed": 0, "status": "failed", "reason": "by hand"}
        Path("runs/studies/kept/cells", f"{first[0]}.json").write_text(json.dumps(record))
        assert ids(capsys) == first
        with monkeypatch.context() as patch:
            patch.delattr(cells, "plan")
            call("study", "status", "kept.yaml")
            assert "failed: by hand" in capsys.readouterr().out
        assert set(first) < set(ids(capsys, "--seeds", "3"))
        assert not {*ids(capsys, "batch_size=5")} & {*first}
        monkeypatch.setenv("KEPT_STREAM", "a")
        other = ids(capsys, "stream=${oc.env:KEPT_STREAM}")
        monkeypatch.setenv("KEPT_STREAM", "b")
        assert not {*ids(capsys, "stream=${oc.env:KEPT_STREAM}")} & {*other}
        Path("kept.yaml").write_text(STUDY.replace("seeds: 2", "seeds: 3"))
        assert set(first) < set(ids(capsys))
        Path("kept.yaml").write_text(STUDY)
        data(1)
        assert not {*(later := ids(capsys))} & {*first}
        (workplace / "site" / "mine" / "__init__.py").write_text(PLUGIN.replace("1.0", "0.25"))
        sys.modules.pop("mine")
        forget_plugins()
        edited = ids(capsys)
        assert [a == b for a, b in zip(edited, later, strict=True)] == [False, True, False, True]
