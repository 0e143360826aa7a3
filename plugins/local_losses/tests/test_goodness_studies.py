"""Studies of rules that learn by goodness: every row can be built and has a twin beside it; published numbers are the papers'."""

from __future__ import annotations

import pytest
import torch

from bpfree.study.cells import plan
from bpfree.study.file import find_study

STUDIES = ("channel-competition", "forward-forward-mnist", "goodness-digits", "goodness-mnist")
CHANNEL_COMPETITION = {"MNIST": 0.58, "Fashion-MNIST": 7.69, "CIFAR-10": 21.89, "CIFAR-100": 48.77}
"""Errors in per cent, from the abstract of arXiv 2312.12668."""


@pytest.mark.parametrize("name", STUDIES)
def test_every_row_can_be_built(name: str) -> None:
    seen = {}
    for cell in plan(find_study(name)).cells:
        flat = {key: value for key, value in cell.recipe.flat().items() if key != "seed"}
        if repr(flat) not in seen:
            seen[repr(flat)] = flat
            with torch.device("meta"):  # without weights
                cell.recipe.build_rule(cell.recipe.spec())
    assert any("twin" in row.label for row in find_study(name).rows)


def test_published_errors() -> None:
    row = find_study("channel-competition").rows[0]
    assert {column: row.published[column]["test/error"].mean for column in row.published} == CHANNEL_COMPETITION
    rows = find_study("forward-forward-mnist").rows
    assert [number.mean for row in rows for column in row.published.values() for number in column.values()] == [1.36]
