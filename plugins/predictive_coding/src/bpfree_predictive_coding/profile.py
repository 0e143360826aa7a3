"""Where the energy is while states relax: a table by block and inference step, and the plot of it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bpfree.document import run_plots
from bpfree.document.axes import linear, logarithmic
from bpfree.document.charts import Series, in_order, panel
from bpfree.document.content import Figure, Key
from bpfree.document.run_plots import keep_epoch, line, write_figure
from bpfree_predictive_coding.relaxation import Relaxation

if TYPE_CHECKING:
    from bpfree import Run

__all__ = ["Profile", "add_plot", "draw", "keep"]


class Profile(nn.Module):
    """Energies of each block (columns, first to last) before and after each inference step (rows): means over sampled batches.

    A module, so that measurements on the side of a run put it back with the rest of the rule.

    Args:
        names: of the blocks.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self._names = list(names)
        self._sum: Tensor | None = None
        self._count = 0
        self._rows: list[list[Tensor]] = []
        self._lengths: list[Tensor] = []

    def note(self, relaxation: Relaxation) -> None:
        """Record the energies; called before the first inference step, and after each."""
        self._rows.append(relaxation.energies())
        if len(self._rows) == 1:
            self._lengths = [_length(relaxation)]

    def end(self, relaxation: Relaxation) -> dict[str, Tensor]:
        """Return metrics of this batch: ``BLOCK/energy`` after the last step, and ``equilibrium_distance``.

        The latter is the norm of the energy's gradient by all relaxed variables over that before the first step: 0 at equilibrium.
        """
        table = torch.stack([torch.stack([value.float() for value in row]) for row in self._rows])
        self._sum = table if self._sum is None or self._sum.shape != table.shape else self._sum + table
        self._count += 1
        self._rows = []
        left = _length(relaxation) / self._lengths[0].clamp_min(torch.finfo(torch.float32).tiny)
        return {f"{name}/energy": value for name, value in zip(self._names, table[-1], strict=True)} | {"equilibrium_distance": left}

    def take(self) -> list[list[float]] | None:
        """Return the table (steps + 1, blocks) of batches sampled since the last call; ``None`` if there were none."""
        if self._sum is None:
            return None
        table: list[list[float]] = (self._sum / self._count).tolist()
        self._sum, self._count = None, 0
        return table


def _length(relaxation: Relaxation) -> Tensor:
    """Return the Euclidean norm of the energy's gradient by all relaxed variables."""
    gradients = list(relaxation.gradients().values())
    if not gradients:
        return relaxation.scores.new_zeros(())
    return torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt().float()


def keep(folder: Path, epoch: int, names: Sequence[str], table: list[list[float]]) -> Path:
    """Add an epoch's table to ``relaxation.json`` in the run's folder; replaces one of the same epoch (of a resumed run)."""
    return keep_epoch(folder / "relaxation.json", epoch, {"energy": table}, {"blocks": list(names)})


def add_plot(run: Run, path: Path) -> None:
    """Draw ``relaxation.json`` and add the plot to the run's artifacts; a failure is a warning."""
    run_plots.add_plot(run, "the relaxation", lambda: draw(path, f"{run.name}: where the energy is"), path)


def draw(path: Path, title: str) -> Path:
    """Draw the imbalance plot of ``relaxation.json``: block energies against inference steps, in the first and last sampled epoch."""
    content = json.loads(path.read_text(encoding="utf-8"))
    names, energy = content["blocks"], content["energy"]
    epochs = sorted(energy, key=int)
    keys = in_order(names)
    shown = dict.fromkeys([epochs[0], epochs[-1]])
    drawn = {epoch: [_series(key, column) for key, column in zip(keys, zip(*energy[epoch], strict=True), strict=True)] for epoch in shown}
    points = [point for found in drawn.values() for one in found for point in one.line]
    x = linear([step for step, _ in points], "inference steps", bounds=(0, math.inf), whole=True)
    y = logarithmic([value for _, value in points], "energy per example (logarithmic)")
    panels = [panel(f"epoch {epoch}: energy per example (logarithmic)", x, y, found) for epoch, found in drawn.items()]
    figure = Figure(panels, "Energy of each block against inference steps.", keys)
    return write_figure(path.parent / "plots" / "relaxation.svg", title, figure)


def _series(key: Key, energies: Sequence[float]) -> Series:
    """Make a line of a block's energies, without the steps at which no error has reached the block yet."""
    points = [(step, value) for step, value in enumerate(energies) if value > 0]
    return line(key, points, lambda x, y: f"{key.label}, step {x}: {y:.3g}")
