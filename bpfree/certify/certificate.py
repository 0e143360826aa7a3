"""The certificate: the measured properties of a rule at one configuration, and the findings of all checks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bpfree.certify.findings import STATUSES, Finding
from bpfree.certify.names import FULL, expected
from bpfree.errors import BpfreeError

__all__ = ["FORMAT", "Certificate", "read_certificate"]

FIX = "write it with bpfree certify RULE --output FILE"

FORMAT = 2
"""Version of the file's layout."""


KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("rule", "plugin", "distribution", "version", "kind", "date"), str),
    **dict.fromkeys(("config", "traits", "properties", "sources", "environment"), dict),
    **dict.fromkeys(("settings", "findings"), list),
    "seconds": (int, float),
    "api": int,
}
"""Types of a certificate's values, which may come from another user."""


@dataclass
class Certificate:
    """What was measured of a rule.

    Attributes:
        rule: its registered name.
        plugin, distribution, version: who registered it.
        settings: ``KEY=VALUE`` words that it was examined with.
        config: its whole configuration.
        traits: what it declares, at this configuration.
        kind: ``full``, ``quick`` (without whole runs, learning and permuted labels), ``partial`` (single checks), or ``run`` (forks of a
            run).
        date: ISO day.
        properties: what was measured, by name; plain values.
        findings: of all checks, in order.
        sources: hashes of the sources that the result depends on, by package.
        environment: versions and machine.
        seconds: of the whole examination.
    """

    rule: str
    plugin: str
    distribution: str
    version: str
    settings: list[str]
    config: dict[str, Any]
    traits: dict[str, Any]
    kind: str
    date: str
    properties: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    api: int = 1
    format: int = FORMAT

    @property
    def absent(self) -> list[str]:
        """Names of the checks that a certificate of this kind must have, and this one has not."""
        present = {finding.id for finding in self.findings}
        return [name for name in expected(self.kind) if name not in present]

    @property
    def counts(self) -> dict[str, int]:
        """Number of findings by status."""
        return dict(Counter(finding.status for finding in self.findings))

    @property
    def passed(self) -> bool:
        """Whether every check of its kind was made and none failed (a waived check is shown as waived and does not fail it)."""
        return bool(self.findings) and not self.absent and not any(finding.status == "failed" for finding in self.findings)

    @property
    def status(self) -> str:
        """Say how the examination ended: ``certified``, ``certified with waivers``, ``failed`` or ``incomplete``.

        A quick or partial certificate is never called certified.
        """
        if not self.findings or self.absent:
            return "incomplete"
        if not self.passed:
            return "failed"
        if self.kind != "full":
            return f"passed ({self.kind})"
        return "certified with waivers" if self.counts.get("waived") else "certified"

    @property
    def remark(self) -> str:
        """What goes with the status, such as "not shown to learn more than its floor on this network"; the empty string: nothing."""
        learning = self.properties.get("learning") or {}
        return str(learning.get("remark", ""))

    @property
    def command(self) -> str:
        """Command that renews the certificate."""
        if self.kind == "run":
            return f"bpfree certify --run {self.properties.get('run', {}).get('name', 'RUN')}"
        return " ".join(["bpfree certify", self.rule, *self.settings])

    def to_dict(self) -> dict[str, Any]:
        """Return the certificate as plain values."""
        content = {**dataclasses.asdict(self), "status": self.status, "remark": self.remark, "command": self.command}
        return {**content, "digest": digest_of(content)}

    def to_json(self) -> str:
        """Return the certificate as the JSON text of its file."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Certificate:
        """Build a certificate from plain values: the inverse of :meth:`to_dict`.

        Raises:
            BpfreeError: another format, or something is missing.
        """
        if content.get("format") != FORMAT:
            raise BpfreeError(
                f"this certificate has format {content.get('format')!r}; this version reads {FORMAT}", fix="renew it with bpfree certify"
            )
        known = {item.name for item in dataclasses.fields(cls)}
        try:
            values = {key: value for key, value in content.items() if key in known}
            wrong = [key for key, kind in KINDS.items() if key in values and not isinstance(values[key], kind)]
            if wrong or not all(isinstance(word, str) for word in values.get("settings", ())):
                raise TypeError(f"{', '.join(wrong) or 'settings'} cannot be {values[(wrong or ['settings'])[0]]!r:.60}")
            made = cls(**{**values, "findings": [Finding(**finding) for finding in content["findings"]]})
        except (KeyError, TypeError) as error:
            raise BpfreeError(f"this is no certificate: {error}", fix=FIX) from error
        made._validate(content)
        return made

    def _validate(self, content: Mapping[str, Any]) -> None:
        """Refuse content that no examination writes.

        Raises:
            BpfreeError: another digest, a status or check that is unknown, or a check that is there twice.
        """
        given = [finding.id for finding in self.findings]
        faults = [
            f"the finding {finding.id!r} has the unknown status {finding.status!r}"
            for finding in self.findings
            if finding.status not in STATUSES
        ]
        faults += [f"{name!r} is no check" for name in given if name not in FULL]
        faults += [f"the check {name!r} is there twice" for name in sorted({name for name in given if given.count(name) > 1})]
        if content.get("digest") != digest_of({key: value for key, value in content.items() if key != "digest"}):
            faults.append("its content has another digest than it states, so it was changed after the examination")
        if faults:
            raise BpfreeError(f"this is no certificate as bpfree writes it: {faults[0]}", fix=FIX)


def digest_of(content: Mapping[str, Any]) -> str:
    """Hash a certificate's content in canonical form: JSON with sorted keys and no spaces, in UTF-8."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_certificate(path: Path) -> Certificate:
    """Read a file that :meth:`Certificate.to_json` wrote.

    Raises:
        BpfreeError: it cannot be read, or is no certificate.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BpfreeError(f"cannot read the certificate: {error}", where=str(path), fix=FIX) from error
    if not isinstance(content, dict):
        raise BpfreeError("this is no certificate", where=str(path), fix=FIX)
    try:
        return Certificate.from_dict(content)
    except BpfreeError as error:
        raise BpfreeError(error.what, where=str(path), fix=error.fix) from error
