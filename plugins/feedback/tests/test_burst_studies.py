"""The studies of BurstCCN, PEPITA and DRTP: every row can be built on its task, and is the regime that its label says."""

from __future__ import annotations

import pytest
import torch
from bpfree_feedback.burstccn import BurstCCN

from bpfree.study.cells import plan
from bpfree.study.file import find_study


@pytest.mark.parametrize("name", ["burstccn-conv", "burstccn-mnist", "burstccn-notebook", "burstccn-scale", "pepita-cifar10"])
def test_every_row_can_be_built(name: str) -> None:
    """Oracle: labels. What is tied has no parameters of its own; a row that is learned has; two rows of each have twins."""
    cells = {cell.key.row: cell.recipe for cell in plan(find_study(name)).cells}
    for label, recipe in cells.items():
        with torch.device("meta"):  # without their weights
            rule = recipe.build_rule(recipe.spec())
        if isinstance(rule, BurstCCN):
            learned = {name for name, _ in rule.feedback["b1"].named_parameters()}
            expected: set[str] = {"Q"}
            if "tied" in label or label == "Q fixed":
                expected = set()
            elif "Kolen-Pollack" in label:
                expected = {"Q", "Y"}
            assert learned == expected, label
    assert name == "burstccn-notebook" or any(recipe.flat()["twin"] for recipe in cells.values())
