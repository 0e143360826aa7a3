"""The bundled handwritten digits of scikit-learn: 1,797 images of 8x8 pixels, no download."""

from __future__ import annotations

import gzip
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from bpfree.errors import BpfreeError
from bpfree.options import option
from bpfree.tasks.task import DataSource, Split, TaskSpec, fixed_test

__all__ = ["DIGITS", "DigitsConfig", "bundled", "table"]

FILE = "digits.csv.gz"


@dataclass
class DigitsConfig:
    """The size of the images."""

    size: Literal[8, 16, 32] = option(8, "pixels to a side; more than 8 repeat each pixel, for networks that need larger images")


def spec(config: DigitsConfig, root: Path | None) -> TaskSpec:
    """Describe the digits; mean and deviation are those of all pixels of the training and validation examples together."""
    return TaskSpec("digits", input_shape=(1, config.size, config.size), outputs=10, mean=(0.3053,), std=(0.3760,), scale=1.0)


def bundled(name: str) -> Path:
    """Find a table in scikit-learn's package without importing it, which takes a second.

    Raises:
        BpfreeError: scikit-learn is not installed.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise BpfreeError(f"scikit-learn, which brings {name}, is not installed", fix="pip install scikit-learn")
    return Path(spec.origin).parent / "datasets" / "data" / name


def table(name: str, separator: str | None = None) -> NDArray[np.float64]:
    """Read a bundled table of numbers (rows, columns)."""
    with gzip.open(bundled(name)) as file:
        return np.loadtxt(file, delimiter=separator, ndmin=2)


def load(config: DigitsConfig, root: Path | None) -> tuple[Split, Split]:
    """Load the digits with pixels 0 to 16 scaled to [0, 1]; the test split is a fixed stratified fifth."""
    data = table(FILE, ",")
    images = torch.from_numpy(data[:, :-1]).float().div(16).reshape(-1, 1, 8, 8)
    times = config.size // 8
    images = images.repeat_interleave(times, 2).repeat_interleave(times, 3) if times > 1 else images
    return fixed_test(Split(images, torch.from_numpy(data[:, -1]).long()))


DIGITS = DataSource(
    spec,
    load,
    DigitsConfig,
    "scikit-learn's bundled handwritten digits, 8x8, 10 classes (no download)",
    files=lambda config, root: [bundled(FILE)],
)
