"""Curves of a run, drawn when it is over: ``plots/curves.svg`` and ``.png``, and ``plots/blocks.*`` where blocks report."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpfree.hooks import hookimpl
from bpfree.metric import LOSS, Metric
from bpfree.record.folder import RunFolder
from bpfree.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Plots"]

logger = logging.getLogger("bpfree.tracking")

# Okabe and Ito's colours, which stay apart for colour-blind readers.
TRAIN, VALIDATION, TEST = "#0072B2", "#D55E00", "#009E73"
BLOCK_METRIC = re.compile(r"(?P<split>rule|val)/(?P<block>.+)/(?P<name>[^/]+)")
Curve = tuple[list[float], list[float]]


class Plots:
    """Draws a run's curves into its folder and adds them to its artifacts; a failure is a warning."""

    @hookimpl(tryfirst=True)
    def run_end(self, run: Run) -> None:
        """Draw what there is to draw, before others list or upload the run's artifacts."""
        if run.folder is None or not run.history:
            return
        try:
            figures = {"curves": _curves(run), "blocks": _blocks(run)}
            for name, figure in figures.items():
                if figure is not None:
                    run.artifacts.update(_save(figure, RunFolder(run.folder).plots, name))
        except Exception as error:
            logger.warning("no plots of %s: %s: %s", run.name, type(error).__name__, error)


def _save(figure: Figure, folder: Path, name: str) -> dict[str, Path]:
    from matplotlib import rc_context

    folder.mkdir(parents=True, exist_ok=True)
    paths = {f"plots/{name}.{kind}": folder / f"{name}.{kind}" for kind in ("svg", "png")}
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        for path in paths.values():
            figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def _figure(run: Run, panels: int) -> tuple[Figure, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * panels, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    title = run.name if run.status == "finished" else f"{run.name} ({run.status})"
    figure.suptitle(title, fontsize=11)
    return figure, axes


def _curves(run: Run) -> Figure | None:
    """Loss and metrics against epochs, training and validation."""
    measures = sorted({**run.measures, LOSS.name: LOSS}.values(), key=lambda metric: metric.name != LOSS.name)
    panels = [metric for metric in measures if _any(run, f"train/{metric.name}", f"val/{metric.name}")]
    if not panels and not _any(run, "rule/loss"):
        return None
    figure, axes = _figure(run, max(1, len(panels)))
    for axis, metric in zip(axes, panels, strict=False):
        name, scale = metric.name, metric.factor
        for key, text, colour, style in ((f"train/{name}", "training", TRAIN, "--"), (f"val/{name}", "validation", VALIDATION, "-")):
            _line(axis, _curve(run, key, scale), text, color=colour, linestyle=style)
        tested = run.result.get(f"test/{name}", math.nan)
        if name != LOSS.name and math.isfinite(tested):
            axis.plot([run.epoch], [scale * tested], "D", color=TEST, markersize=6, label=f"test {metric.text(tested)}", zorder=5)
        _finish(axis, _label(metric))
    if not panels:
        _line(axes[0], _curve(run, "rule/loss"), "the rule's loss", color=TRAIN)
        _finish(axes[0], "loss")
    return figure


def _label(metric: Metric) -> str:
    """``accuracy (%)``."""
    name, _, unit = metric.label.partition(", ")
    return f"{name} ({unit})" if unit else name


def _blocks(run: Run) -> Figure | None:
    """One panel per metric that several blocks report: their own losses, the primary metric of their own predictions."""
    found: dict[tuple[str, str], dict[str, Curve]] = {}
    primary = run.primary
    for key in dict.fromkeys(key for metrics in run.history for key in metrics):
        match = BLOCK_METRIC.fullmatch(key)
        if match and (match["split"], match["name"]) in (("rule", "loss"), ("val", primary.name)):
            scale = primary.factor if match["split"] == "val" else 1.0
            found.setdefault((match["split"], match["name"]), {})[match["block"]] = _curve(run, key, scale)
    panels = {key: curves for key, curves in found.items() if any(x for x, _ in curves.values())}
    if not panels:
        return None
    figure, axes = _figure(run, len(panels))
    names = [list(curves) for curves in panels.values()]
    for index, (axis, ((split, _), curves)) in enumerate(zip(axes, panels.items(), strict=True)):
        _one_per_block(axis, curves)
        repeated = index + 1 < len(panels) and names[index] == names[-1]
        _finish(
            axis,
            _of_blocks(primary) if split == "val" else "loss of each block",
            legend=len(curves) <= 12 and not repeated,
        )
    return figure


def _of_blocks(metric: Metric) -> str:
    """``validation accuracy of single blocks (%)``."""
    name, _, unit = metric.label.partition(", ")
    return f"validation {name} of single blocks" + (f" ({unit})" if unit else "")


def _one_per_block(axis: Axes, curves: dict[str, Curve]) -> None:
    """From dark (first block) to light (last): viridis keeps its order without colour."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    names = sorted(curves, key=_natural)
    shades = colormaps["viridis"]
    for index, name in enumerate(names):
        _line(axis, curves[name], name, color=shades(0.9 * index / max(1, len(names) - 1)))
    if len(names) > 12:
        scale = ScalarMappable(Normalize(1, len(names)), shades.resampled(len(names)))
        axis.figure.colorbar(scale, ax=axis, label=f"block, {names[0]} to {names[-1]}")


def _natural(name: str) -> list[Any]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def _any(run: Run, *keys: str) -> bool:
    return any(math.isfinite(metrics.get(key, math.nan)) for metrics in run.history for key in keys)


def _curve(run: Run, key: str, scale: float = 1.0) -> Curve:
    points = [(m["epoch"], scale * m[key]) for m in run.history if "epoch" in m and math.isfinite(m.get(key, math.nan))]
    return [x for x, _ in points], [y for _, y in points]


def _line(axis: Axes, curve: Curve, label: str, **style: Any) -> None:
    x, y = curve
    if x:
        axis.plot(x, y, label=label, linewidth=1.6, marker="o" if len(x) <= 20 else None, markersize=3.5, **style)


def _finish(axis: Axes, label: str, *, legend: bool = True) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_xlabel("epoch")
    axis.set_ylabel(label)
    epochs = {x for line in axis.lines for x in _values(line.get_xdata())}
    if len(epochs) == 1:
        axis.set_xlim(min(epochs) - 1, min(epochs) + 1)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    if _log_scale([value for line in axis.lines for value in _values(line.get_ydata())]) and "loss" in label:
        axis.set_yscale("log")
    if legend and len(axis.lines) > 4:
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    elif legend and axis.lines:
        axis.legend(frameon=False, fontsize=8)


def _values(data: Any) -> list[float]:
    return [float(value) for value in data]


def _log_scale(values: Sequence[float]) -> bool:
    return bool(values) and min(values) > 0 and max(values) / min(values) > 50
