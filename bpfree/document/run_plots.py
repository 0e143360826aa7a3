"""Plots that a plugin adds to a run: values kept after epochs in the run's folder, and pictures of them as artifacts."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from bpfree.document.charts import Mark, Series
from bpfree.document.content import Figure, Key
from bpfree.document.svg import svg_file
from bpfree.files import write_text

__all__ = ["Plotted", "add_plot", "keep_epoch", "line", "write_figure"]

logger = logging.getLogger("bpfree")

MOST_MARKS = 20
"""Points of a line up to which each has a mark."""


class Plotted(Protocol):
    """A run as far as plots are concerned."""

    name: str
    artifacts: dict[str, Path]


def keep_epoch(path: Path, epoch: int, values: Mapping[str, Any], about: Mapping[str, Any] | None = None) -> Path:
    """Add an epoch's values to a JSON file, as ``{name: {epoch: value}}``; those of the same epoch, of a resumed run, are replaced.

    Args:
        path: of the file; made if it is not there.
        epoch: its number.
        values: by name.
        about: what holds for all epochs, such as names of blocks.

    Returns:
        ``path``.
    """
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content = {**(about or {}), **{name: {**known.get(name, {}), str(epoch): value} for name, value in values.items()}}
    write_text(path, json.dumps(content) + "\n")
    return path


def add_plot(run: Plotted, what: str, draw: Callable[[], Path], *kept: Path) -> None:
    """Draw a plot, and add it and the files that it is drawn of to the run's artifacts; a failure is a warning.

    Args:
        run: whose plot it is.
        what: it shows, for the warning.
        draw: writes it, and returns its path.
        kept: files that it is drawn of.
    """
    try:
        drawn = draw()
        run.artifacts.update({**{path.name: path for path in kept}, f"plots/{drawn.name}": drawn})
    except Exception as error:
        logger.warning("no plot of %s of %s: %s: %s", what, run.name, type(error).__name__, error)


def write_figure(target: Path, title: str, figure: Figure) -> Path:
    """Write a figure as an SVG file, whose folder is made; returns ``target``."""
    target.parent.mkdir(exist_ok=True)
    write_text(target, svg_file(title, figure))
    return target


def line(key: Key, points: Iterable[tuple[float, float]], text: Callable[[float, float], str]) -> Series:
    """Make a line of the points that are finite, each with a mark and its text where they are few."""
    shown = [(x, y) for x, y in points if math.isfinite(y)]
    return Series(key, shown, points=[Mark(x, y, text(x, y)) for x, y in shown] if len(shown) <= MOST_MARKS else [])
