"""Which times continuous time learns at: the schedule, the error and the density of the draws, kept after epochs, and their plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bpfree.document import run_plots
from bpfree.document.axes import linear, logarithmic
from bpfree.document.charts import Series, in_order, panel
from bpfree.document.content import Figure
from bpfree.document.run_plots import keep_epoch, write_figure
from bpfree_noprop.ct import NoPropCT
from bpfree_noprop.times import BINS

if TYPE_CHECKING:
    from bpfree import Run

__all__ = ["FILE", "add_plot", "draw", "keep"]

FILE = "times.json"
LABELS = {
    "gamma": "gamma, the log of noise over signal",
    "error": "mean squared error of the estimate (logarithmic)",
    "density": "density of the times that are drawn (logarithmic)",
}


@torch.no_grad()
def keep(folder: Path, epoch: int, rule: NoPropCT) -> Path:
    """Add an epoch's values at the centres of the bins to ``times.json`` in the run's folder; replaces those of the same epoch.

    Error and density are there only where times are not uniform.
    """
    t = (torch.arange(BINS) + 0.5) / BINS
    found = {"gamma": rule.noise(t.to(rule.embed.weight.device))[0].tolist()}
    if rule.chosen is not None:
        found |= {"error": rule.chosen.profile.tolist(), "density": (rule.chosen.masses(rule.noise) * BINS).tolist()}
    return keep_epoch(folder / FILE, epoch, {"epochs": found}, {"t": t.tolist()})


def add_plot(run: Run, path: Path) -> None:
    """Draw ``times.json`` and add the plot to the run's artifacts; a failure is a warning."""
    run_plots.add_plot(run, "the times", lambda: draw(path, f"{run.name}: at which times it learns"), path)


def draw(path: Path, title: str) -> Path:
    """Draw ``times.json``: each quantity against t, after the first and the last epoch."""
    content = json.loads(path.read_text(encoding="utf-8"))
    t, epochs = content["t"], content["epochs"]
    numbers = sorted(epochs, key=int)
    shown = list(dict.fromkeys([numbers[0], numbers[-1]]))
    keys = in_order([f"epoch {number}" for number in shown])
    x = linear(t, "t", bounds=(0, 1))
    panels = []
    for name in epochs[shown[-1]]:
        drawn = [
            Series(key, [(at, value) for at, value in zip(t, epochs[number][name], strict=True) if name == "gamma" or value > 0])
            for key, number in zip(keys, shown, strict=True)
            if name in epochs[number]
        ]
        values = [value for one in drawn for _, value in one.line]
        y = linear(values, LABELS[name]) if name == "gamma" else logarithmic(values, LABELS[name])
        panels.append(panel(LABELS[name], x, y, drawn))
    figure = Figure(panels, "Noise schedule, error and density of the drawn times against t.", keys)
    return write_figure(path.parent / "plots" / "times.svg", title, figure)
