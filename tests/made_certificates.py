"""Certificates made for tests."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from bpfree.certify.certificate import Certificate, digest_of
from bpfree.certify.findings import Finding
from bpfree.certify.names import FULL
from bpfree.plugins import installed_plugins
from bpfree.sources import certificate_hashes


def certificate(rule: str = "noprop-dt", /, **changes: Any) -> Certificate:
    """A full, fresh certificate in which every check passed."""
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
        "findings": [Finding(name, "nothing", "passed") for name in FULL],
        "sources": certificate_hashes(plugins, rule),
    }
    return Certificate(**{**values, **changes})


def findings(*changed: Finding) -> list[Finding]:
    """Every check, of which those not given have passed; a given one takes the place of the check of its name, or of the first."""
    known = {finding.id if finding.id in FULL else FULL[place]: finding for place, finding in enumerate(changed)}
    return [dataclasses.replace(known[name], id=name) if name in known else Finding(name, "nothing", "passed") for name in FULL]


def completed(partial: Certificate) -> Certificate:
    """Make a full certificate of a partial or quick one: checks that it lacks have passed."""
    known = {finding.id: finding for finding in partial.findings}
    every = [known.get(name) or Finding(name, "nothing", "passed") for name in FULL]
    return dataclasses.replace(partial, kind="full", findings=every)


def resealed(text: str) -> str:
    """Give the text of a changed certificate the digest of what it says now."""
    content = json.loads(text)
    content["digest"] = digest_of({key: value for key, value in content.items() if key != "digest"})
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def write(path: Path, made: Certificate) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(made.to_json())
    return path
