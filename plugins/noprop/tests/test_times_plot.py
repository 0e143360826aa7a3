"""The plot of the times that continuous time learns at."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from bpfree_noprop import plugin, times_plot
from bpfree_noprop.ct import NoPropCT, NoPropCTConfig
from bpfree_noprop.timed import NETWORKS
from bpfree_noprop.times import BINS
from drawn import drawn, texts

from bpfree import Run
from bpfree.baselines import Frozen
from bpfree.network import mlp
from bpfree.tasks.task import TaskSpec

SPEC = TaskSpec("tiny", (3,), 4)


def rule_of(**options: Any) -> NoPropCT:
    builder = NETWORKS["noprop-timed-mlp"]
    return NoPropCT(builder.build(SPEC, builder.Config(width=4)), SPEC, NoPropCTConfig(**options))


def test_what_is_kept(tmp_path: Path) -> None:
    # Oracles: the schedule begins as a line from 5 to -4; densities have the mean 1; an epoch is replaced, not added.
    rule = rule_of()
    for epoch in (1, 2, 2):
        path = times_plot.keep(tmp_path, epoch, rule)
    content = json.loads(path.read_text())
    assert list(content["epochs"]) == ["1", "2"]
    found = content["epochs"]["2"]
    torch.testing.assert_close(torch.tensor(found["gamma"]), 5 - 9 * torch.tensor(content["t"]), rtol=0, atol=0.4)
    assert sum(found["density"]) / BINS == pytest.approx(1, rel=1e-4)
    assert found["error"] == [1.0] * BINS


@pytest.mark.parametrize(("times", "panels"), [("information", ["gamma", "mean squared", "density"]), ("uniform", ["gamma"])])
def test_what_is_drawn(times: Any, panels: list[str], tmp_path: Path) -> None:
    rule = rule_of(times=times)
    for epoch in (2, 9, 10):
        path = times_plot.keep(tmp_path, epoch, rule)
    text = times_plot.draw(path, "a title").read_text()
    assert texts(text, "item") == ["epoch 2", "epoch 10"]
    shown = drawn(text)
    assert len(shown) == len(panels)
    for one, begins in zip(shown, panels, strict=True):
        assert one.title.startswith(begins)
        assert all(len(line) == BINS for line in one.lines.values())


def test_the_plugins_hooks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # Oracles: other rules, and runs without a folder, get nothing; a file that cannot be read is a warning.
    for folder, rule in ((None, rule_of()), (tmp_path, Frozen(mlp(SPEC), SPEC))):
        run = Run("id", "name", folder=folder, epoch=1)
        plugin.epoch_end(run, rule)
        plugin.run_end(run)
        assert run.artifacts == {}
    run = Run("id", "a-run", folder=tmp_path, epoch=1)
    plugin.epoch_end(run, rule_of())
    plugin.run_end(run)
    assert run.artifacts.keys() == {"times.json", "plots/times.svg"}
    (tmp_path / "times.json").write_text("no JSON")
    with caplog.at_level(logging.WARNING, logger="bpfree"):
        plugin.run_end(run)
    assert "no plot of the times of a-run" in caplog.text
