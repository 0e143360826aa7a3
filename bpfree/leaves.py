"""Settings as they are written: ``key=value`` words and YAML files as leaves, whose types are not known yet."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bpfree import yaml_values
from bpfree.code_files import codes_in, placed
from bpfree.errors import UsageError
from bpfree.typed import Misfit, typed

__all__ = [
    "NAMED",
    "REFERENCE",
    "Leaf",
    "canonical",
    "last_said",
    "leaf_at",
    "leaves_of",
    "names_code",
    "once",
    "parse_words",
    "read_yaml",
    "refers",
    "said",
]

FORMER = {"frozen_twin": "twin"}
"""Keys by their former names, which saved configurations may have."""
NAMED = ("rule", "network", "program", "task", "optimizer", "schedule")
"""Sections that may be given by their name alone."""
REFERENCE = "${...} is replaced only on the command line: write the value itself"
"""What is wrong with a value in a file, which another user may have written: ``${oc.env:NAME}`` would read this user's environment."""


@dataclass(frozen=True)
class Leaf:
    """A value for a key, and where it was given.

    Attributes:
        key: dotted.
        value: a plain one, or a :class:`~bpfree.yaml_values.Scalar`, which keeps its text until the key's type is known.
        origin: for messages.
        shared: whether it is meant for several rows of a study; one that this row has no use for is listed, not refused.
        word: whether it is a word of the command line, in which alone ``${...}`` stands for another value.
    """

    key: str
    value: Any
    origin: str
    shared: bool = False
    word: bool = False


def refers(value: Any) -> bool:
    """Tell whether a value, or a part of it, refers to another one."""
    if isinstance(value, (list, tuple, Mapping)):
        return any(map(refers, [*value, *value.values()] if isinstance(value, Mapping) else value))
    return isinstance(value, str) and "${" in value


def canonical(key: str, value: Any) -> str:
    """Return a key's full form: ``rule`` is short for ``rule.name``, and version 0.1's ``frozen_twin`` is ``twin``."""
    key = FORMER.get(key, key)
    return f"{key}.name" if key in NAMED and not isinstance(value, Mapping) else key


