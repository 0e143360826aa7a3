"""The studies of the plugin: every row can be built, and swarms are compared at equal evaluations."""

from __future__ import annotations

import pytest

from bpfree.study.cells import plan
from bpfree.study.file import find_study

STUDIES = ("gradient-free-digits", "gradient-free-mnist", "gradient-free-scaling", "particles-digits", "particles-low-floor")


@pytest.mark.parametrize("name", STUDIES)
def test_every_row_can_be_built(name: str) -> None:
    seen = set()
    for cell in plan(find_study(name)).cells:
        flat = {key: value for key, value in cell.recipe.flat().items() if key != "seed"}
        if repr(flat) not in seen:
            seen.add(repr(flat))
            cell.recipe.build_rule(cell.recipe.spec())
    assert len(seen) >= 8


def test_swarms_have_equal_evaluations() -> None:
    """Oracle: 26 neurons with 10 particles, and the network as it is, once for each batch."""
    found = {}
    for row in plan(find_study("particles-digits")).rows:
        recipe = row.cells[0].recipe
        if recipe.names["rule"] == "particles" and not recipe.flat().get("twin"):
            found[row.label] = recipe.build_rule(recipe.spec()).traits.passes
    assert found.pop("neurons together") == 261 + 2  # the assembled layers
    assert set(found.values()) == {261}
    assert len(found) == 8
