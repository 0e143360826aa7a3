"""Entries of the registry, which describe a plugin in a TOML file."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from bpfree.errors import BpfreeError
from bpfree.hooks import API_VERSION
from bpfree.plugins import PluginRecord, Plugins
from bpfree.registry.folder import registry_folder
from bpfree.registry.schema import schema_problems

__all__ = ["Entry", "entry_of", "read_entries", "read_entry", "to_toml"]

SAID_BY_PEOPLE = ("summary", "repository", "status", "results")
"""Fields that cannot be read from an installed plugin."""


@dataclass(frozen=True)
class Entry:
    """An entry of the registry, whose fields ``schema.json`` describes."""

    name: str
    distribution: str
    summary: str
    rules: list[str]
    papers: list[str]
    licence: str
    repository: str
    api: list[int]
    status: str
    added: str
    results: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Convert the entry to plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str = "") -> Entry:
        """Make an entry of plain values, checked against the schema.

        Raises:
            BpfreeError: naming every fault.
        """
        faults = [f"{place} {fault}" if place else fault for place, fault in schema_problems(dict(content), schema())]
        if faults:
            what = f"the entry does not fit the schema: {'; '.join(faults)}"
            raise BpfreeError(what, where=where, fix=f"see {schema_file()}", problems=faults)
        return cls(**content)


def schema_file() -> Path:
    """Return the schema of entries that came with bpfree, whichever folder the entries are in."""
    return registry_folder() / "schema.json"


@lru_cache(maxsize=1)
def schema() -> dict[str, Any]:
    return json.loads(schema_file().read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def read_entry(path: Path) -> Entry:
    """Read an entry.

    Raises:
        BpfreeError: it cannot be read, or does not fit the schema.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BpfreeError(f"cannot read the entry: {error}", where=str(path), fix="write it with bpfree registry add PLUGIN") from error
    return Entry.from_dict(content, where=str(path))


def read_entries(folder: Path) -> list[Entry]:
    """Read all entries of a registry's folder, sorted by name.

    Raises:
        BpfreeError: as :func:`read_entry`.
    """
    return [read_entry(path) for path in sorted((folder / "plugins").glob("*.toml"))]


def entry_of(record: PluginRecord, plugins: Plugins, *, added: str, known: Entry | None = None) -> Entry:
    """Make the entry of an installed plugin: rules and papers from its cards, licence from its package.

    Args:
        record: the plugin.
        plugins: those installed.
        added: ISO day.
        known: an entry from which the fields ``SAID_BY_PEOPLE`` are taken (the summary only for several rules; otherwise it is on the
            rule's card), and a wider range of interface versions.

    Raises:
        BpfreeError: the plugin does not work here, or something that an entry needs cannot be found.
    """
    if record.status != "ok":
        raise BpfreeError(f"plugin {record.name!r} is {record.status}: {record.reason}", fix="see bpfree plugins list")
    rules = record.provides.get("rules", [])
    cards = [plugins.get("rules", rule).card for rule in rules]
    about = importlib.metadata.metadata(record.distribution)
    api = record.api or API_VERSION
    values: dict[str, Any] = {
        "name": record.name,
        "distribution": record.distribution,
        "summary": cards[0].summary if len(cards) == 1 else _said(about, "Summary"),
        "rules": rules,
        "papers": list(dict.fromkeys(card.paper for card in cards if card.paper)),
        "licence": _said(about, "License-Expression") or _said(about, "License"),
        "repository": "",
        "api": [api, api],
        "status": "active",
        "added": added,
        "results": [],
    }
    if known is not None:
        values |= {name: getattr(known, name) for name in SAID_BY_PEOPLE if name != "summary" or len(cards) != 1}
        values["api"] = [min(known.api[0], api), max(known.api[1], api)]
    return Entry.from_dict(values, where=f"plugin {record.name}")


def _said(about: importlib.metadata.PackageMetadata, name: str) -> str:
    return str((about.get_all(name) or [""])[0])


def to_toml(entry: Entry) -> str:
    """Convert an entry to TOML."""
    values = entry.to_dict()
    results = values.pop("results")
    blocks = ["\n".join(_line(key, value) for key, value in values.items())]
    blocks += ["\n".join(["[[results]]", *(_line(key, value) for key, value in result.items())]) for result in results]
    return "\n\n".join(blocks) + "\n"


def _line(key: str, value: Any) -> str:
    if isinstance(value, list) and any(isinstance(item, str) for item in value):
        return f"{key} = [\n{_lines(value)}]"
    return f"{key} = {_plain(value)}"


def _lines(values: Iterable[Any]) -> str:
    return "".join(f"    {_plain(value)},\n" for value in values)


def _plain(value: Any) -> str:
    """Write strings, numbers and lists of numbers as JSON, which is also TOML."""
    return json.dumps(value, ensure_ascii=False)
