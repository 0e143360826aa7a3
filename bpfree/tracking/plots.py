"""Draw the curves of a run when it has ended: ``plots/curves.svg``, and ``plots/blocks.svg`` if blocks report metrics."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from bpfree.document.axes import fitting, linear
from bpfree.document.charts import Series, in_order, natural, panel
from bpfree.document.content import Figure, Key, Panel
from bpfree.document.run_plots import line
from bpfree.document.svg import svg_file
from bpfree.files import write_text
from bpfree.hooks import hookimpl
from bpfree.metric import LOSS, Metric
from bpfree.record.folder import RunFolder
from bpfree.run import Run

__all__ = ["Plots"]

logger = logging.getLogger("bpfree.tracking")

TRAINING, VALIDATION, OWN, TEST = Key(8, "training"), Key(1, "validation"), Key(0, "the rule's loss"), 2
BLOCK_METRIC = re.compile(r"(?P<split>rule|val)/(?P<block>.+)/(?P<name>[^/]+)")
Curves = list[tuple[Key, list[tuple[float, float]]]]


class Plots:
    """Draws a run's curves into its folder and adds them to its artifacts; a failure is a warning."""

    @hookimpl(tryfirst=True)
    def run_end(self, run: Run) -> None:
        """Draw the available curves, before other observers list or upload the run's artifacts."""
        if run.folder is None or not run.history:
            return
        title = run.name if run.status == "finished" else f"{run.name} ({run.status})"
        try:
            for name, figure in (("curves", curves(run)), ("blocks", blocks(run))):
                if figure is not None:
                    run.artifacts[f"plots/{name}.svg"] = _save(svg_file(title, figure), RunFolder(run.folder).plots / f"{name}.svg")
        except Exception as error:
            logger.warning("no plots of %s: %s: %s", run.name, type(error).__name__, error)


def _save(text: str, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def curves(run: Run) -> Figure | None:
    """Draw loss and metrics against epochs, training and validation; ``None``: nothing was measured."""
    drawn = []
    for metric in sorted({**run.measures, LOSS.name: LOSS}.values(), key=lambda metric: metric.name != LOSS.name):
        found = _measured(run, {TRAINING: f"train/{metric.name}", VALIDATION: f"val/{metric.name}"}, metric)
        tested = run.result.get(f"test/{metric.name}", math.nan)
        if found and metric.name != LOSS.name and math.isfinite(tested):
            found.append((Key(TEST, f"test {metric.text(tested)}"), [(run.epoch, metric.factor * tested)]))
        drawn.append((metric.label, metric, found))
    if not any(found for _, _, found in drawn):
        drawn = [(LOSS.label, LOSS, _measured(run, {OWN: "rule/loss"}, LOSS))]
    return _figure(drawn, f"Curves of {run.name} over its epochs.")


def blocks(run: Run) -> Figure | None:
    """Draw a panel for each metric that several blocks report: their own losses, and the primary metric of their own predictions."""
    primary, name = run.primary, run.primary.name.replace("_", " ")
    kinds = {
        ("rule", LOSS.name): ("loss of each block", LOSS),
        ("val", primary.name): (f"validation {name} of single blocks{primary.label.removeprefix(name)}", primary),
    }
    found: dict[tuple[str, str], dict[str, str]] = {}
    for key in dict.fromkeys(key for metrics in run.history for key in metrics):
        match = BLOCK_METRIC.fullmatch(key)
        if match and (match["split"], match["name"]) in kinds:
            found.setdefault((match["split"], match["name"]), {})[match["block"]] = key
    names = sorted({block for of in found.values() for block in of}, key=natural)
    keys = dict(zip(names, in_order(names), strict=True))
    drawn = []
    for kind, of in found.items():
        title, metric = kinds[kind]
        drawn.append((title, metric, _measured(run, {keys[block]: of[block] for block in names if block in of}, metric)))
    return _figure(drawn, f"Blocks of {run.name}, from the first (orange) to the last (blue).")


def _measured(run: Run, metrics: Mapping[Key, str], metric: Metric) -> Curves:
    """Collect epochs and finite values of each measured metric, shares in per cent."""
    found = []
    for key, name in metrics.items():
        points = [(m["epoch"], metric.factor * m[name]) for m in run.history if "epoch" in m and math.isfinite(m.get(name, math.nan))]
        found += [(key, points)] if points else []
    return found


def _figure(drawn: Sequence[tuple[str, Metric, Curves]], caption: str) -> Figure | None:
    panels = [_panel(title, found, percents=metric.share) for title, metric, found in drawn if found]
    return Figure(panels, caption, list(dict.fromkeys(key for _, _, found in drawn for key, _ in found))) if panels else None


def _panel(title: str, drawn: Curves, *, percents: bool) -> Panel:
    epochs, values = zip(*(point for _, points in drawn for point in points), strict=True)
    y = linear(values, title, bounds=(0, 100)) if percents else fitting(values, title)
    title += " (logarithmic)" if y.log else ""
    return panel(title, linear(epochs, "epoch", bounds=(0, math.inf), whole=True), y, [_series(*one) for one in drawn])


def _series(key: Key, points: Sequence[tuple[float, float]]) -> Series:
    return line(key, points, lambda x, y: f"{key.label}, epoch {x:g}: {y:.4g}")
