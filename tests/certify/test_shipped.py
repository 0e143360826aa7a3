"""One rule of each plugin passes the quick examination, all but one in `make test-slow`; `make certify` examines all of them in full."""

from __future__ import annotations

import pytest

from bpfree.certify import certify
from bpfree.plugins import installed_plugins

CHOSEN = {
    "core": "dfa",
    "feedback": "kolen-pollack",
    "forward-gradient": "local-forward-gradient",
    "gradient-free": "evolution",
    "hebbian": "softhebb",
    "local-losses": "sigprop",
    "noprop": "noprop-dt",
    "predictive-coding": "ipc",
    "sampled": "sampled",
}


NOT_PASSED = {
    "evolution": {"trait-passes": "unmeasured"},
    "sampled": {"no-host-sync": "waived", "resume": "unmeasured", "trait-downstream-weights": "unmeasured", "trait-passes": "unmeasured"},
}
"""Checks that an examination does not decide: of a rule that works with copies of its weights, and of one that does all in one step."""


@pytest.mark.parametrize(
    "rule", [pytest.param(rule, marks=() if plugin == "core" else pytest.mark.slow) for plugin, rule in CHOSEN.items()]
)
def test_a_rule_of_each_plugin_passes(rule: str) -> None:
    others = {finding.id: finding for finding in certify(rule, quick=True).findings if finding.status != "passed"}
    assert {name: finding.status for name, finding in others.items()} == NOT_PASSED.get(rule, {}), "\n".join(map(str, others.values()))


def test_no_shipped_plugin_is_left_out() -> None:
    """Oracle: the plugins that are installed from this repository."""
    ours = {record.name for record in installed_plugins().records.values() if record.distribution.startswith("bpfree")}
    assert set(CHOSEN) == {name for name in ours if not name.startswith("my-")}
    for plugin, rule in CHOSEN.items():
        assert installed_plugins().owner("rules", rule).name == plugin
