"""Whether a rule is what it says: each declared trait against its measured value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from bpfree.certify.checks.check import Check
from bpfree.certify.findings import CheckFailed, Unmeasured
from bpfree.certify.interventions import Matrix, name_of_dependence
from bpfree.certify.measurements import DEPENDENCES, Measurements
from bpfree.certify.probe import Probe
from bpfree.certify.reverse import ObservedSteps
from bpfree.rule import Rule
from bpfree.step import Batch, Step

__all__ = ["CHECKS"]

TOLERANCE = 0.01


def _declaration(m: Measurements) -> str:
    return f"{m.subject.rule.__module__}.{m.subject.rule.__qualname__}.traits_of"


def _dependence(m: Measurements) -> str | None:
    """Check that the measured dependence equals the declared one, over the kinds of networks that the rule takes."""
    declared, measured = m.traits().dependence, m.dependence_name
    if declared == measured:
        return None
    wider = DEPENDENCES.index(measured) > DEPENDENCES.index(declared)
    kind = next(kind for kind, matrix in m.dependence.items() if name_of_dependence(matrix) == measured)
    pair = _offending(m.dependence[kind], declared) if wider else None
    what = f"it declares dependence={declared!r}, measured is {measured!r}"
    if pair:
        what += f": the update of block {pair[0]!r} changes with the parameters of block {pair[1]!r}"
    raise CheckFailed(what, where=_place(m, kind, pair, m.dependence[kind]), fix=f"declare dependence={measured!r}, or correct the rule")


def _offending(matrix: Matrix, declared: str) -> tuple[str, str] | None:
    """Return the farthest pair that a narrower dependence excludes."""
    allowed = {"independent": -len(matrix.blocks), "upstream": 0, "neighbours": 1}.get(declared, len(matrix.blocks))
    count = len(matrix.blocks)
    pairs = [(abs(j - i), i, j) for i in range(count) for j in range(count) if i != j and matrix.at(i, j) and j - i > allowed]
    return (matrix.blocks[max(pairs)[1]], matrix.blocks[max(pairs)[2]]) if pairs else None


def _place(m: Measurements, kind: str, pair: tuple[str, str] | None, matrix: Matrix) -> str:
    """Name where the trait is stated, and where it fails: phase, and the reverse-mode call that crosses both blocks, if any."""
    parts = [_declaration(m)]
    if pair:
        parts.append(f"update of {pair[0]!r} with {pair[1]!r} in phase {matrix.moments[pair[0]][pair[1]]!r} on {matrix.specimen}")
        crossing = _crossing(m.observations[kind].total(), pair)
        parts.append(f"reverse-mode call at {crossing}" if crossing else "no reverse-mode call crosses both: by forward mode or by hand")
    return "; ".join(parts)


def _crossing(observed_steps: ObservedSteps, pair: tuple[str, str]) -> str:
    return next((call.where for call in observed_steps.calls if set(pair) <= call.blocks), "")


def _downstream(m: Measurements) -> str | None:
    """Compare downstream weights, as far as the specimen's depth allows; local only if all pairs beyond the window were measured.

    Credit that changes only because feedback was scaled by a statistic of the weights above, when the rule was built, is reported as such.
    """
    remark = None
    for kind, matrix in m.downstream.items():
        declared = m.traits(kind).downstream_weights
        most = len(matrix.blocks) - 1
        window = most if declared == "all" else min(int(declared), most)
        if open_pairs := matrix.unmeasured(window):
            raise Unmeasured(f"not called local: {_why(matrix, open_pairs)}")
        if doubts := m.doubts(kind):
            raise Unmeasured(f"not called local: {doubts}")
        if (matrix.reach() or 0) > window and _only_scaled(m, window):
            remark = "something is scaled by a statistic of the first weights above, such as their norm; no update reads them otherwise"
        else:
            _compare_reach(m, kind, matrix, declared, window)
    return remark


def _only_scaled(m: Measurements, window: int) -> bool:
    """Tell whether whole runs show that nothing but a statistic of the first weights above counts."""
    reading = m.whole.reading
    others = reading.found("reads", "executes", "at construction", "unmeasured", beyond=window)
    return bool(reading.found("statistics")) and not others and not m.whole.trouble and not reading.trouble


def _why(matrix: Matrix, pairs: list[tuple[str, str]]) -> str:
    below, above = pairs[0]
    reason = matrix.reasons.get(above, "")
    return f"whether block {below!r} needs the weights of {above!r} could not be measured ({len(pairs)} pairs): {reason}"


def _compare_reach(m: Measurements, kind: str, matrix: Matrix, declared: int | str, window: int) -> None:
    measured, pair = matrix.reach() or 0, matrix.farthest()
    if measured > window and pair:
        raise CheckFailed(
            f"it declares downstream_weights={declared!r}, but the update of block {pair[0]!r} changes with the weights of block "
            f"{pair[1]!r} while every forward value stays (relative change {matrix.values[pair[0]][pair[1]]:.2g})",
            where=_place(m, kind, pair, matrix),
            fix=f"declare downstream_weights={_declared(measured, matrix)}, or cut what carries these weights to block {pair[0]!r}",
        )
    if measured < window - (declared == "all"):  # all, or all but the readout, whose loss a rule may keep to itself
        raise CheckFailed(
            f"it declares downstream_weights={declared!r}, measured is {measured} on a network of {len(matrix.blocks)} blocks",
            where=f"{_declaration(m)}; {matrix.specimen}",
            fix=f"declare downstream_weights={measured}, which is more local than the rule says of itself",
        )


def _declared(measured: int, matrix: Matrix) -> str:
    return "'all'" if measured == len(matrix.blocks) - 1 else str(measured)


def _reverse_span(m: Measurements) -> str | None:
    """Check that the measured span equals the declared one, and that every reverse-mode call is attributed to blocks."""
    for kind, observation in m.observations.items():
        observed_steps, declared = observation.total(), m.traits(kind).reverse_span
        if observed_steps.unattributed:
            call = observed_steps.unattributed[0]
            raise CheckFailed(
                f"unattributed reverse mode: {call.products} matrix products in a reverse-mode call that reaches no block and no parameter "
                "of the rule",
                where=call.where,
                fix="execute blocks as modules with their own weights, not with copies",
            )
        count = len(observation.moments[0].updates)
        expected = count if declared == "all" else min(int(declared), count)
        if observed_steps.span != expected:
            raise _wrong_span(m, observed_steps, declared, expected, kind)
    return "observed on the steps of the probe, not proved"


def _wrong_span(m: Measurements, observed_steps: ObservedSteps, declared: int | str, expected: int, kind: str) -> CheckFailed:
    widest = observed_steps.widest
    crossed = f" ({', '.join(sorted(widest.blocks))})" if widest and observed_steps.span else ""
    return CheckFailed(
        f"it declares reverse_span={declared!r}, but its widest reverse-mode call crosses {observed_steps.span} blocks{crossed}",
        where=f"{widest.where if widest and observed_steps.span > expected else _declaration(m)}; {kind} network",
        fix=f"declare reverse_span={_span_word(observed_steps.span, m, kind)}, or correct the rule",
    )


def _span_word(span: int, m: Measurements, kind: str) -> str:
    return "'all'" if span > 1 and span == len(m.observations[kind].moments[0].updates) else str(span)


def _supervision(m: Measurements) -> str | None:
    """Check which updates change with the labels: none, the readout's, or others too."""
    changing = [name for name, changes in m.label_sensitive.items() if changes]
    readout = m.build().network.readout
    measured = "none" if not changing else "readout" if changing == [readout] else "labels"
    declared = m.traits().supervision
    hidden = [name for name in m.label_sensitive if name != readout]
    if declared == measured or (declared == "labels" and measured == "readout" and set(hidden) <= set(m.silent)):
        return None
    raise CheckFailed(
        f"it declares supervision={declared!r}; updates that change with the labels: {', '.join(changing) or 'none'}",
        where=_declaration(m),
        fix=f"declare supervision={measured!r}, or keep the labels from these blocks",
    )


