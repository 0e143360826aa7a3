"""A certificate in words, for the terminal, pages and tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from bpfree.certify.certificate import Certificate
from bpfree.certify.findings import NEEDLESS
from bpfree.certify.heat import text_map
from bpfree.certify.pace import CLOCK
from bpfree.document.tables import text_pairs

__all__ = ["percent", "render", "step_times", "summary_rows"]

UNMEASURED = "unmeasured"
QUICK = (
    "Examined on small networks only: a rule that recognises these, trains outside of its steps, or learns slowly of weights above is seen "
    "by whole runs alone, which a full examination makes."
)


def summary_rows(certificate: Certificate) -> Iterator[tuple[str, str]]:
    """Return ``(name, value)`` of each measured property."""
    p = certificate.properties
    yield "rule", f"{certificate.rule} (plugin {certificate.plugin}, {certificate.distribution} {certificate.version})"
    if certificate.settings:
        yield "settings", " ".join(certificate.settings)
    yield from _measured(p)
    if certificate.remark:
        yield "", certificate.remark


def _measured(p: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the rows of what was measured; what was not has none."""
    for fork in p.get("run", {}).get("forks", []):
        name, lands = f"epochs {fork['from_epoch']} to {fork['to_epoch']}", "" if fork["lands_on_the_run"] else "does not land on the run: "
        yield name, f"{lands}{_said_of(fork['reading'], 'in forks of the run')}"
    if "dependence" in p or "whole_runs" in p:
        yield "credit", p["credit"]
    if "whole_runs" in p:
        yield "whole runs", _whole_runs(p["whole_runs"])
    if words := _specimen(p.get("specimens", {})):
        yield "structure", words
    if "dependence" in p:
        yield "dependence", f"{p['dependence']['name']}: {DEPENDENCE[p['dependence']['name']]}"
    if "reverse" in p:
        yield "reverse mode", _reverse(p)
    if p.get("silent_blocks"):
        yield "no update", ", ".join(p["silent_blocks"])
    if "passes" in p:
        yield "passes", "; ".join(f"{kind}: {_passes(found)}" for kind, found in p["passes"].items())
    if "memory" in p:
        yield "memory", _memory(p["memory"])
    if "time" in p and (times := step_times(p)):
        yield "time of a step", _time(times)
    if p.get("alignment", {}).get("early"):
        early, late = _cosines(p["alignment"]["early"]), _cosines(p["alignment"]["late"])
        yield "alignment", f"{early} early, {late} late (cosine with the true gradient)"
    if "learning" in p:
        yield "learning", _learning(p["learning"])
    for name, why in p.get("unmeasured", {}).items():
        yield f"no {name}", why


VERDICTS = {
    "reads": "reads the weights of {} above",
    "at construction": "is a function of the weights of {} above as they were before the first step",
    "executes": "finds out the weights of {} above by executing them",
    "statistics": "is scaled by the first weights of {} above",
    "unmeasured": "may read the weights of {} above (unmeasured)",
}


def _whole_runs(whole: dict[str, Any]) -> str:
    """Say what whole runs showed, in one line."""
    return f"unmeasured: {whole['trouble']}" if whole["trouble"] else _said_of(whole["reading"], "with its own settings")


def _said_of(reading: dict[str, Any], how_made: str) -> str:
    """Say what a matrix shows."""
    if reading["trouble"]:
        return f"unmeasured: {reading['trouble']}"
    blocks, found = reading["blocks"], []
    for verdict, words in VERDICTS.items():
        above = {name for row in reading["cells"].values() for name, cell in row.items() if cell["verdict"] == verdict}
        if above:
            found.append(words.format(", ".join(name for name in blocks if name in above)))
    nothing = "one block, with nothing above" if len(blocks) < 2 else "no block learns from weights above"
    how = "bit for bit" if reading["exact"] else f"relative changes above {reading['threshold']:.1g}"
    return f"{'; '.join(found) or nothing} ({reading['steps']} steps on {reading['task']} {how_made}, {how})"


