"""The page of a comparison: one self-contained HTML file that opens offline."""

from __future__ import annotations

import html
import io
import statistics
from collections.abc import Sequence
from pathlib import Path

from bpfree.comparison import HEADERS, Row, summary

__all__ = ["write_page"]

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:80rem;margin:2rem auto;padding:0 1rem;color:#1c1e21;background:#fff}
h1{font-size:1.5rem;margin-bottom:.2rem} p{max-width:48rem;color:#444} .scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.95rem;width:100%}
th,td{padding:.4rem .6rem;text-align:right;border-bottom:1px solid #e2e5e9;white-space:nowrap}
th:first-child,td:first-child{text-align:left} thead th{border-bottom:2px solid #1c1e21}
code{background:#f2f4f6;padding:.1rem .3rem;overflow-wrap:anywhere}
svg{max-width:100%;height:auto;margin-top:1rem}
"""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


def write_page(path: Path, rows: Sequence[Row], *, title: str, settings: str, command: str, environment: str) -> Path:
    """Write the table, the learning curves, and how to run it again."""
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell.replace('+-', '±'))}</td>" for cell in cells) + "</tr>" for cells in summary(rows)
    )
    head = "".join(f"<th>{html.escape(name)}</th>" for name in HEADERS)
    text = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1><p>{html.escape(settings)}</p>
<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>
<p>Test accuracy: mean over seeds, and standard deviation as the spread; the test split is evaluated once per run, with the weights
that the setting <code>select</code> names. Best alternative: the best of the rule's other predictions (a single block, the mean of
blocks, another kind of inference), chosen on validation.
Seconds: training only. Memory: tensors at the peak of a step, without the data set. A frozen twin trains only the readout of
random features: what a rule adds is the distance from it.</p>
{curves(rows)}
<p>Run it again: <code>{html.escape(command)}</code></p><p>{html.escape(environment)}</p></body></html>
"""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def curves(rows: Sequence[Row]) -> str:
    """Validation accuracy against epochs and against seconds of training, as SVG; the band spans the seeds."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots(1, 2, sharey=True)
    drawn = [row for row in rows if row.finished and any("val/accuracy" in metrics for metrics in row.finished[0].history)]
    for row, colour in zip(drawn, COLOURS * 4, strict=False):
        for axis, key in zip(axes, ("epoch", "seconds"), strict=True):
            lines = [[(m[key], m["val/accuracy"]) for m in run.history if "val/accuracy" in m] for run in row.finished]
            points = list(zip(*lines, strict=False))
            x = [statistics.fmean(value for value, _ in point) for point in points]
            y = [[100 * score for _, score in point] for point in points]
            marker = "o" if len(x) == 1 else None  # a line of one point is invisible
            axis.plot(x, [statistics.fmean(values) for values in y], color=colour, label=row.label, linewidth=1.8, marker=marker)
            axis.fill_between(x, [min(values) for values in y], [max(values) for values in y], color=colour, alpha=0.15, linewidth=0)
    axes[0].set(xlabel="epoch", ylabel="validation accuracy (%)")
    axes[1].set(xlabel="seconds of training", xscale="log")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    if drawn:
        axes[0].legend(frameon=False, loc="lower right", fontsize=9)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    content = buffer.getvalue()
    return content[content.index("<svg") :] if drawn else ""
