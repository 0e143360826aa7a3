"""Expand grids, rules x networks x tasks, to the rows and columns of a table.

A rule that takes a network has a row for each of the study's networks; one with a network of its own (``Rule.brings_network``, or settings
of ``network`` in its entry) has one. A task is a column. A *preset* stands for a rule with settings that a plugin ships for it.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bpfree.code_files import placed, shown
from bpfree.config import resolve
from bpfree.errors import BpfreeError, UsageError, did_you_mean
from bpfree.leaves import canonical, leaves_of
from bpfree.plugins import Plugins

__all__ = ["GRID_KEYS", "GridRow", "expand"]

logger = logging.getLogger("bpfree")

GRID_KEYS = ("rules", "networks", "tasks", "exclude")
KINDS = ("rule", "program", "preset", "presets")
"""Keys of which an entry of the rules has exactly one."""
RULE_KEYS = ("rule", "program", "preset", "presets", "label", "settings", "published", "tune")
NETWORK_KEYS = ("label", "settings")
TASK_KEYS = ("label", "settings", "target")

Note = Callable[[str | BpfreeError], None]


def unknown(kind: str, name: Any, known: Sequence[str], where: str) -> UsageError:
    """Make the error for a name that a part of a study does not have."""
    fix = did_you_mean(str(name), known) or "use one of the known names"
    return UsageError(f"unknown {kind} {name!r}", where=where, fix=fix, known=known)


class GridRow(dict[str, Any]):
    """A row that a grid makes.

    Attributes:
        shared: keys of its settings that are the grid's network's.
        without: keys of the grid's networks that do not reach it, because its rule brings a network.
    """

    shared: Sequence[str] = ()
    without: Sequence[str] = ()


@dataclass
class _Item:
    """A rule, network or task of the grid."""

    label: str
    settings: dict[str, Any]
    more: dict[str, Any] = field(default_factory=dict)
    own_network: bool = False
    brings_network: bool = False


def expand(content: Mapping[str, Any], registry: Plugins, note: Note, folder: Path | None = None) -> dict[str, Any]:
    """Replace the grid of a file by ``rows`` and ``columns``; return a file without a grid unchanged.

    Args:
        content: of the study file.
        registry: of rules and presets.
        note: called with each problem.
        folder: to which paths of code belong; ``None``: the current one.
    """
    if not any(key in content for key in GRID_KEYS):
        return dict(content)
    both = [key for key in ("rows", "columns") if key in content]
    if both:
        note(f"a study has either rows and columns or rules, networks and tasks: remove {' and '.join(both)} or the grid")
    grid = _Grid(registry, note, folder)
    rules = [entry for node in _listed(content, "rules", note) for entry in grid.rules(node)]
    networks = [grid.entry(node, "network", NETWORK_KEYS) for node in _listed(content, "networks", note)]
    tasks = [grid.entry(node, "task", TASK_KEYS) for node in _listed(content, "tasks", note)]
    if not rules:
        note("a grid needs rules: a list of names, or of mappings with the key rule, preset or presets")
    excluded = _Excluded(content, [rules, networks, tasks], note)
    kept = {key: value for key, value in content.items() if key not in GRID_KEYS}
    kept["columns"] = [{"label": task.label, "settings": task.settings, **task.more} for task in tasks] or None
    kept["rows"] = list(_rows(rules, networks, tasks, excluded))
    return kept


def _listed(content: Mapping[str, Any], key: str, note: Note) -> list[Any]:
    value = content.get(key)
    if value is not None and not isinstance(value, list):
        note(f"{key}: must be a list, not {value!r}")
    return value if isinstance(value, list) else []


def _rows(rules: Sequence[_Item], networks: Sequence[_Item], tasks: Sequence[_Item], excluded: _Excluded) -> Iterator[dict[str, Any]]:
    for rule in rules:
        own = rule.own_network or not networks
        for network in [None] if own else networks:
            label = rule.label if network is None or len(networks) == 1 else f"{rule.label} ({network.label})"
            row = GridRow(label=label, settings={**(network.settings if network else {}), **rule.settings}, **rule.more)
            row.shared = [key for key in (network.settings if network else {}) if key not in rule.settings]
            if rule.brings_network:
                row.without = list(dict.fromkeys(canonical(key, value) for each in networks for key, value in each.settings.items()))
            if tasks:
                row["columns"] = [t.label for t in tasks if not excluded.holds(rule.label, network.label if network else None, t.label)]
                if isinstance(published := row.get("published"), dict):
                    row["published"] = {column: numbers for column, numbers in published.items() if column in row["columns"]}
            elif excluded.holds(rule.label, network.label if network else None, None):
                continue
            if row.get("columns") != []:
                yield row


class _Grid:
    """Reads the entries of a grid."""

    def __init__(self, registry: Plugins, note: Note, folder: Path | None) -> None:
        self._registry, self._note, self._folder = registry, note, folder

    def entry(self, node: Any, kind: str, keys: Sequence[str]) -> _Item:
        """Read an entry: a name, or a mapping with a label and settings."""
        if isinstance(node, str):
            return _Item(shown(node), {kind: node})
        if not isinstance(node, dict):
            self._note(f"{kind}s: must be a name, or a mapping of {', '.join(keys)}, not {node!r}")
            return _Item("", {})
        self._check(node, f"{kind} {node.get('label', '')}".strip(), keys)
        settings = self._settings(node, f"{kind} {node.get('label', '')}".strip())
        named = settings.get(kind, settings.get(f"{kind}.name", ""))
        return _Item(str(node.get("label", shown(str(named)))), settings, {key: node[key] for key in keys[2:] if key in node})

    def rules(self, node: Any) -> Iterator[_Item]:
        """Read the rules that an entry stands for."""
        if isinstance(node, str):
            node = {"rule": node}
        if not isinstance(node, dict) or sum(key in node for key in KINDS) != 1:
            self._note(f"rules: must be a name, or a mapping with one of rule, program, preset and presets, not {node!r}")
            return
        where = f"rule {node.get('label') or next(node[key] for key in KINDS if key in node)}"
        self._check(node, where, RULE_KEYS)
        own = self._settings(node, where)
        if any(key in ("rule", "rule.name", "program", "program.name") for key in own):
            self._note(f"{where}: settings: rule names another rule than the entry")
        if "program" in node:
            name, more = str(node["program"]), {key: node[key] for key in ("published", "tune") if key in node}
            yield _Item(str(node.get("label") or name), {"program": name, **own}, more, own_network=True, brings_network=True)
            return
        found = [(name, {**self._flat(settings, where), **own}) for name, settings in self._named(node, where)]
        rules = [str(merged.get("rule", merged.get("rule.name", ""))) for _, merged in found]
        for (name, merged), rule in zip(found, rules, strict=True):
            short = (
                name.rpartition("/")[2] if rules.count(rule) > 1 else shown(rule)
            )  # several presets of one rule are labelled by their own names
            label = str(node.get("label") or (short if "presets" in node else name))
            more = {key: node[key] for key in ("published", "tune") if key in node}
            named = any(key.split(".")[0] == "network" for key in merged)
            brings = self._brings_network(rule, where)
            yield _Item(label, merged, more, brings or named, brings and not named)

    def _named(self, node: Mapping[str, Any], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """List ``(name, settings)`` of the rule, the preset, or every installed preset that matches the pattern."""
        if "rule" in node:
            yield shown(str(node["rule"])), {"rule": str(node["rule"])}
            return
        known = self._registry.names("presets")
        if "presets" in node:
            found = [name for name in known if fnmatch.fnmatchcase(name, str(node["presets"])) and self._is_right(name)]
            yield from ((name, dict(self._registry.get("presets", name))) for name in found)
            return
        try:
            yield str(node["preset"]), dict(self._registry.get("presets", str(node["preset"]), where=where))
        except UsageError as error:
            self._note(error.at(where))

    def _is_right(self, preset: str) -> bool:
        """Tell whether a preset's settings fit its rule; otherwise log it, so that one plugin's mistake does not refuse the study."""
        try:
            resolve(self._registry.get("presets", preset), self._registry)
        except UsageError as error:
            owner = self._registry.owner("presets", preset).name
            logger.warning("the preset %s of the plugin %s is left out: %s", preset, owner, "; ".join(error.problems))
            return False
        return True

    def _brings_network(self, name: str, where: str) -> bool:
        try:
            return bool(self._registry.get("rules", placed(name, self._folder), where=where).brings_network)
        except UsageError as error:
            self._note(error.at(where))
            return True

    def _settings(self, node: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Read settings by dotted key, so that those of a rule and of its preset or network can be compared."""
        settings = node.get("settings")
        if settings is not None and not isinstance(settings, dict):
            self._note(f"{where}: settings: must be a mapping of settings to values, not {settings!r}")
        return self._flat(settings, where) if isinstance(settings, dict) else {}

    def _flat(self, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        try:
            for leaf in leaves_of(settings, "", where):
                if leaf.key in found:
                    self._note(f"{where}: settings: {leaf.key} is given twice")
                found[leaf.key] = leaf.value
        except UsageError as error:
            self._note(f"{where}: settings: {error.what}")
        return found

    def _check(self, node: Mapping[str, Any], where: str, keys: Sequence[str]) -> None:
        for key in node:
            if key not in keys:
                self._note(unknown("key", key, keys, where))


class _Excluded:
    """Combinations that the grid leaves out: mappings of any of rule, network and task to labels."""

    def __init__(self, content: Mapping[str, Any], axes: Sequence[Sequence[_Item]], note: Note) -> None:
        labels = dict(zip(("rule", "network", "task"), ([entry.label for entry in axis] for axis in axes), strict=True))
        self._combinations: list[dict[str, list[str]]] = []
        for node in _listed(content, "exclude", note):
            if not isinstance(node, dict) or not node or not node.keys() <= labels.keys():
                note(f"exclude: must be mappings of rule, network and task to labels, not {node!r}")
                continue
            chosen = {axis: list(map(str, value if isinstance(value, list) else [value])) for axis, value in node.items()}
            for axis, names in chosen.items():
                for name in names:
                    if name not in labels[axis]:
                        note(unknown(axis, name, labels[axis], "exclude"))
            self._combinations.append(chosen)

    def holds(self, rule: str, network: str | None, task: str | None) -> bool:
        """Tell whether a cell is excluded."""
        cell = {"rule": rule, "network": network, "task": task}
        return any(all(cell[axis] in names for axis, names in chosen.items()) for chosen in self._combinations)
