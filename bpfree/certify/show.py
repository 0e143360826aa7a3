"""A certificate in words, for the terminal, pages and tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from bpfree.certify.certificate import Certificate
from bpfree.certify.findings import NEEDLESS
from bpfree.certify.heat import text_map

__all__ = ["render", "summary_rows"]


def summary_rows(certificate: Certificate) -> Iterator[tuple[str, str]]:
    """``(name, value)`` of each measured property."""
    p = certificate.properties
    yield "rule", f"{certificate.rule} (plugin {certificate.plugin}, {certificate.distribution} {certificate.version})"
    if certificate.settings:
        yield "settings", " ".join(certificate.settings)
    if "dependence" not in p:
        return
    yield "credit", p["credit"]
    yield "dependence", f"{p['dependence']['name']}: {DEPENDENCE[p['dependence']['name']]}"
    yield "reverse mode", _reverse(p)
    if p["silent_blocks"]:
        yield "no update", ", ".join(p["silent_blocks"])
    yield "passes", "; ".join(f"{kind}: {max(found.values()):g} per example and step" for kind, found in p["passes"].items())
    yield "memory", _memory(p["memory"])
    if p["time"]["over_backprop"]:
        yield "time of a step", _time(p["time"]["over_backprop"])
    if p["alignment"].get("early"):
        yield (
            "alignment",
            f"{_cosines(p['alignment']['early'])} early, {_cosines(p['alignment']['late'])} late (cosine with the true gradient)",
        )
    if "learning" in p:
        yield "learning", _learning(p["learning"])


DEPENDENCE = {
    "independent": "an update changes with its own block's parameters only",
    "upstream": "an update also changes with the parameters of blocks below",
    "neighbours": "an update also changes with the parameters of the next block above",
    "all": "an update changes with the parameters of every block",
}


def _reverse(p: dict[str, Any]) -> str:
    reverse = p["reverse"]
    if not reverse["span"]:
        words = "no reverse-mode call"
    elif reverse["span"] == reverse["of_blocks"] > 1:
        words = f"end to end, through all {reverse['span']} blocks"
    else:
        words = f"inside {reverse['span']} block{'s' * (reverse['span'] > 1)} at a time, {reverse['calls_per_step']:g} calls per step"
    return f"{words}{'; forward mode' if p['forward_mode'] else ''} (observed)"


def _memory(memory: dict[str, Any]) -> str:
    if memory["growth"] == "unmeasured":
        return "not measured against depth: the number of blocks is given by something else"
    slopes, depths = memory["activations_per_block"], memory["depths"]
    saved = "" if slopes["saved"] is None else f"; {abs(slopes['saved']):g} saved for backward"
    words = f"{memory['growth']} with depth: {abs(slopes['peak']):g} activations per block at the peak of a step{saved}"
    return f"{words} ({depths[0]} to {depths[-1]} blocks)"


def _time(times: dict[str, float]) -> str:
    parts = [f"{name}: {value:g}" for name, value in times.items()] if len(times) > 1 else [f"{next(iter(times.values())):g}"]
    return f"{', '.join(parts)} times back-propagation's on the same network"


def _cosines(blocks: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in blocks.items())


def _learning(learning: dict[str, Any]) -> str:
    rule, twin, backprop = (100 * statistics.mean(learning[key]) for key in ("rule", "twin", "backprop"))
    return (
        f"{rule:.1f} % on {learning['task']}, frozen twin {twin:.1f} %, back-propagation {backprop:.1f} % "
        f"({len(learning['rule'])} seeds, {learning['epochs']} epochs; {learning['network']})"
    )


def render(certificate: Certificate) -> Iterator[str]:
    """Lines: properties, the map of downstream weights, what was found, the verdict."""
    for name, value in summary_rows(certificate):
        yield f"{name.ljust(16)}{value}"
    for kind, matrix in certificate.properties.get("downstream_weights", {}).get("matrices", {}).items():
        yield ""
        yield f"relative change of an update (row) with the weights of a block (column), forward values held; {kind}:"
        yield from text_map(matrix)
    for status in ("passed", "unmeasured", "not applicable", "waived", "failed"):
        for finding in certificate.findings:
            if finding.status == status and (status != "passed" or finding.what.endswith(NEEDLESS)):
                yield ""
                yield from str(finding).splitlines()
    yield ""
    counts = ", ".join(f"{count} {status}" for status, count in certificate.counts.items())
    yield f"{certificate.rule}: {certificate.status} ({counts}; {certificate.seconds:.0f} s)"
