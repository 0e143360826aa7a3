"""The certificates of a registry: which there are, and whether the sources that they were measured on are those of now."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bpfree.plugins import Plugins

if TYPE_CHECKING:
    from bpfree.certify.certificate import Certificate

__all__ = ["certificates", "stale", "state"]


def certificate_file(folder: Path, rule: str) -> Path:
    """Where a rule's certificate is."""
    return folder / "certificates" / f"{rule}.json"


def certificates(folder: Path) -> dict[str, Certificate]:
    """The certificates of a registry's folder, by rule.

    Raises:
        BpfreeError: one cannot be read.
    """
    from bpfree.certify.certificate import read_certificate

    return {path.stem: read_certificate(path) for path in sorted((folder / "certificates").glob("*.json"))}


def stale(certificate: Certificate, plugins: Plugins) -> list[str]:
    """The packages whose sources are not those that the certificate was measured on; none: it is fresh.

    Raises:
        UsageError: no installed plugin registers the rule, so that there is nothing to compare with.
    """
    from bpfree.sources import certificate_hashes

    plugins.get("rules", certificate.rule)
    now = certificate_hashes(plugins, certificate.rule)
    return sorted(name for name in {*now, *certificate.sources} if certificate.sources.get(name) != now.get(name))


def state(rule: str, known: Mapping[str, Certificate], plugins: Plugins) -> str:
    """Of a rule's certificate, in a few words: its status with its remark, ``stale`` with the packages that have changed, or ``none``."""
    certificate = known.get(rule)
    if certificate is None:
        return "none"
    good = f"{certificate.status}; {certificate.remark}" if certificate.remark else certificate.status
    if rule not in plugins.names("rules"):
        return good
    changed = stale(certificate, plugins)
    return f"stale ({', '.join(changed)} changed)" if changed else good
