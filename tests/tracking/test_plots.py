"""Plots are valid files that show the run's numbers. Oracle: the history, against what is read back by the ticks (``drawn``)."""

from __future__ import annotations

import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from drawn import drawn, texts

from bpfree.document.svg import svg_file
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


def close(points, rel=0.01):
    """To a hundredth: places are written to a tenth of a pixel."""
    return [(pytest.approx(x, rel=rel, abs=0.02), pytest.approx(y, rel=rel)) for x, y in points]


def test_files(new_run):
    """They are XML, need nothing outside of themselves, and the run knows them."""
    run = new_run(history=history(5, blocks=3), epoch=5, result={"test/accuracy": 0.8}, status="finished")
    Plots().run_end(run)
    assert set(run.artifacts) == {"plots/curves.svg", "plots/blocks.svg"}
    for name, path in run.artifacts.items():
        assert path == run.folder / name
        text = path.read_text()
        assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
        assert texts(text, "title") == [run.name]
        assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
        assert "var(" not in text
        assert "url(" not in text


def test_curves_show_the_history(new_run):
    """Accuracies are in per cent; an epoch without evaluation has no point."""
    rows = history(4)
    del rows[1]["val/accuracy"]
    rows[2]["val/accuracy"] = math.nan
    run = new_run(history=rows, epoch=4, result={"test/accuracy": 0.5}, status="stopped")
    Plots().run_end(run)
    text = run.artifacts["plots/curves.svg"].read_text()
    assert texts(text, "title") == [f"{run.name} (stopped)"]
    assert texts(text, "item") == ["training", "validation", "test 50.00 %"]
    loss, accuracy = drawn(text)
    assert (loss.title, loss.x_label, accuracy.title) == ("loss", "epoch", "accuracy, %")
    assert list(loss.lines) == ["training", "validation"]
    assert loss.lines["training"] == close((e, 2 / e) for e in range(1, 5))
    assert loss.lines["validation"] == close((e, 3 / e) for e in range(1, 5))
    assert accuracy.lines["validation"] == close([(1, 40), (4, 85)])
    assert accuracy.lines["training"] == close((e, 100 - 50 / e) for e in range(1, 5))
    assert accuracy.markers["test 50.00 %, epoch 4: 50"] == close([(4, 50)], rel=0.02)[0]
    assert loss.x_ticks == ["1", "2", "3", "4"]


def test_losses_over_decades_are_logarithmic(new_run):
    rows = [{"epoch": float(e), "train/loss": 10.0**-e} for e in range(1, 31)]
    (panel,) = drawn(svg_file("", plots.curves(new_run(history=rows))))
    assert panel.title == "loss (logarithmic)"
    assert panel.lines["training"] == [(pytest.approx(e, abs=0.05), pytest.approx(10.0**-e, rel=0.1)) for e in range(1, 31)]
    assert panel.markers == {}  # of 20 points at most


def test_one_epoch_is_a_marker(new_run):
    loss, accuracy = drawn(svg_file("", plots.curves(new_run(history=history(1)))))
    assert loss.lines == {}
    assert set(loss.markers) == {"training, epoch 1: 2", "validation, epoch 1: 3"}
    assert accuracy.x_ticks == ["1"]


def test_a_rule_without_the_tasks_loss_shows_its_own(new_run):
    (panel,) = drawn(svg_file("", plots.curves(new_run(history=[{"epoch": float(e), "rule/loss": 1 / e} for e in (1, 2, 3)]))))
    assert panel.lines["the rule's loss"] == close((e, 1 / e) for e in (1, 2, 3))


def test_blocks_in_natural_order(new_run):
    """t2 comes before t10, from orange to blue; what has no number has dashes."""
    rows = [row | {"val/mean/accuracy": 0.5} for row in history(2, blocks=10)]
    text = svg_file("", plots.blocks(new_run(history=rows)))
    loss, accuracy = drawn(text)
    names = [f"t{i}" for i in range(1, 11)]
    assert list(loss.lines) == names
    assert loss.lines["t7"] == close([(1, 7), (2, 3.5)])
    assert accuracy.lines["t7"] == close([(1, 700 / 11), (2, 700 / 11)])
    assert len(set(loss.looks.values())) == 10
    assert (loss.looks["t1"], loss.looks["t10"]) == (("c0 d0", "color:#e69f00"), ("c0 d0", "color:#0072b2"))
    assert accuracy.looks["t3"] == loss.looks["t3"]
    assert accuracy.looks["mean"] == ("c1 d1", "")
    assert texts(text, "item") == [*names, "mean"]


def test_many_blocks_have_a_band_of_colours(new_run):
    text = svg_file("", plots.blocks(new_run(history=history(2, blocks=20))))
    assert texts(text, "item") == ["t1", "t20"]
    assert "<title>t13</title></rect>" in text


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


def test_drawing_imports_no_library():
    """Neither a drawing library nor torch is needed for charts, pages and tables."""
    modules = ["axes", "charts", "content", "markdown", "page", "strips", "style", "svg", "tables"]
    code = f"import sys; import {', '.join(f'bpfree.document.{name}' for name in modules)}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"matplotlib", "numpy", "torch", "PIL"} & set(loaded)