def _specimen(specimens: dict[str, dict[str, Any]]) -> str:
    """Name the settings of the rule with which small networks were examined in place of its own."""
    parts = []
    for kind, settings in specimens.items():
        own = [f"{key}={value}" for key, value in settings.items() if key.startswith("rule.")]
        parts += [f"{kind}: {' '.join(own)}"] if own else []
    return f"measured with other settings of the rule: {'; '.join(parts)}" if parts else ""


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
    layers = f"; through {reverse['layers']} weight matrices at most" if reverse.get("layers", 0) > 1 else ""
    return f"{words}{layers}{'; forward mode' if p.get('forward_mode') else ''} (observed)"


def _memory(memory: dict[str, Any]) -> str:
    if memory["growth"] == "unmeasured":
        return "not measured against depth: the number of blocks is given by something else"
    slopes, depths = memory["activations_per_block"], memory["depths"]
    saved = "" if slopes["saved"] is None else f"; {abs(slopes['saved']):g} saved for backward"
    words = f"{memory['growth']} with depth: {abs(slopes['peak']):g} activations per block at the peak of a step{saved}"
    return f"{words} ({depths[0]} to {depths[-1]} blocks)"


def step_times(properties: dict[str, Any]) -> dict[str, float | None]:
    """Return seconds of a step over back-propagation's, by phase; ``None``: unmeasured, or not measured in processor time."""
    time = properties["time"]
    return {phase: value if time.get("clock") == CLOCK else None for phase, value in time["over_backprop"].items()}


def _passes(found: dict[str, float] | None) -> str:
    most = max(found.values()) if found else 0.0
    return f"{most:g} per example and step" if most else UNMEASURED


def _time(times: dict[str, float | None]) -> str:
    if all(value is None for value in times.values()):
        return UNMEASURED
    values = {name: UNMEASURED if value is None else f"{value:g}" for name, value in times.items()}
    parts = [f"{name}: {value}" for name, value in values.items()] if len(values) > 1 else list(values.values())
    return f"{', '.join(parts)} times back-propagation's on the same network (processor time)"


def _cosines(blocks: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in blocks.items())


def percent(accuracies: Sequence[float] | None) -> str:
    """Format the mean of accuracies in per cent, such as ``92.4``; ``-`` if there are none."""
    return f"{100 * statistics.mean(accuracies):.1f}" if accuracies else "-"


def _learning(learning: dict[str, Any]) -> str:
    parts = [f"{percent(learning['rule'])} % on {learning['task']}"]
    if "floor" in learning:
        parts += [f"floor {percent(learning['floor']['test'])} % ({learning['floor']['name']})"]
    if learning.get("features"):
        parts += [f"features read to convergence {percent(learning['features'])} %"]
    parts += [f"own-prediction twin {percent(learning['twin'])} %", f"back-propagation {percent(learning['backprop'])} %"]
    return f"{', '.join(parts)} ({len(learning['rule'])} seeds, {learning['epochs']} epochs; {learning['network']})"


def render(certificate: Certificate) -> Iterator[str]:
    """Return lines of text: properties, the map of downstream weights, findings, and the status."""
    yield from text_pairs(summary_rows(certificate))
    for kind, matrix in certificate.properties.get("downstream_weights", {}).get("matrices", {}).items():
        yield ""
        yield f"relative change of an update (row) with the weights of a block (column), forward values held; {kind}:"
        yield from text_map(matrix)
    for status in ("passed", "not shown", "unmeasured", "not applicable", "waived", "failed"):
        for finding in certificate.findings:
            if finding.status == status and (status != "passed" or finding.what.endswith(NEEDLESS)):
                yield ""
                yield from str(finding).splitlines()
    yield ""
    counts = ", ".join(f"{count} {status}" for status, count in certificate.counts.items())
    remark = f"; {certificate.remark}" if certificate.remark else ""
    if certificate.kind == "quick":
        yield QUICK
    yield f"{certificate.rule}: {certificate.status}{remark} ({counts}; {certificate.seconds:.0f} s)"
