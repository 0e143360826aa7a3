"""Plots exist, are valid files, and show the numbers they should (read from the figures themselves)."""

from __future__ import annotations

import math
import struct
import xml.etree.ElementTree as ElementTree

import pytest

from bpfree.tracking import plots
from bpfree.tracking.plots import Plots


def history(epochs, blocks=0):
    rows = []
    for e in range(1, epochs + 1):
        row = {
            "epoch": float(e),
            "train/loss": 2 / e,
            "val/loss": 3 / e,
            "train/accuracy": 1 - 0.5 / e,
            "val/accuracy": 1 - 0.6 / e,
            "rule/loss": 1.0,
        }
        for t in range(1, blocks + 1):
            row |= {f"rule/t{t}/loss": t / e, f"val/t{t}/accuracy": t / (blocks + 1)}
        rows.append(row)
    return rows


def test_files(new_run):
    """SVG parses as XML, PNG has its signature and a size; the run knows them."""
    run = new_run(history=history(5, blocks=3), epoch=5, result={"test/accuracy": 0.8}, status="finished")
    Plots().run_end(run)
    assert set(run.artifacts) == {f"plots/{name}.{kind}" for name in ("curves", "blocks") for kind in ("svg", "png")}
    for name, path in run.artifacts.items():
        assert path == run.folder / name
        content = path.read_bytes()
        if path.suffix == ".svg":
            assert ElementTree.fromstring(content).tag.endswith("svg")
            assert b"training" in content or b"t3" in content
        else:
            assert content[:8] == b"\x89PNG\r\n\x1a\n"
            width, height = struct.unpack(">II", content[16:24])
            assert width > 600
            assert height > 300


def test_curves_show_the_history(new_run):
    """The lines' data are the history's, accuracies in percent; an epoch without evaluation has no point."""
    rows = history(4)
    del rows[1]["val/accuracy"]
    rows[2]["val/accuracy"] = math.nan
    figure = plots._curves(new_run(history=rows, epoch=4, result={"test/accuracy": 0.5}))
    loss, accuracy = figure.axes
    shown = {line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in accuracy.lines}
    assert shown["validation"] == [(1.0, pytest.approx(40.0)), (4.0, pytest.approx(85.0))]
    assert shown["test 50.00 %"] == [(4, 50.0)]
    assert [line.get_label() for line in loss.lines] == ["training", "validation"]
    assert (loss.get_xlabel(), loss.get_ylabel(), accuracy.get_ylabel()) == ("epoch", "loss", "accuracy (%)")


def test_blocks_in_natural_order(new_run):
    """t2 comes before t10."""
    figure = plots._blocks(new_run(history=history(2, blocks=10)))
    assert [line.get_label() for line in figure.axes[0].lines] == [f"t{i}" for i in range(1, 11)]


@pytest.mark.parametrize("rows", [[], [{"epoch": 1.0}], [{"epoch": 1.0, "train/loss": math.nan}]])
def test_nothing_to_draw(new_run, rows):
    """No file, no error."""
    run = new_run(history=rows)
    Plots().run_end(run)
    assert run.artifacts == {}


def test_a_failure_is_a_warning(new_run, caplog):
    """A file stands where the folder should be."""
    run = new_run(history=history(2))
    (run.folder / "plots").write_text("")
    Plots().run_end(run)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
