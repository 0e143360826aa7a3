"""The README's picture, from the runs of a comparison: ``python docs/images/quickstart.py runs`` after

bpfree compare noprop-dt local-forward-gradient --seeds 3 task=digits budget.epochs=30 threads=1
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colours; floors and the linear classifier are drawn with broken lines.
STYLES = {
    "backprop": ("#000000", "-"),
    "noprop-dt": ("#0072B2", "-"),
    "local-forward-gradient": ("#D55E00", "-"),
    "linear": ("#E69F00", ":"),
    "frozen": ("#999999", "--"),
    "noprop-dt (frozen twin)": ("#56B4E9", "--"),
}


def read(folder: Path) -> dict[str, list[tuple[list[float], float]]]:
    """Validation accuracy per epoch, and test accuracy, of each seed, by rule; in percent."""
    found: dict[str, list[tuple[list[float], float]]] = {name: [] for name in STYLES}
    for path in sorted(folder.glob("*/run.json")):
        run = json.loads(path.read_text())
        name = run["tags"]["rule"] + (" (frozen twin)" if run["tags"]["frozen_twin"] == "True" else "")
        lines = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
        found[name].append(([100 * line["val/accuracy"] for line in lines], 100 * run["result"]["test/accuracy"]))
    return found


def draw(runs: dict[str, list[tuple[list[float], float]]], place: Path) -> None:
    """Learning curves on the left (mean and range over seeds), test accuracy on the right (mean and deviation)."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    for position, (name, (colour, line)) in enumerate(reversed(STYLES.items())):
        curves = list(zip(*(curve for curve, _ in runs[name]), strict=True))
        epochs = range(1, len(curves) + 1)
        left.plot(epochs, [statistics.fmean(values) for values in curves], line, color=colour, label=name, linewidth=1.9)
        left.fill_between(epochs, [min(v) for v in curves], [max(v) for v in curves], color=colour, alpha=0.13, linewidth=0)
        tests = [test for _, test in runs[name]]
        mean = statistics.fmean(tests)
        right.barh(position, mean, color=colour, alpha=0.85, xerr=statistics.stdev(tests), error_kw={"ecolor": "#555555", "capsize": 3})
        right.text(2, position, f"{mean:.1f}", va="center", color="white", fontweight="bold")
    left.set(xlabel="epoch", ylabel="validation accuracy (%)", ylim=(0, 101), title="handwritten digits, 3 seeds: mean and range")
    handles, labels = left.get_legend_handles_labels()
    left.legend(handles[::-1], labels[::-1], frameon=False, loc="lower right", fontsize=9)
    left.grid(alpha=0.25)
    right.set(yticks=range(len(STYLES)), yticklabels=list(reversed(STYLES)), xlim=(0, 100))
    right.set(xlabel="test accuracy (%)", title=f"after {len(curves)} epochs")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(place, dpi=90)


if __name__ == "__main__":
    draw(read(Path(sys.argv[1])), Path(__file__).with_suffix(".png"))
