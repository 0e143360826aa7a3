"""A certificate as a page: one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bpfree.certify.certificate import Certificate
from bpfree.certify.findings import Finding
from bpfree.certify.heat import figure
from bpfree.certify.show import summary_rows
from bpfree.document.content import Cell, Code, Noted, Section, Table, Text
from bpfree.document.page import html_page
from bpfree.files import write_text

__all__ = ["sections", "write_page"]

KINDS = {"passed": "good", "failed": "bad"}


def write_page(path: Path, certificate: Certificate) -> Path:
    """Write the certificate as a page that opens offline."""
    write_text(path, html_page(f"Certificate of {certificate.rule}", list(sections(certificate))))
    return path


def sections(certificate: Certificate) -> Iterator[Section]:
    """Return the page's sections: measurements, the update's weights, findings of the checks, and the command to measure again."""
    credit = f"credit: {certificate.properties.get('credit', 'not measured')}"
    lead = "; ".join(filter(None, (certificate.status, certificate.remark, credit)))
    yield Section("", [Text(lead, "lead"), Table([], list(summary_rows(certificate)), [1], "Properties")])
    maps = figure(certificate.properties)
    if maps.panels:
        yield Section("Whose weights an update needs", [maps])
    yield Section("Checks", [Table(["result", "what holds", "check"], [*map(_row, certificate.findings)], [1, 2], "Checks")])
    environment = certificate.environment
    place = ", ".join(f"{key} {environment[key]}" for key in ("bpfree", "torch", "python") if key in environment)
    measured = f"Measured {certificate.date} in {certificate.seconds:.0f} s on one thread of a CPU ({place})."
    yield Section("Measure it again", [Text(measured, "note"), Code([certificate.command])])


def _row(finding: Finding) -> list[Cell]:
    told = [("", finding.what), ("where: ", finding.where), ("fix: ", finding.fix), ("waived: ", finding.waiver)]
    what = Noted(finding.title, [f"{name}{text}" for name, text in told if text])
    return [Noted(finding.status, kind=KINDS.get(finding.status, "open")), what, finding.id]
