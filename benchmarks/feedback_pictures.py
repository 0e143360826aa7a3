"""Draw accuracy against depth for the page of the feedback plugin, from the results of the study ``feedback-depth``.

python benchmarks/feedback_pictures.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from bpfree.document.axes import linear
from bpfree.document.charts import Mark, Series, in_order, panel
from bpfree.document.content import Figure
from bpfree.document.svg import svg_file
from bpfree.files import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "feedback_studies-cpu.json"
IMAGE = ROOT / "docs" / "images" / "feedback-depth.svg"


def curves(cells: dict[str, list[dict[str, Any]]]) -> dict[str, list[tuple[float, float]]]:
    """Return (depth, mean accuracy) of each row, from cells named ``ROW / DEPTH``."""
    found: dict[str, list[tuple[float, float]]] = {}
    for name, runs in cells.items():
        row, _, depth = name.rpartition(" / ")
        found.setdefault(row, []).append((float(depth), statistics.mean(run["test_accuracy"] for run in runs)))
    return {row: sorted(points) for row, points in found.items()}


def main() -> None:
    study = json.loads(RESULTS.read_text(encoding="utf-8"))["studies"]["feedback-depth"]
    found = curves(study["cells"])
    keys = in_order(list(found))
    depths = sorted({depth for points in found.values() for depth, _ in points})
    places = {depth: float(index) for index, depth in enumerate(depths)}
    series = [
        Series(key, [(places[x], y) for x, y in points], points=[Mark(places[x], y, f"{row}, {x:g} layers: {y:.1f} %") for x, y in points])
        for key, (row, points) in zip(keys, found.items(), strict=True)
    ]
    x = linear(list(places.values()), "hidden layers")
    x = type(x)(x.low, x.high, x.label, [(place, f"{depth:g}") for depth, place in places.items()])
    y = linear([value for points in found.values() for _, value in points], "test accuracy, %", bounds=(0, 100))
    text = "Fashion-MNIST, test accuracy, %"
    write_text(IMAGE, svg_file("Feedback weights and depth", Figure([panel(text, x, y, series)], text, keys)))


if __name__ == "__main__":
    main()
