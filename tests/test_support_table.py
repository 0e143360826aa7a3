"""The tables of docs/networks.md: which rule works on which kind of network, input and target. Oracle: trying it."""

from __future__ import annotations

import pytest
from support_table import FAILS, INPUTS, NETWORKS, TARGETS, WORKS, generated, line, reasons, row, rules, sections, tables


@pytest.mark.parametrize("rule", rules())
def test_what_the_page_says_of_a_rule_is_what_comes_of_it(rule: str) -> None:
    """Whatever is offered works, or is refused with a reason; ``make support`` writes the page."""
    outcomes = dict(zip([offer.name for offer in (*NETWORKS, *INPUTS, *TARGETS)], row(rule), strict=True))
    assert not {name: reason for name, (cell, reason) in outcomes.items() if cell == FAILS}
    assert all(reason for cell, reason in outcomes.values() if cell != WORKS)
    page = generated().splitlines()
    for _, first, offers in sections():
        assert line(rule, first, offers) in page
    if said := reasons(rule):
        assert said in page


def test_the_page_has_a_row_for_each_rule_and_nothing_else() -> None:
    assert generated().strip() == "\n".join(tables()).strip()


def test_the_table_can_tell_the_difference() -> None:
    """Oracles: what a rule cannot do by its own definition."""
    cells = {offer.name: cell for offer, (cell, _) in zip(NETWORKS, row("backprop"), strict=False)}
    assert cells["LSTM"] == cells["attention"] == cells["watched"] == WORKS
    assert cells["no chain"] != WORKS
    hebbian = {offer.name: cell for offer, (cell, _) in zip(NETWORKS, row("oja"), strict=False)}
    assert hebbian["dense"] == WORKS
    assert hebbian["gated"] != WORKS  # one linear map per block
