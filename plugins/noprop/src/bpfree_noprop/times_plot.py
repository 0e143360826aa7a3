"""Which times continuous time learns at: the schedule, the error and the density of the draws, kept after epochs, and their plot."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bpfree.document.axes import linear, logarithmic
from bpfree.document.charts import Series, in_order, panel
from bpfree.document.content import Figure
from bpfree.document.svg import svg_file
from bpfree.files import write_text
from bpfree_noprop.ct import NoPropCT
from bpfree_noprop.times import BINS

if TYPE_CHECKING:
    from bpfree import Run

__all__ = ["FILE", "add_plot", "draw", "keep"]

logger = logging.getLogger("bpfree.noprop")

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
    path = folder / FILE
    t = (torch.arange(BINS) + 0.5) / BINS
    found = {"gamma": rule.noise(t.to(rule.embed.weight.device))[0].tolist()}
    if rule.chosen is not None:
        found |= {"error": rule.chosen.profile.tolist(), "density": (rule.chosen.masses(rule.noise) * BINS).tolist()}
    content: dict[str, Any] = {"t": t.tolist(), "epochs": {}}
    if path.exists():
        content["epochs"] = json.loads(path.read_text(encoding="utf-8"))["epochs"]
    content["epochs"][str(epoch)] = found
    write_text(path, json.dumps(content) + "\n")
    return path


def add_plot(run: Run, path: Path) -> None:
    """Draw ``times.json`` and add the plot to the run's artifacts; a failure is a warning."""
    try:
        run.artifacts.update({FILE: path, "plots/times.svg": draw(path, f"{run.name}: at which times it learns")})
    except Exception as error:
        logger.warning("no plot of the times of %s: %s: %s", run.name, type(error).__name__, error)


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
    target = path.parent / "plots" / "times.svg"
    target.parent.mkdir(exist_ok=True)
    write_text(target, svg_file(title, Figure(panels, "Noise schedule, error and density of the drawn times against t.", keys)))
    return target
