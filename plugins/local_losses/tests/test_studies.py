"""The studies: every row can be built, rows of floors and twins are there, and published numbers are those of the authors' tables."""

from __future__ import annotations

from pathlib import Path

import bpfree_local_losses
import pytest
import torch

from bpfree.study.cells import plan
from bpfree.study.file import find_study

STUDIES = sorted(path.stem for path in (Path(bpfree_local_losses.__file__).parent / "studies").glob("*.yaml"))
ERRORS = {
    "local-errors-mnist-table": {
        "MNIST mlp": ".75 .68 .80 .62",
        "MNIST vgg8b": ".26 .40 .65 .31",
        "Fashion-MNIST mlp": "8.37 8.60 9.70 8.54",
        "Fashion-MNIST vgg8b": "4.53 5.66 5.12 4.65",
    },
    "local-errors-cifar-table": {
        "CIFAR-10 vgg8b": "5.99 8.40 7.16 5.58",
        "CIFAR-10 vgg11b": "5.56 8.39 6.70 5.30",
        "CIFAR-100 vgg8b": "26.24 29.32 32.64 24.07",
        "CIFAR-100 vgg11b": "25.18 29.58 30.82 24.05",
    },
}
"""Test errors in per cent: global loss, pred, sim, predsim. README of anokland/local-loss."""


@pytest.mark.parametrize("name", STUDIES)
def test_every_row_and_column_can_be_built(name: str) -> None:
    """Without weights, but for rules that read theirs when they are made; plans of all cells are checked."""
    rows, columns = set(), set()
    for cell in plan(find_study(name)).cells:
        if cell.key.row in rows and cell.key.column in columns:
            continue
        rows.add(cell.key.row)
        columns.add(cell.key.column)
        with torch.device("cpu" if str(cell.recipe.flat()["rule.name"]).startswith("noprop") else "meta"):
            cell.recipe.build_rule(cell.recipe.spec())


@pytest.mark.parametrize("name", ERRORS)
def test_published_errors_are_the_authors(name: str) -> None:
    rows = find_study(name).rows
    assert [row.label for row in rows] == ["back-propagation", "pred", "sim", "predsim"]
    for column, errors in ERRORS[name].items():
        assert [row.published[column]["test/error"].mean for row in rows] == [float(error) for error in errors.split()]


def test_comparisons_have_a_twin_beside_them() -> None:
    for name in ("local-errors-mnist", "local-losses-depth", "local-losses-short", "sigprop-mnist"):
        assert "own-prediction twin" in {row.label for row in find_study(name).rows}
