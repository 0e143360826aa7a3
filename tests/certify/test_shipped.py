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


@pytest.mark.parametrize(
    "rule", [pytest.param(rule, marks=() if plugin == "core" else pytest.mark.slow) for plugin, rule in CHOSEN.items()]
)
def test_a_rule_of_each_plugin_passes(rule: str) -> None:
    certificate = certify(rule, quick=True)
    assert certificate.counts == {"passed": len(certificate.findings)}, "\n".join(
        str(finding) for finding in certificate.findings if finding.status != "passed"
    )


def test_no_shipped_plugin_is_left_out() -> None:
    """Oracle: the plugins that are installed from this repository."""
    ours = {record.name for record in installed_plugins().records.values() if record.distribution.startswith("bpfree")}
    assert set(CHOSEN) == {name for name in ours if not name.startswith("my-")}
    for plugin, rule in CHOSEN.items():
        assert installed_plugins().owner("rules", rule).name == plugin
