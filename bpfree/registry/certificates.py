"""Read the certificates of a registry, and compare the sources that they were measured on with the installed ones.

A certificate is stale if the plugin, the contract or the examiner has changed. Other changes of the core are only reported.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bpfree.errors import BpfreeError
from bpfree.plugins import Plugins

if TYPE_CHECKING:
    from bpfree.certify.certificate import Certificate

__all__ = ["OTHER_CHANGE", "certificates", "core_changed", "rechecked", "stale", "state"]

OTHER_CHANGE = "measured before a change of the core outside contract and examiner"


def certificate_file(folder: Path, rule: str) -> Path:
    """Return the file of a rule's certificate."""
    return folder / "certificates" / f"{rule}.json"


def certificates(folder: Path) -> dict[str, Certificate]:
    """Read the certificates of a registry's folder, by rule.

    Raises:
        BpfreeError: one cannot be read.
    """
    from bpfree.certify.certificate import read_certificate

    return {path.stem: read_certificate(path) for path in sorted((folder / "certificates").glob("*.json"))}


def stale(certificate: Certificate, plugins: Plugins) -> list[str]:
    """Name the plugins and parts of the core that make a certificate stale because they have changed since.

    Raises:
        UsageError: no installed plugin registers the rule, so that the sources cannot be compared.
    """
    from bpfree.sources import REST

    return [name for name in _changed(certificate, plugins) if name != REST]


def core_changed(certificate: Certificate, plugins: Plugins) -> bool:
    """Tell whether the core that an examination executes outside contract and examiner has changed since.

    Raises:
        UsageError: as :func:`stale`.
    """
    from bpfree.sources import REST

    return REST in _changed(certificate, plugins)


def _changed(certificate: Certificate, plugins: Plugins) -> list[str]:
    from bpfree.sources import certificate_hashes

    plugins.get("rules", certificate.rule)
    now = certificate_hashes(plugins, certificate.rule)
    return sorted(name for name in {*now, *certificate.sources} if certificate.sources.get(name) != now.get(name))


def state(rule: str, known: Mapping[str, Certificate], plugins: Plugins) -> str:
    """Describe the state of a rule's certificate: its status and remark, ``stale`` with the changed packages, or ``none``."""
    certificate = known.get(rule)
    if certificate is None:
        return "none"
    good = f"{certificate.status}; {certificate.remark}" if certificate.remark else certificate.status
    if rule not in plugins.names("rules"):
        return good
    changed = stale(certificate, plugins)
    return f"stale ({', '.join(changed)} changed)" if changed else good


def rechecked(folder: Path, plugins: Plugins, draw: int) -> Iterator[tuple[str, str, BpfreeError | None]]:
    """Repeat a drawn check of each certificate whose rule is installed; yield rule, check, and the contradiction if there is one.

    Args:
        folder: of the registry.
        plugins: those installed.
        draw: seed by which the checks are drawn.

    Raises:
        BpfreeError: a certificate cannot be read.
    """
    from bpfree.certify.examination import certify

    for rule, made in certificates(folder).items():
        if made.rule not in plugins.names("rules") or not made.findings:
            continue
        before = random.Random(f"{draw} {rule}").choice(made.findings)
        waived = {before.id: before.waiver} if before.waiver else {}
        (now,) = certify(made.rule, made.settings, only=[before.id], waive=waived, registry=plugins).findings
        if now.status == before.status:
            yield rule, before.id, None
        else:
            what = f"the certificate of {rule} says that {before.id} is {before.status}; repeated, it is {now.status}: {now.what}"
            yield rule, before.id, BpfreeError(what, where=str(certificate_file(folder, rule)), fix=f"run {made.command}")
