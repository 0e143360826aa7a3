"""The studies: every row can be built, and the published medians are those of the result files of the paper's code."""

from __future__ import annotations

import pytest
import torch

from bpfree.study.cells import plan
from bpfree.study.file import find_study

STUDIES = ("sampled-digits", "sampled-hnn", "sampled-images", "sampled-published", "sampled-systems")
MEDIANS = {
    "elm": "1.4e-8 1.2e-13 2.1e-5 1e-7 3.2e-12 7.3e-6 1.9e-7 2.1e-2 5.7e-3",
    "u-swim": "3.8e-9 2.4e-10 5.9e-9 6.2e-10 3.1e-10 2.3e-7 3.2e-8 8.1e-8 4.9e-3",
    "a-swim": "2.2e-9 1.3e-10 1.2e-8 1.3e-9 1.4e-10 6.2e-8 1.1e-8 6.7e-8 3.9e-3",
    "swim (true energies)": "2.2e-9 1.3e-10 1.2e-8 1.3e-9 1.4e-10 6.2e-8 1.1e-8 6.7e-8 4.1e-3",
}


@pytest.mark.parametrize("name", STUDIES)
def test_every_row_can_be_built(name: str) -> None:
    seen = set()
    for cell in plan(find_study(name)).cells:
        flat = {key: value for key, value in cell.recipe.flat().items() if key != "seed"}
        if repr(flat) not in seen:
            seen.add(repr(flat))
            with torch.device("meta"):  # without weights
                cell.recipe.build_rule(cell.recipe.spec())
    assert seen


def test_published_medians_are_those_of_the_result_files() -> None:
    rows = {row.label: row.published for row in find_study("sampled-published").rows}
    for label, medians in MEDIANS.items():
        assert [each["test/energy_error"].mean for each in rows[label].values()] == [float(value) for value in medians.split()]
