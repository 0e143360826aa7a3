"""The shipped studies: every row can be built on its task, and says what it was taken for."""

from __future__ import annotations

import pytest
import torch
from bpfree_predictive_coding.plugin import bpfree_rules, bpfree_studies
from bpfree_predictive_coding.rules import Relaxed

from bpfree.study.cells import plan
from bpfree.study.file import find_study


@pytest.mark.parametrize("name", sorted(bpfree_studies()))
def test_every_row_can_be_built(name: str) -> None:
    """Its rule on its network; what is relaxed reaches every block. One row is an own-prediction twin."""
    seen = {}
    for cell in plan(find_study(name)).cells:
        flat = {key: value for key, value in cell.recipe.flat().items() if key != "seed"}
        if repr(flat) not in seen:
            seen[repr(flat)] = flat
            with torch.device("meta"):  # large networks, without their weights
                rule = cell.recipe.build_rule(cell.recipe.spec())
            if isinstance(rule, Relaxed):
                assert "get no credit" not in rule.plan(), flat
    rules = {flat["rule.name"] for flat in seen.values()}
    assert rules & set(bpfree_rules())
    assert any(flat["twin"] for flat in seen.values())
