"""The bundled diabetes data of scikit-learn: a regression of 442 patients on ten measurements, no download.

Efron, Hastie, Johnstone, Tibshirani: Least Angle Regression, Annals of Statistics 32, 2004.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from bpfree.options import option
from bpfree.tasks.digits import bundled, table
from bpfree.tasks.task import DataSource, Split, TaskSpec, fixed_test

__all__ = ["CENTRE", "DIABETES", "UNIT"]

NAMES = ("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6")
FILES = ("diabetes_data_raw.csv.gz", "diabetes_target.csv.gz")
CENTRE, UNIT = 152.0, 77.0
"""Mean and deviation of the progression, in whole numbers (152.1 and 77.0)."""


@dataclass
class DiabetesConfig:
    """The units of the target."""

    units: Literal["standard", "measured"] = option(
        "standard", "of the progression after a year: (measured - 152) / 77, or as it was measured, 25 to 346"
    )


def spec(config: DiabetesConfig, root: Path | None) -> TaskSpec:
    """Describe the patients; mean and deviation of the measurements are those of the training split."""
    return TaskSpec("diabetes", (len(NAMES),), 1, "real", scale=1.0, input_names=NAMES)


def load(config: DiabetesConfig, root: Path | None) -> tuple[Split, Split]:
    """Load the measurements (N, 10) and the progression (N, 1); the test split is a fixed random fifth."""
    inputs, progression = (torch.from_numpy(table(name)) for name in FILES)
    targets = (progression - CENTRE) / UNIT if config.units == "standard" else progression
    return fixed_test(Split(inputs.float(), targets.float()))


DIABETES = DataSource(
    spec,
    load,
    DiabetesConfig,
    "scikit-learn's bundled diabetes data: the progression of 442 patients, a real target (no download)",
    files=lambda config, root: [bundled(name) for name in FILES],
    normalise="auto",
)
