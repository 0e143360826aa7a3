"""The plot of BurstCCN's hidden blocks: how loud the feedback is, what it does to bursts, and how silent it is at rest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bpfree.document import run_plots
from bpfree.document.axes import fitting, linear
from bpfree.document.charts import Series, in_order, natural, panel
from bpfree.document.content import Figure, Key
from bpfree.document.run_plots import line, write_figure

if TYPE_CHECKING:
    from bpfree import Run

__all__ = ["add_plot", "draw"]

PANELS = {
    "apical": "apical potential, root mean square",
    "burst_change": "change of burst rates, root mean square",
    "burst_rate": "burst rate, mean",
    "rest": "feedback at rest over that without Q",
}


def add_plot(run: Run) -> None:
    """Draw the history of a run that has these metrics, and add the plot to its artifacts; a failure is a warning."""
    if run.folder is None or not _names(run.history):
        return
    target = run.folder / "plots" / "bursts.svg"
    run_plots.add_plot(run, "the bursts", lambda: draw(run.history, target, f"{run.name}: bursts"))


def draw(history: Sequence[Mapping[str, float]], target: Path, title: str) -> Path:
    """Draw means over epochs of each hidden block: a panel for each metric, a line for each block."""
    names = _names(history)
    keys = in_order(names)
    x = linear([metrics["epoch"] for metrics in history], "epochs", bounds=(0, math.inf), whole=True)
    panels = []
    for metric, text in PANELS.items():
        drawn = [_series(key, name, metric, history) for key, name in zip(keys, names, strict=True)]
        values = [value for one in drawn for _, value in one.line]
        y = fitting(values, text) if metric in ("apical", "burst_change") else linear([0.0, *values], text, bounds=(0, math.inf))
        panels.append(panel(text, x, y, drawn))
    return write_figure(target, title, Figure(panels, "Hidden blocks of a bursting network, means over each epoch.", keys))


def _names(history: Sequence[Mapping[str, float]]) -> list[str]:
    """List the blocks that have these metrics, in order."""
    found = {key.split("/")[1] for metrics in history for key in metrics if key.startswith("rule/") and key.endswith("/burst_change")}
    return sorted(found, key=natural)


def _series(key: Key, name: str, metric: str, history: Sequence[Mapping[str, float]]) -> Series:
    """Make a block's line."""
    points = [(metrics["epoch"], metrics.get(f"rule/{name}/{metric}", math.nan)) for metrics in history]
    return line(key, points, lambda x, y: f"{name}, epoch {x:g}: {y:.3g}")