def _update(m: Measurements) -> str | None:
    """Check who moves the parameters: the optimiser after ``credit``, ``learn`` by ``step.apply``, or the rule itself."""
    declared, measured = m.traits().update, _observed_update(m)
    if declared == measured:
        return None
    raise CheckFailed(
        f"it declares update={declared!r}, measured is {measured!r}",
        where=_declaration(m),
        fix=f"declare update={measured!r}: accumulation and clipping are refused or allowed by it",
    )


def _observed_update(m: Measurements) -> str:
    moved = decides = False

    @contextmanager
    def watch(rule: Rule, batch: Batch, step: Step) -> Iterator[None]:
        nonlocal moved, decides
        calls: list[tuple[str, ...]] = []
        before = [p.detach().clone() for p in rule.parameters()]
        step.apply = lambda *names: calls.append(names)
        yield
        moved |= any(bool((p != q).any()) for p, q in zip(rule.parameters(), before, strict=True))
        decides |= calls != [()]

    Probe(m.subject, m.specimen(m.kind), dtype=m.dtype).run(watch=watch)
    return "in-place" if moved else "own-steps" if decides else "grad"


def _passes(m: Measurements) -> str | None:
    """Check that the passes of the block executed most equal the declared number."""
    remarks = []
    for kind, observation in m.observations.items():
        found = observation.passes()
        most = max(found.values())
        declared = m.traits(kind).passes
        if reason := observation.disagreement():
            raise Unmeasured(f"{reason} ({kind} network)")
        if abs(most - declared) > TOLERANCE:
            name = max(found, key=lambda block: found[block])
            raise CheckFailed(
                f"it declares passes={declared:g}, but {most:g} passes per example and step go forward through block {name!r}",
                where=f"{_declaration(m)}; {kind} network",
                fix=f"declare passes={most:g}; the tangent of forward mode is a pass of its own",
            )
        remarks.append(f"{kind}: {most:g}")
    return "; ".join(remarks)


CHECKS = [
    Check("trait-dependence", "whose parameters change a block's update is as declared", _dependence, waivable=False),
    Check(
        "trait-downstream-weights", "whose weights an update needs, with forward values held, is as declared", _downstream, waivable=False
    ),
    Check("trait-reverse-span", "blocks that one reverse-mode call crosses are as declared", _reverse_span, waivable=False),
    Check("trait-supervision", "what sees labels is as declared", _supervision, waivable=False),
    Check("trait-update", "who applies updates is as declared", _update, waivable=False),
    Check("trait-passes", "forward passes per example and step are as declared", _passes, waivable=False),
]
