"""Tables of the rows and their floors: three numbers and three verdicts for each row."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence

from bpfree.study.controls import ComparisonTable, difference_texts, error_legend
from bpfree.study.differences import Difference
from bpfree.study.examples import Scores
from bpfree.study.floors import FloorRecord, Floors, has_floor
from bpfree.study.report.view import View, compact
from bpfree.study.verdicts import Verdict, verdicts

__all__ = ["floor_finding", "floor_remarks", "floor_tables"]


def floor_tables(view: View, floors: Floors) -> list[ComparisonTable]:
    """Make the tables of numbers and of verdicts; none if no floor was measured."""
    found = verdicts(view.plan, view.rows, floors, view.measure)
    if not found:
        return []
    judged = [each for each in found if each.text]
    return [_numbers(view, found), *([_verdicts(view, judged)] if judged else [])]


def _labels(view: View, each: Verdict) -> list[str]:
    return [view.label(each.row), *([each.row.column] if view.labelled else [])]


def _headers(view: View) -> list[str]:
    return ["row", *(["column"] if view.labelled else [])]


# --- numbers ----------------------------------------------------------------------------------------------------------


def _numbers(view: View, found: Sequence[Verdict]) -> ComparisonTable:
    labels = _headers(view)
    headers = [f"own {view.measure.name}", "probed", "readout loses", "floor", "share of gap %", "operations to floor"]
    table = [[*_labels(view, each), *_row(view, each), _of(each)] for each in found]
    kept = [place for place in range(len(labels) + len(headers) + 1) if any(row[place] for row in table)]
    names = [*labels, *headers, "of"]
    shown = [[row[place] for place in kept] for row in table]
    numeric = range(len(labels), len(kept) - 1)
    return ComparisonTable([names[place] for place in kept], shown, numeric, _numbers_legend(view, found), "Beside the floor")


def _row(view: View, each: Verdict) -> list[str]:
    mean, probed, floor = (_mean(scores) for scores in (each.own, each.probed, each.floor.scores))
    lost = "" if mean is None or probed is None else view.measure.signed((probed - mean) * view.measure.metric.sign)
    texts = ["" if value is None else view.measure.text(value) for value in (mean, probed, floor)]
    least = "at least " if each.floor.at_least and texts[2] else ""
    return [texts[0], texts[1], lost, least + texts[2], _share(each), _operations(each)]


def _mean(scores: Scores) -> float | None:
    return statistics.fmean(scores.means.values()) if scores.means else None


def _share(each: Verdict) -> str:
    if each.share is None or not each.text:
        return ""
    share, interval = each.share
    return f"{100 * share:.0f}" + ("" if interval is None else f" ({100 * interval.low:.0f} to {100 * interval.high:.0f})")


def _operations(each: Verdict) -> str:
    if math.isnan(each.operations):
        return ""
    return "inf" if math.isinf(each.operations) else compact(each.operations)


def _of(each: Verdict) -> str:
    record = each.floor.record
    return f"{each.floor.name} ({record.network})" if each.floor.name == record.source and record.source != "inputs" else each.floor.name


def _numbers_legend(view: View, found: Sequence[Verdict]) -> str:
    text = (
        "Own: the rule's own prediction. Probed: its features read by logistic regression (ridge for real targets) that is solved. "
        "Readout loses: probed less own. Floor: the best such readout of the standardised inputs, of a block of the untrained network "
        "(same seeds), or of all together, chosen by mean validation over seeds. "
    )
    if any(not each.floor.record.chosen for each in found):
        text += "Without a validation split, the floor reads inputs and all blocks together, with the penalty 0.001. "
    if any(each.floor.at_least for each in found):
        text += "At least: some features were too large to be read, or a readout may not have converged. "
    if any(each.share is not None and each.text for each in found):
        text += (
            "Share of the gap: (own less floor) over (back-propagation on the same network, tuned alike, less floor), from means, with a "
            "95 % interval over seeds (Fieller); blank where the gap is below two points or three standard errors. "
        )
    if any(not math.isnan(each.operations) for each in found):
        text += (
            "Operations to floor: median, to the end of the first epoch whose validation is at the floor's; inf: at least half of the runs "
            "never reach it. "
        )
    return text + " ".join(_chance(view, found))


def _chance(view: View, found: Sequence[Verdict]) -> Iterator[str]:
    """Describe chance and the nearest class mean of each column."""
    for column in view.columns:
        record = next((each.floor.record for each in found if each.row.column == column and each.floor.record.chance is not None), None)
        if record is None or record.chance is None:
            continue
        where = f"{column}: chance" if column else "Chance"
        mean = "" if record.nearest_mean is None else f", nearest class mean of the inputs {100 * record.nearest_mean:.2f} %"
        yield f"{where} (the larger of 1/C and the largest class) {100 * record.chance:.2f} %{mean}."


# --- verdicts ---------------------------------------------------------------------------------------------------------


def _verdicts(view: View, judged: Sequence[Verdict]) -> ComparisonTable:
    kinds = ("features", "as delivered", "at equal budget")
    columns = {kind: found for kind in kinds if any(found := _all(judged, kind))}
    labels = _headers(view)
    table = [
        [*_labels(view, each), *(_difference(view, found[place]) for found in columns.values()), each.text]
        for place, each in enumerate(judged)
    ]
    numeric = range(len(labels), len(labels) + len(columns))
    return ComparisonTable([*labels, *columns, "verdict"], table, numeric, _verdicts_legend(view, judged, columns), "Verdicts")


def _all(judged: Sequence[Verdict], kind: str) -> list[Difference | None]:
    names = {"features": "features", "as delivered": "delivered", "at equal budget": "equal"}
    return [getattr(each, names[kind]) for each in judged]


def _difference(view: View, found: Difference | None) -> str:
    if found is None:
        return ""
    gain, error = difference_texts(found, view.measure)
    return f"{gain} +- {error}" if error else gain


def _verdicts_legend(view: View, judged: Sequence[Verdict], columns: Mapping[str, Sequence[Difference | None]]) -> str:
    text = "Features: probed less floor. As delivered: own less floor. "
    if any(each.equal is not None for each in judged):
        text += (
            "At equal budget: own less the own-prediction twin (everything but the readout recipe fixed), with the same trials and as many "
            "operations. "
        )
    tuned = any(each.row.tuned is not None and each.row.tuned.keys for each in judged)
    found = {kind: [each for each in columns[kind] if each is not None] for kind in columns}
    family = f"over the comparisons of each kind ({', '.join(f'{kind}: {len(each)}' for kind, each in found.items())}; Holm)"
    legend = error_legend([each for of_kind in found.values() for each in of_kind], conditional=tuned, family=family)
    return " ".join([text + "Positive: better.", legend, *_what_decides(view, found)])


def _what_decides(view: View, found: Mapping[str, Sequence[Difference]]) -> Iterator[str]:
    """State the smallest detectable differences, and the number of seeds that would detect one point."""
    sizes = {
        kind: sorted({view.measure.text(one.detectable) for one in each if one.detectable is not None}, key=float)
        for kind, each in found.items()
    }
    if any(sizes.values()):
        yield f"Detectable: {', '.join(f'{kind} {_range(texts)}' for kind, texts in sizes.items() if texts)}."
    if view.measure.metric.share and any(sizes.values()):
        seeds = {kind: sorted({one.seeds or math.inf for one in each if one.error is not None}) for kind, each in found.items()}
        told = {kind: ["none" if math.isinf(one) else f"{one}" for one in each] for kind, each in seeds.items() if each}
        yield f"Seeds for 1 point: {', '.join(f'{kind} {_range(texts)}' for kind, texts in told.items())}."


def _range(texts: Sequence[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{texts[0]} to {texts[-1]}"


def floor_finding(found: Sequence[ComparisonTable]) -> str:
    """Say in a sentence which rows are above their floors; the empty string without verdicts."""
    verdicts = next((section for section in found if section.title == "Verdicts"), None)
    if verdicts is None:
        return ""
    by_text: dict[str, list[str]] = {}
    place = verdicts.headers.index("column") if "column" in verdicts.headers else None
    if place is not None and len({cells[place] for cells in verdicts.table}) == 1:
        place = None
    for cells in verdicts.table:
        by_text.setdefault(cells[-1], []).append(cells[0] + ("" if place is None or not cells[place] else f" [{cells[place]}]"))
    return "Beside the floor: " + "; ".join(f"{text}: {', '.join(rows)}" for text, rows in by_text.items()) + "."


def floor_remarks(view: View, floors: Floors) -> Iterator[str]:
    """Report floors that were not measured, and readouts that did not converge."""
    if not view.measure.of_predictions:
        if any(has_floor(row.cells[0]) for row in view.rows):
            yield f"No row has a floor: floors are measured in accuracy or loss, and the table reports the {view.measure.name}."
        return
    missing = [row.label for row in view.rows if row.finished and has_floor(row.cells[0]) and floors.of(row, view.rows) is None]
    if missing:
        yield f"The floor was not measured for {', '.join(missing)}."
    records: dict[int, FloorRecord] = {id(known): known for row in view.rows if (known := floors.of(row, view.rows)) is not None}
    for record in records.values():
        if record.gradient > 1.001e-4 and not record.real:
            yield f"A readout of the floor of {record.network} did not converge: its gradient is {record.gradient:.1e}, more than 1e-4."
        if record.skipped:
            yield f"Too large to be read for the floor of {record.network}: {', '.join(record.skipped)}."
