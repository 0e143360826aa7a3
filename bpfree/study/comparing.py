"""Make a comparison of rules a study, with the linear classifier, own-prediction twins and back-propagation as references."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from bpfree.code_files import shown
from bpfree.errors import UsageError
from bpfree.leaves import Leaf, canonical, leaf_at, parse_words
from bpfree.plugins import Plugins, installed_plugins
from bpfree.redaction import redact_word
from bpfree.rule import Rule
from bpfree.study.cells import is_scientific
from bpfree.study.fingerprints import digest
from bpfree.study.model import Column, Row, Study

__all__ = ["comparison", "leaves_in"]


def comparison(
    words: Sequence[str], common: Sequence[Leaf], *, seeds: int = 3, references: bool = True, jobs: int = 1, registry: Plugins | None = None
) -> Study:
    """Make the study that compares these rules, the floor first and the ceiling last.

    Settings of ``network`` reach the rules that take a network; one with a network of its own takes them in its own word.

    Args:
        words: ``RULE`` or ``RULE,KEY=VALUE,...`` for settings of that row alone.
        common: settings of all rows.
        seeds: how many.
        references: add the linear classifier, the own-prediction twin of each rule, and back-propagation.
        jobs: cells at a time.

    Raises:
        UsageError: an unknown rule, or none.
    """
    registry = registry or installed_plugins()
    asked = {redact_word(word): _settings(word, registry) for word in words}
    if len(asked) < len({*words}):
        raise UsageError(
            "rules differ only in the query of an address, which is not shown", fix="write a study file with a label for each row"
        )
    if not asked:
        raise UsageError("no rule to compare", fix="name at least one; bpfree rules lists them")
    rows, controls = dict(asked), list[str]()
    if references:
        own = {label: settings for label, settings in asked.items() if label not in ("linear", "frozen", "backprop")}
        twins = dict(_twin(label, settings, registry) for label, settings in own.items())
        rows = {"linear": {"rule": "linear"}, "frozen": {"rule": "frozen"}, **twins, **own, "backprop": {"rule": "backprop"}}
        bare = any(not _reads_out(_rule(settings, registry)) for settings in own.values())  # a twin without a readout may score at chance
        controls = [*(["linear"] if bare else []), "frozen", *(label for label in twins if label != "frozen")]
    if any(leaf.key in ("rule", "rule.name") for leaf in common):
        raise UsageError("rule cannot be a common setting of a comparison", where="rule", fix="name each rule as a word of its own")
    shared = {leaf.key: leaf.value for leaf in common if leaf.key.split(".")[0] != "network"}
    networks = {leaf.key: leaf.value for leaf in common if leaf.key not in shared}
    return Study(
        # only scientific settings count, so that the same comparison finds its cells again
        name=f"compare-{digest([rows, {key: value for key, value in shared.items() if is_scientific(key)}, networks])[:8]}",
        title=f"{', '.join(asked)} on {shown(str(shared.get('task', shared.get('task.name', 'digits'))))}",
        paper="",
        notes="",
        settings=shared,
        seeds=list(range(seeds)),
        columns=[Column()],
        rows=[_row(label, settings, networks, registry) for label, settings in rows.items()],
        controls=controls,
        jobs=jobs,
    )


def leaves_in(word: str) -> list[Leaf]:
    """Read the rule and its settings from a word ``RULE,KEY=VALUE,...``."""
    name, *settings = re.split(r",(?![^\[{]*[\]}])", word)  # not at commas inside brackets
    return [leaf_at(Leaf("rule", name, "command line", word=True)), *parse_words(settings)]


def _settings(word: str, registry: Plugins) -> dict[str, Any]:
    named, *settings = leaves_in(word)
    name = str(named.value)
    registry.get("rules", name, where="command line")
    own = {leaf.key: leaf.value for leaf in settings}
    if not own.keys().isdisjoint(("rule", "rule.name")):
        raise UsageError(f"{word!r} names two rules", where="command line", fix="name each rule as a word of its own")
    return {"rule": name, **own}


def _row(label: str, settings: Mapping[str, Any], networks: Mapping[str, Any], registry: Plugins) -> Row:
    """Make a row with the settings of the common network, unless its rule brings its own network."""
    if not _rule(settings, registry).brings_network:
        return Row(label, {**networks, **settings}, {"": {}}, {}, shared=[key for key in networks if key not in settings])
    named = any(key.split(".")[0] == "network" for key in settings)
    return Row(label, settings, {"": {}}, {}, without=[] if named else [canonical(key, value) for key, value in networks.items()])


def _rule(settings: Mapping[str, Any], registry: Plugins) -> type[Rule]:
    rule: type[Rule] = registry.get("rules", settings["rule"])
    return rule


def _reads_out(rule: type[Rule]) -> bool:
    """Tell whether a rule trains a readout; a rule that predicts by goodness, norms or clusters does not."""
    return rule.traits_of(rule.Config()).readout == "required"


def _twin(label: str, settings: Mapping[str, Any], registry: Plugins) -> tuple[str, dict[str, Any]]:
    """Name the twin of a rule and its settings: ``frozen`` for plain rules on the common network, otherwise a twin of the rule's own."""
    rule = _rule(settings, registry)
    own = getattr(rule.network_options, "__func__", None) is not Rule.network_options.__func__  # type: ignore[attr-defined]
    if not own and len(settings) == 1:
        return "frozen", {"rule": "frozen"}
    return f"{label} (twin)", {**settings, "twin": True}
