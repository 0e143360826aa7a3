"""Certificates made for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bpfree.certify.certificate import Certificate
from bpfree.certify.findings import Finding
from bpfree.plugins import installed_plugins
from bpfree.sources import certificate_hashes


def certificate(rule: str = "noprop-dt", /, **changes: Any) -> Certificate:
    """A full, fresh certificate in which one check passed."""
    plugins = installed_plugins()
    owner = plugins.owner("rules", rule)
    values: dict[str, Any] = {
        "rule": rule,
        "plugin": owner.name,
        "distribution": owner.distribution,
        "version": owner.version,
        "settings": [],
        "config": {},
        "traits": {},
        "kind": "full",
        "date": "2026-11-20",
        "properties": {"dependence": "independent", "matrix": [[1.0]]},
        "findings": [Finding("made-up", "nothing", "passed")],
        "sources": certificate_hashes(plugins, rule),
    }
    return Certificate(**{**values, **changes})


def write(path: Path, made: Certificate) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(made.to_json())
    return path
