"""Where the energy is while states relax: a table by block and inference step, and the plot of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bpfree.files import write_text
from bpfree_predictive_coding.relaxation import Relaxation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bpfree import Run

__all__ = ["Profile", "add_plot", "draw", "keep"]

logger = logging.getLogger("bpfree.predictive_coding")


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
        """Before the first inference step, and after each."""
        self._rows.append(relaxation.energies())
        if len(self._rows) == 1:
            self._lengths = [_length(relaxation)]

    def end(self, relaxation: Relaxation) -> dict[str, Tensor]:
        """Metrics of this batch: ``BLOCK/energy`` after the last step, and ``equilibrium_distance``.

        The latter is the norm of the energy's gradient by all relaxed variables over that before the first step: 0 at equilibrium.
        """
        table = torch.stack([torch.stack([value.float() for value in row]) for row in self._rows])
        self._sum = table if self._sum is None or self._sum.shape != table.shape else self._sum + table
        self._count += 1
        self._rows = []
        left = _length(relaxation) / self._lengths[0].clamp_min(torch.finfo(torch.float32).tiny)
        return {f"{name}/energy": value for name, value in zip(self._names, table[-1], strict=True)} | {"equilibrium_distance": left}

    def take(self) -> list[list[float]] | None:
        """The table (steps + 1, blocks) since it was last taken; ``None``: nothing was sampled."""
        if self._sum is None:
            return None
        table: list[list[float]] = (self._sum / self._count).tolist()
        self._sum, self._count = None, 0
        return table


def _length(relaxation: Relaxation) -> Tensor:
    """Euclidean norm of the energy's gradient by all relaxed variables."""
    gradients = list(relaxation.gradients().values())
    if not gradients:
        return relaxation.scores.new_zeros(())
    return torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt().float()


def keep(folder: Path, epoch: int, names: Sequence[str], table: list[list[float]]) -> Path:
    """Add an epoch's table to ``relaxation.json`` in the run's folder; an epoch that is there (of a resumed run) is replaced."""
    path = folder / "relaxation.json"
    content: dict[str, Any] = {"blocks": list(names), "energy": {}}
    if path.exists():
        content["energy"] = json.loads(path.read_text(encoding="utf-8"))["energy"]
    content["energy"][str(epoch)] = table
    write_text(path, json.dumps(content) + "\n")
    return path


def add_plot(run: Run, path: Path) -> None:
    """Draw ``relaxation.json`` and add the plots to the run's artifacts; a failure is a warning."""
    try:
        run.artifacts.update({"relaxation.json": path, **draw(path, f"{run.name}: where the energy is")})
    except Exception as error:
        logger.warning("no plot of the relaxation of %s: %s: %s", run.name, type(error).__name__, error)


def draw(path: Path, title: str) -> dict[str, Path]:
    """The imbalance plot of ``relaxation.json``: energy of each block against inference steps, in the first and last epoch sampled.

    Returns:
        Artifacts: name within the run to path.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    content = json.loads(path.read_text(encoding="utf-8"))
    epochs = sorted(content["energy"], key=int)
    chosen = list(dict.fromkeys([epochs[0], epochs[-1]]))
    figure = Figure(figsize=(5.4 * len(chosen) + 0.8, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(chosen), squeeze=False, sharey=True)[0]
    figure.suptitle(title, fontsize=11)
    for axis, epoch in zip(axes, chosen, strict=True):
        _panel(axis, content["blocks"], content["energy"][epoch], f"epoch {epoch}")
    axes[0].set_ylabel("energy per example")
    _explain(figure, axes[-1], content["blocks"])
    folder = path.parent / "plots"
    folder.mkdir(exist_ok=True)
    paths = {f"plots/relaxation.{kind}": folder / f"relaxation.{kind}" for kind in ("svg", "png")}
    for target in paths.values():
        figure.savefig(target, dpi=120, metadata={"Date": None} if target.suffix == ".svg" else None)
    return paths


def _panel(axis: Any, names: Sequence[str], table: list[list[float]], title: str) -> None:
    from matplotlib import colormaps

    shades = colormaps["viridis"]
    last = len(names) - 1
    for index, name in enumerate(names):
        points = [(step, row[index]) for step, row in enumerate(table) if row[index] > 0]  # an error has not reached the block before
        if points:
            style = {"color": "#D55E00", "linestyle": "--"} if index == last else {"color": shades(0.9 * index / max(1, last - 1))}
            axis.plot(
                *zip(*points, strict=True), label=name, linewidth=1.6, marker="o" if len(table) <= 20 else None, markersize=3, **style
            )
    axis.set_yscale("log")
    axis.set_xlabel("inference steps")
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _explain(figure: Figure, axis: Any, names: Sequence[str]) -> None:
    if not axis.lines:
        return
    if len(names) <= 12:
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        return
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure.colorbar(ScalarMappable(Normalize(1, len(names)), "viridis"), ax=axis, label=f"block, {names[0]} to {names[-1]} (dashed)")
