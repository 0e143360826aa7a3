"""Methods of a study in sentences that a paper can take: data, training, tuning, selection, statistics, software."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from bpfree.document.content import Part, Section, Table, Text
from bpfree.study.model import Choices, Domain, Range
from bpfree.study.report.remarks import budget_text, counted_noun, data_text, environments, selected_text, software, without_shorter
from bpfree.study.report.view import View
from bpfree.study.rows import TableRow, listed

__all__ = ["methods"]


def methods(view: View) -> Section:
    """Make the section: paragraphs, and the devices and versions of the finished cells."""
    told = [" ".join(_data(view)), " ".join(_training(view)), _tuning(view), " ".join(_statistics(view))]
    parts: list[Part] = [Text(text) for text in told if text]
    found = environments(view.rows)
    if found:
        parts.append(Table(["environment", "cells"], [[text, f"{count}"] for text, count in found.items()], [], "Environments"))
    plugins = {f"{tags['plugin']} {tags.get('plugin_version', '')}".strip() for tags in _tags(view.rows) if tags.get("plugin")}
    if plugins:
        parts.append(Text(f"Rules from: {', '.join(sorted(plugins))}."))
    return Section("Methods", parts)


def _tags(rows: Iterable[TableRow]) -> Iterator[Mapping[str, str]]:
    return (record.tags for row in rows for record in row.finished)


def _told(view: View, text: Mapping[TableRow, str] | Sequence[tuple[TableRow, str]]) -> str:
    """Join texts of rows: one if it is the same for all, otherwise each with its rows."""
    by_text: dict[str, list[str]] = {}
    for row, each in text.items() if isinstance(text, Mapping) else text:
        if each:
            by_text.setdefault(each, []).append(row.label)
    if len(by_text) == 1:
        return next(iter(by_text))
    most = max(by_text, key=lambda each: len(by_text[each]), default="")
    others = [f"{each} ({', '.join(labels)})" for each, labels in by_text.items() if each != most]
    return "; ".join([*others, f"{most} (all others)"])


# --- data -----------------------------------------------------------------------------------------------------------------


def _data(view: View) -> Iterator[str]:
    found: dict[str, set[str]] = {}
    for row in view.rows:
        digests = {tags["data_fingerprint"] for tags in _tags([row]) if tags.get("data_fingerprint")}
        found.setdefault(data_text(row), set()).update(digests)
    texts = []
    for text in without_shorter(found):
        known = sorted({digest for other in found if other == text or text.startswith(f"{other} (") for digest in found[other]})
        texts.append(text + (f", digest {', '.join(known)}" if known else ""))
    yield f"Data: {'; '.join(texts)}."
    if any(found.values()):
        yield "A digest is the beginning of the SHA-256 of all examples of all splits."


# --- training -------------------------------------------------------------------------------------------------------------


def _training(view: View) -> Iterator[str]:
    rows = [row for row in view.rows if not row.cells[0].recipe.is_program]
    if rows:
        yield f"Budget: {_told(view, [(row, budget_text(row)) for row in rows])}."
        yield f"Batches: {_told(view, [(row, f'{row.cells[0].recipe.settings.batch_size} examples') for row in rows])}."
        yield f"Optimisers: {_told(view, [(row, _optimizer(row)) for row in rows])}."
        yield f"Networks: {_told(view, [(row, _first_tag(row, 'network') or row.cells[0].recipe.names['network']) for row in rows])}."
        yield f"{_told(view, [(row, selected_text(row)) for row in rows])}."
    count = len(view.plan.seeds)
    yield (
        f"{counted_noun(count, 'repetition')[0].upper()}{counted_noun(count, 'repetition')[1:]} (seed"
        f"{'' if count == 1 else 's'} {', '.join(map(str, view.plan.seeds))}): a seed fixes the order of the data, the same for all rows, "
        "and the initialisation and noise of each rule."
    )


def _first_tag(row: TableRow, key: str) -> str:
    return next((record.tags[key] for record in row.finished if record.tags.get(key)), "")


def _optimizer(row: TableRow) -> str:
    """Describe the optimiser of a row with its rate, the rule's own where none is set."""
    recipe = row.cells[0].recipe
    rule, options = recipe.registry.get("rules", recipe.names["rule"]), recipe.options["rule"]
    config = recipe.settings.optimizer.over(rule.optimizer_of(options))
    in_place = rule.traits_of(options).update == "in-place"
    name = "the rule's own updates in place" if in_place else _first_tag(row, "optimizer") or config.name
    return name if config.lr is None else f"{name}, rate {config.lr:.4g}"


# --- tuning ---------------------------------------------------------------------------------------------------------------


def _tuning(view: View) -> str:
    tune = view.plan.study.tune
    tuned = [row for row in view.rows if row.tuned is not None and row.tuned.keys]
    if tune is None or not tuned:
        return "No setting was tuned in this study." if not tuned else ""
    spaces = _told(view, [(row, ", ".join(f"{key} {_domain(domain)}" for key, domain in row.written.space.items())) for row in tuned])
    search = {"quasi-random": "quasi-random search (scrambled Sobol points)", "tpe": "tree-structured Parzen estimators"}[tune.search]
    seeds = f"seed{'' if len(tune.seeds) == 1 else 's'} {', '.join(map(str, tune.seeds))}"
    text = (
        f"Tuning: {counted_noun(tune.trials, 'trial')} for each row and column by {search}, scored on validation with the tuning {seeds}; "
        f"the first trial has the settings as written. Searched: {spaces}."
    )
    if tune.settings:
        text += f" Trials have {', '.join(f'{key}={value}' for key, value in tune.settings.items())}."
    edges = [f"{row.label} ({', '.join(row.tuned.at_edge)})" for row in tuned if row.tuned is not None and row.tuned.at_edge]
    return text + (f" Chosen at the edge of what was tried: {', '.join(edges)}." if edges else "")


def _domain(domain: Domain) -> str:
    match domain:
        case Range(low, high, log):
            return f"from {low:g} to {high:g}{' (logarithmic)' if log else ''}"
        case Choices(values):
            return f"among {listed([str(value) for value in values])}"


# --- statistics ----------------------------------------------------------------------------------------------


def _statistics(view: View) -> Iterator[str]:
    over = " and over test examples" if any(view.over_examples(row) for row in view.rows) else ""
    yield f"Reported: mean {view.measure.name} over seeds, with 95 % intervals over seeds{over}; differences are paired by seed."
    made = software(view.rows)
    if made:
        yield f"Software: {made}."
    sources = {f"{name} {digest[:12]}": None for row in view.rows for name, digest in _sources(row)}
    if sources:
        yield f"Sources, as digests: {', '.join(sources)}."


def _sources(row: TableRow) -> Iterator[tuple[str, str]]:
    for record in row.finished:
        yield from sorted(record.key.identity.get("sources", {}).items())
