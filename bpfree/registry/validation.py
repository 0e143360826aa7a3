"""Check a registry's folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bpfree.errors import BpfreeError
from bpfree.plugins import Plugins
from bpfree.registry.certificates import certificate_file, certificates, core_changed, stale
from bpfree.registry.entries import Entry, read_entry
from bpfree.registry.index import out_of_date

if TYPE_CHECKING:
    from bpfree.certify.certificate import Certificate

__all__ = ["StaleCertificate", "acceptable", "measured_on_another_core", "missing", "problems"]


class StaleCertificate(BpfreeError):
    """A certificate was measured on other sources than the installed ones; it says nothing wrong of these, and nothing right."""


def problems(folder: Path, plugins: Plugins) -> list[BpfreeError]:
    """Find all faults of a registry's folder; a rule without a certificate is not a fault (see :func:`missing`).

    Args:
        folder: with ``plugins/``, ``certificates/``, ``index.json`` and ``README.md``.
        plugins: those installed; entries and certificates of other plugins are checked without the plugin.
    """
    from bpfree.certify.certificate import read_certificate

    found: list[BpfreeError] = []
    entries: list[Entry] = []
    known: list[Certificate] = []
    for path in sorted((folder / "plugins").glob("*.toml")):
        try:
            entries.append(read_entry(path))
        except BpfreeError as error:
            found.append(error)
            continue
        found += _of_entry(entries[-1], path, plugins)
    found += _of_names(entries)
    for path in sorted((folder / "certificates").glob("*.json")):
        try:
            known.append(read_certificate(path))
        except BpfreeError as error:
            found.append(error)
            continue
        found += _of_certificate(known[-1], path, entries, plugins)
    return found or list(_of_made_files(folder))


def missing(folder: Path) -> list[str]:
    """List the rules of all entries that have no certificate.

    Raises:
        BpfreeError: an entry cannot be read.
    """
    entries = [read_entry(path) for path in sorted((folder / "plugins").glob("*.toml"))]
    return [rule for entry in entries for rule in entry.rules if not certificate_file(folder, rule).exists()]


def measured_on_another_core(folder: Path, plugins: Plugins) -> list[str]:
    """Name the installed rules whose certificates are fresh, but were measured before the rest of the core changed.

    Raises:
        BpfreeError: a certificate cannot be read.
    """
    known = {rule: made for rule, made in certificates(folder).items() if made.rule in plugins.names("rules")}
    return [rule for rule, made in known.items() if core_changed(made, plugins) and not stale(made, plugins)]


def acceptable(certificate: Certificate, plugins: Plugins, where: Path) -> Iterator[BpfreeError]:
    """Report why a certificate cannot be in a registry: failed, not full, or stale."""
    renewal = f"{certificate.command} --output {where}"
    if certificate.absent or not certificate.findings:
        lacks = ", ".join(certificate.absent) or "every check"
        yield BpfreeError(f"the certificate of {certificate.rule} lacks {lacks}", where=str(where), fix=renewal)
    elif not certificate.passed:
        failed = ", ".join(finding.id for finding in certificate.findings if finding.status == "failed")
        yield BpfreeError(
            f"{certificate.rule} failed its examination: {failed}", where=str(where), fix=f"correct the rule, then run {renewal}"
        )
    elif certificate.kind != "full":
        yield BpfreeError(f"the certificate of {certificate.rule} is {certificate.kind}, not full", where=str(where), fix=renewal)
    if certificate.rule in plugins.names("rules") and (changed := stale(certificate, plugins)):
        yield StaleCertificate(
            f"the certificate of {certificate.rule} is stale: the sources of {', '.join(changed)} have changed since",
            where=str(where),
            fix=f"{renewal}; in a checkout of bpfree, make certify renews all certificates",
        )


def _of_entry(entry: Entry, path: Path, plugins: Plugins) -> Iterator[BpfreeError]:
    if path.stem != entry.name:
        yield BpfreeError(f"the entry of {entry.name!r} is in {path.name}", where=str(path), fix=f"rename the file to {entry.name}.toml")
    if entry.api[0] > entry.api[1]:
        yield BpfreeError(f"the range {entry.api} contains no interface version", where=str(path), fix="write api = [FIRST, LAST]")
    for result in entry.results:
        if result["rule"] not in entry.rules:
            yield BpfreeError(f"a result is of {result['rule']!r}, which is not a rule of the plugin", where=str(path))
        if (result["seeds"] > 1) != ("deviation" in result):
            yield BpfreeError(
                f"the result of {result['rule']} on {result['task']}: give a deviation if, and only if, there are several seeds",
                where=str(path),
            )
    record = plugins.records.get(entry.name)
    if record is None or record.status != "ok":
        return
    if sorted(entry.rules) != record.provides["rules"]:
        yield BpfreeError(
            f"the entry lists {', '.join(sorted(entry.rules))}; the plugin registers {', '.join(record.provides['rules'])}",
            where=str(path),
            fix=f"run bpfree registry add {entry.name} --folder {path.parents[1]}",
        )
    if record.api is not None and not entry.api[0] <= record.api <= entry.api[1]:
        yield BpfreeError(f"the plugin is written for interface version {record.api}, which is not in {entry.api}", where=str(path))


def _of_names(entries: Sequence[Entry]) -> Iterator[BpfreeError]:
    owners: dict[str, str] = {}
    for entry in entries:
        for rule in entry.rules:
            if rule in owners:
                yield BpfreeError(f"both {owners[rule]} and {entry.name} list the rule {rule!r}", fix="rename one of them")
            owners[rule] = entry.name


def _of_certificate(certificate: Certificate, path: Path, entries: Sequence[Entry], plugins: Plugins) -> Iterator[BpfreeError]:
    owners = [entry.name for entry in entries if certificate.rule in entry.rules]
    if path.stem != certificate.rule:
        yield BpfreeError(
            f"the certificate of {certificate.rule!r} is in {path.name}", where=str(path), fix=f"rename it to {certificate.rule}.json"
        )
    if certificate.plugin not in owners:
        listed = f"the registry has that rule under {owners[0]}" if owners else "no entry lists the rule"
        yield BpfreeError(
            f"the certificate is of {certificate.rule!r} of plugin {certificate.plugin!r}; {listed}",
            where=str(path),
            fix="certify the rule of the listed plugin, or correct the entry",
        )
    yield from acceptable(certificate, plugins, path)


def _of_made_files(folder: Path) -> Iterator[BpfreeError]:
    try:
        changed = out_of_date(folder)
    except BpfreeError as error:
        yield error
        return
    for path in changed:
        yield BpfreeError(
            f"{path.name} is out of date with entries and certificates", where=str(path), fix=f"run bpfree registry index --folder {folder}"
        )
