"""A certificate as a page: one self-contained HTML file."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bpfree.certify.certificate import Certificate
from bpfree.certify.findings import Finding
from bpfree.certify.heat import heat_map
from bpfree.certify.show import summary_rows

__all__ = ["maps", "write_page"]

STYLE = """
:root{color-scheme:light}
body{font:15px/1.5 system-ui,sans-serif;color:#1c1e21;background:#fff;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin-top:2rem}.lead{font-size:1.1rem;color:#3a3f47;margin-top:0}
table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;padding:.35rem .6rem;border-bottom:1px solid #e3e5e8}
th{font-weight:600;white-space:nowrap}.scroll{overflow-x:auto}
.maps{display:flex;flex-wrap:wrap;gap:1rem}.maps svg{max-width:100%;height:auto}
.status{font-weight:600;white-space:nowrap}.passed{color:#1a7f37}.failed{color:#cf222e}.waived{color:#9a6700}.open{color:#5b616b}
.more{color:#5b616b;font-size:.9rem;overflow-wrap:anywhere}
code{font-size:.92em;background:#f1f2f4;padding:.05rem .3rem;border-radius:3px;
overflow-wrap:anywhere}
footer{margin-top:2rem;color:#5b616b;font-size:.9rem}
"""
TITLES = {"dependence": "all parameters changed", "downstream_weights": "weights changed, values held"}
COLOURS = {"passed": "passed", "failed": "failed", "waived": "waived"}


def write_page(path: Path, certificate: Certificate) -> Path:
    """Write the certificate as a page that opens offline."""
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in summary_rows(certificate))
    pictures = "".join(svg for _, svg in maps(certificate.properties))
    title = f"Certificate of {certificate.rule}"
    text = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p class="lead">{html.escape(_lead(certificate))}</p>
<div class="scroll"><table>{rows}</table></div>
{f'<h2>Whose weights an update needs</h2><div class="maps">{pictures}</div>' if pictures else ""}
{_legend() if pictures else ""}
<h2>Checks</h2><div class="scroll"><table><thead><tr><th>result</th><th>what holds</th></tr></thead><tbody>
{"".join(_finding(finding) for finding in certificate.findings)}</tbody></table></div>
<footer>{html.escape(_footer(certificate))} Again: <code>{html.escape(certificate.command)}</code></footer></body></html>
"""
    path.write_text(text, encoding="utf-8")
    return path


def _lead(certificate: Certificate) -> str:
    credit = f"credit: {certificate.properties.get('credit', 'not measured')}"
    return "; ".join(filter(None, (certificate.status, certificate.remark, credit)))


def maps(properties: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """``(name, SVG)`` of each heat map: ``dependence-dense`` and so on."""
    for key, title in TITLES.items():
        for kind, matrix in properties.get(key, {}).get("matrices", {}).items():
            yield (
                f"{key}-{kind}",
                heat_map(
                    f"{kind} network", title, matrix["blocks"], matrix["rows"], silent=matrix["silent"], above=key == "downstream_weights"
                ),
            )


def _legend() -> str:
    return """<p class="more">Each entry is the relative change of a block's update (row) when another block's parameters (column) are
changed, in double precision; empty: none, ?: could not be measured. In the second kind the change lies in the null space of the layer's
inputs, so that no forward value moves: what shows there is weight transport.</p>"""


def _finding(finding: Finding) -> str:
    kind = COLOURS.get(finding.status, "open")
    more = _lines(
        [
            finding.what,
            finding.where and f"where: {finding.where}",
            finding.fix and f"fix: {finding.fix}",
            finding.waiver and f"waived: {finding.waiver}",
        ]
    )
    return (
        f'<tr><td class="status {kind}">{finding.status}</td><td>{html.escape(finding.title)} <code>{finding.id}</code>'
        f'<div class="more">{more}</div></td></tr>\n'
    )


def _lines(texts: Iterable[str]) -> str:
    return "<br>".join(html.escape(text) for text in texts if text)


def _footer(certificate: Certificate) -> str:
    environment = certificate.environment
    place = ", ".join(f"{key} {environment[key]}" for key in ("bpfree", "torch", "python") if key in environment)
    return f"Measured {certificate.date} in {certificate.seconds:.0f} s on one thread of a CPU ({place})."
