"""How far feedback weights agree with the forward weights: angle and ratio of norms of each layer, after each epoch, and their plot.

Both are needed. A feedback that has the direction of the forward weights but not their size sends credit that grows or shrinks with
depth, and a mirror that grows without bound has an angle of almost zero when it diverges.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from bpfree.document import run_plots
from bpfree.document.axes import fitting, linear
from bpfree.document.charts import Series, in_order, panel
from bpfree.document.content import Figure, Key
from bpfree.document.run_plots import keep_epoch, line, write_figure

if TYPE_CHECKING:
    from bpfree import Run

__all__ = ["HasFeedback", "add_plot", "draw", "keep", "measure", "metrics"]


@runtime_checkable
class HasFeedback(Protocol):
    """A rule with feedback weights that have the shape of forward weights, so that the two can be compared."""

    def feedback_pairs(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Return forward and feedback weights of each layer, of one shape, by a name for readers."""


@torch.no_grad()
def compare(weight: Tensor, feedback: Tensor) -> tuple[Tensor, Tensor]:
    """Return the angle in degrees between two tensors as vectors, and the second one's norm over the first one's.

    The angle is 90 where one of them is zero. It is computed as atan2(|a - b|, |a + b|) of unit vectors, which, unlike the arc cosine,
    resolves small angles.
    """
    a, b = (value.detach().flatten().to(torch.promote_types(value.dtype, torch.float32)) for value in (weight, feedback))
    tiny = torch.finfo(a.dtype).tiny
    length, other = a.norm(), b.norm()
    a, b = a / length.clamp_min(tiny), b / other.clamp_min(tiny)
    return 2 * torch.rad2deg(torch.atan2((a - b).norm(), (a + b).norm())), other / length.clamp_min(tiny)


def metrics(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return ``LAYER/feedback_angle`` (degrees) and ``LAYER/feedback_ratio`` (norm of feedback over norm of weights), on the device."""
    found: dict[str, Tensor] = {}
    for name, (weight, feedback) in pairs.items():
        found[f"{name}/feedback_angle"], found[f"{name}/feedback_ratio"] = compare(weight, feedback)
    return found


def measure(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[float, float]]:
    """Return angle (degrees) and ratio of norms of each layer as numbers; waits for the device."""
    return {name: (float(angle), float(ratio)) for name, (angle, ratio) in ((name, compare(*pair)) for name, pair in pairs.items())}


def keep(folder: Path, epoch: int, found: Mapping[str, tuple[float, float]]) -> Path:
    """Add an epoch's angles and ratios to ``feedback.json`` in the run's folder; replaces those of the same epoch (of a resumed run)."""
    values = {kind: {name: pair[index] for name, pair in found.items()} for index, kind in enumerate(("angle", "ratio"))}
    return keep_epoch(folder / "feedback.json", epoch, values)


def add_plot(run: Run, path: Path) -> None:
    """Draw ``feedback.json`` and add the plot to the run's artifacts; a failure is a warning."""
    run_plots.add_plot(run, "the feedback weights", lambda: draw(path, f"{run.name}: feedback and forward weights"), path)


def draw(path: Path, title: str) -> Path:
    """Draw ``feedback.json``: angle and ratio of norms against epochs, a line for each layer."""
    content = json.loads(path.read_text(encoding="utf-8"))
    epochs = sorted(content["angle"], key=int)
    names = list(content["angle"][epochs[-1]])
    keys = in_order(names)
    x = linear([int(epoch) for epoch in epochs], "epochs", bounds=(0, math.inf), whole=True)
    panels = []
    for kind, text in (("angle", "angle to the forward weights, degrees"), ("ratio", "norm over that of the forward weights")):
        drawn = [_series(key, name, epochs, content[kind]) for key, name in zip(keys, names, strict=True)]
        values = [value for one in drawn for _, value in one.line]
        y = linear(values, text, bounds=(0, 180)) if kind == "angle" else fitting(values, text)
        panels.append(panel(text, x, y, drawn))
    figure = Figure(panels, "Feedback weights of each layer beside its forward weights, after each epoch.", keys)
    return write_figure(path.parent / "plots" / "feedback.svg", title, figure)


def _series(key: Key, name: str, epochs: Sequence[str], values: Mapping[str, Mapping[str, float]]) -> Series:
    """Make a layer's line."""
    points = [(int(epoch), values[epoch][name]) for epoch in epochs if name in values[epoch]]
    return line(key, points, lambda x, y: f"{name}, epoch {x}: {y:.3g}")