def said(value: Any) -> str:
    """Return a value for a message: text in quotes, anything else as it is typed; only the beginning of a long one."""
    text = repr(value) if isinstance(value, str) else yaml_values.text_of(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def last_said(leaves: Sequence[Leaf], key: str, default: Any, kind: Any = str) -> Any:
    """Return the last value given for a key, before the configuration is resolved.

    Raises:
        UsageError: it is not of this type.
    """
    found = next((leaf for leaf in reversed(leaves) if leaf.key == key), None)
    if found is None:
        return default
    try:
        return typed(found.value, kind, key)
    except Misfit as error:
        raise UsageError(f"{key}={said(found.value)}: {error}", where=found.origin) from error


def read_yaml(path: Path) -> list[Leaf]:
    """Read the leaves of a YAML file (safe tags only).

    Raises:
        UsageError: no such file, no mapping of names, or a key that is given twice.
    """
    try:
        text = yaml_values.text_in(path)
        repeated, found = yaml_values.repeated(text), yaml_values.entries(text)
    except (OSError, UnicodeDecodeError) as error:
        what = f"cannot read the configuration: {getattr(error, 'strerror', None) or error}"
        raise UsageError(what, where=str(path), fix=yaml_values.FIX) from error
    except yaml.YAMLError as error:
        raise UsageError(
            "the configuration is not valid YAML", where=f"{path}: {' '.join(str(error).split())}", fix=yaml_values.FIX
        ) from error
    if found is None:
        raise UsageError("the configuration must be a mapping of names to values", where=str(path), fix=yaml_values.FIX)
    seen: dict[str, yaml_values.YamlLeaf] = {}
    for entry in found:
        key = canonical(_dotted(entry.path, f"{path}, line {entry.line}"), entry.value)
        first = seen.setdefault(key, entry)
        if first.path != entry.path:
            names = " and ".join(dict.fromkeys(".".join(each.path) for each in (first, entry)))
            repeated.append(f"{key} is given twice, as {names} in lines {first.line} and {entry.line}")
    if repeated:
        raise UsageError("; ".join(dict.fromkeys(repeated)), where=str(path), fix="keep one of them")
    leaves = [Leaf(".".join(entry.path), entry.value, f"{path}, line {entry.line}") for entry in found]
    return [leaf_at(leaf, path.parent) for leaf in leaves]


def _dotted(path: Iterable[Any], where: str) -> str:
    for name in path:
        if not isinstance(name, str):
            raise UsageError(f"a setting's name must be text, not {name!r}", where=where, fix="names are words, such as seed")
    return ".".join(path)


def leaves_of(node: Mapping[str, Any], prefix: str, origin: str) -> Iterator[Leaf]:
    """Yield the leaves of a nested mapping; an empty mapping is a leaf.

    Raises:
        UsageError: a name that is not text.
    """
    for key, value in node.items():
        _dotted([key], origin)
        if isinstance(value, Mapping) and value:
            yield from leaves_of(value, f"{prefix}{key}.", origin)
        else:
            yield Leaf(f"{prefix}{key}", value, origin)


def parse_words(words: Iterable[str]) -> list[Leaf]:
    """Parse ``key=value`` words to leaves; a value is read as YAML when its key's type is known.

    Raises:
        UsageError: a word without ``=``, or a mapping that has a key twice.
    """
    leaves: list[Leaf] = []
    for word in words:
        key, sign, text = word.partition("=")
        if not sign or not key:
            raise UsageError(
                f"expected key=value, not {word!r}", where="command line", fix="for example: rule=dfa task=digits budget.epochs=5"
            )
        try:
            repeated, value = yaml_values.repeated(text), yaml_values.written(text)
        except yaml_values.TooMuch as error:
            raise UsageError(f"{key}: {error}", where="command line") from error
        except yaml.YAMLError:
            repeated, value = [], text
        if repeated:
            raise UsageError(f"{word}: {'; '.join(repeated)}", where="command line", fix="keep one of them")
        if not isinstance(value, (list, dict)) and text[:1] not in ("'", '"') and yaml_values.text_of(value) != text:
            value = yaml_values.Scalar(text, yaml_values.plain(value))  # a comment or blanks are part of a text
        leaves.extend(dataclasses.replace(leaf, word=True) for leaf in once(leaves_of({key: value}, "", "command line")))
    return [leaf_at(leaf) for leaf in leaves]


def leaf_at(leaf: Leaf, folder: Path | None = None) -> Leaf:
    """Return the leaf, with the absolute path where it names code in a file.

    Args:
        leaf: of any key.
        folder: to which a relative path belongs; ``None``: the current one.
    """
    return dataclasses.replace(leaf, value=placed(leaf.value, folder)) if names_code(leaf) else leaf


def names_code(leaf: Leaf) -> bool:
    """Tell whether a leaf names a rule, network or task by a file of code, or a part of the network, as a text or in a list."""
    key = canonical(leaf.key, leaf.value)
    return (key in ("rule.name", "task.name") or key.startswith("network.")) and bool(codes_in(leaf.value))


def once(leaves: Iterable[Leaf]) -> list[Leaf]:
    """Return the leaves of one mapping, in which a key may have only one value.

    Raises:
        UsageError: it has two, as ``rule`` and ``rule.name``, say.
    """
    seen: dict[str, Leaf] = {}
    for leaf in leaves:
        key = canonical(leaf.key, leaf.value)
        if key in seen:
            raise UsageError(f"{key} is given twice, as {seen[key].key} and {leaf.key}", where=leaf.origin, fix="keep one of them")
        seen[key] = leaf
    return list(seen.values())
