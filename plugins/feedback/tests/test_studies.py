"""The studies of the family: every row can be built, has a twin beside it, and the published numbers are those of BioTorch's table."""

from __future__ import annotations

import pytest
import torch

from bpfree.study.cells import plan
from bpfree.study.file import find_study

STUDIES = (
    "biotorch-cifar10",
    "biotorch-cifar10-short",
    "biotorch-mnist",
    "feedback-depth",
    "feedback-digits",
    "feedback-transport",
    "feedback-transport-tuned",
)
ROWS = ("back-propagation", "feedback alignment", "DFA in layers", "sign-symmetry (uSF)")
BIOTORCH = {
    "biotorch-mnist": {"MNIST": ".91 1.7 1.61 .94 .91 .97", "Fashion-MNIST": "9.2 13.06 12.81 9.69 10.02 9.61"},
    "biotorch-cifar10": {"LeNet": "14.23 46.69 54.21 16.22 16.02 16.86", "ResNet-20": "8.63 32.16 45.94 10.05 11.02 11.2"},
}
"""Errors in per cent: back-propagation, FA, DFA, uSF, brSF, frSF. Benchmarks.md of BioTorch, SGD."""


@pytest.mark.parametrize("name", STUDIES)
def test_every_row_can_be_built(name: str) -> None:
    seen = {}
    for cell in plan(find_study(name)).cells:
        flat = {key: value for key, value in cell.recipe.flat().items() if key != "seed"}
        if repr(flat) not in seen:
            seen[repr(flat)] = flat
            with torch.device("meta"):  # without weights
                cell.recipe.build_rule(cell.recipe.spec())
    assert "own-prediction twin" in {row.label for row in find_study(name).rows}


@pytest.mark.parametrize("name", BIOTORCH)
def test_published_errors_are_biotorchs(name: str) -> None:
    rows = find_study(name).rows
    for column, errors in BIOTORCH[name].items():
        found = [row.published[column]["test/error"].mean for row in rows if column in row.published]
        assert found == [float(error) for error in errors.split()]
    assert [row.label for row in rows][: len(ROWS)] == list(ROWS)
