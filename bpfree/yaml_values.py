"""Reading YAML as people mean it: YAML 1.2 with safe tags only, and scalars that keep the text they were typed as.

PyYAML follows YAML 1.1, where ``1e-8`` is a string, ``no`` is false, ``010`` is 8, ``12:30`` is 750 and ``1_000`` a number; here the
core schema of YAML 1.2 holds. What a plain scalar means may depend on its key: ``007`` is a number, but as the name of a folder
it is text. So :func:`written` keeps the text of what can be written in more than one way (:class:`Scalar`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

__all__ = ["Scalar", "TooMuch", "YamlLeaf", "dump", "entries", "plain", "read", "repeated", "text_in", "text_of", "written"]

FIX = "write it in YAML: names with values, in UTF-8, without tags, each name once"

FLOAT = re.compile(r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$")
INTEGER = re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
NULL = re.compile(r"^(?:null|Null|NULL|~|)$")
BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")

MOST_CHARACTERS, MOST_VALUES, MOST_LEVELS, MOST_DIGITS = 1_000_000, 50_000, 50, 100
"""Limits of a text (values are counted with aliases expanded); a larger one is refused before it is parsed."""


class TooMuch(yaml.YAMLError):
    """A text that expands to more than a person would write."""


@dataclass(frozen=True)
class Scalar:
    """A plain scalar whose text says more than its value does: ``007``, ``1e3``, ``True``, ``~``, or nothing at all.

    Attributes:
        text: as typed.
        value: by YAML's core schema.
    """

    text: str
    value: Any

    def __repr__(self) -> str:
        return self.text


@dataclass(frozen=True)
class YamlLeaf:
    """A value of a mapping, with its place.

    Attributes:
        path: the names that lead to it, as they are written; one may hold dots.
        value: as :func:`written` has it.
        line: of its name, from 1.
    """

    path: tuple[Any, ...]
    value: Any
    line: int


class _Loader(yaml.SafeLoader):
    """A safe loader of the core schema."""


_Loader.yaml_implicit_resolvers = {
    first: kept
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    if (kept := [(tag, pattern) for tag, pattern in resolvers if tag == "tag:yaml.org,2002:merge"])
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", BOOL, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", NULL, [*"nN~", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", INTEGER, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


@lru_cache(maxsize=4)
def _checked(text: str) -> str:
    """Return the text, if it expands to a finite value of a size that people write.

    Raises:
        TooMuch: it is not.
        yaml.YAMLError: it is not YAML.
    """
    if len(text) <= MOST_DIGITS and "*" not in text:  # too short to exceed a limit
        return text
    if len(text) > MOST_CHARACTERS:
        raise TooMuch(f"more than {MOST_CHARACTERS} characters")
    sizes: dict[str, int] = {}
    above: list[tuple[str | None, int]] = []  # for each mapping and list around: its anchor, and the count when it began
    count = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes and event.anchor in (anchor for anchor, _ in above):
                raise TooMuch(f"line {event.start_mark.line + 1}: *{event.anchor} refers to a value that contains it")
            count += sizes.get(event.anchor, 1)
        elif isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)):
            count += 1
            if isinstance(event, yaml.ScalarEvent):
                sizes |= {event.anchor: 1} if event.anchor else {}
            else:
                above.append((event.anchor, count - 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, begun = above.pop()
            sizes |= {anchor: count - begun} if anchor else {}
        if len(above) > MOST_LEVELS:
            raise TooMuch(f"line {event.start_mark.line + 1}: more than {MOST_LEVELS} levels of mappings and lists")
        if count > MOST_VALUES:
            raise TooMuch(f"line {event.start_mark.line + 1}: more than {MOST_VALUES} names and values, with what aliases stand for")
    return text


def _integer(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


def _float(text: str) -> float:
    return float(text.replace(".inf", "inf").replace(".nan", "nan")) if text[-1:] in "fFnN" else float(text)


def _scalar(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    kind = node.tag.rpartition(":")[2]
    try:
        if kind == "int":
            return _integer(node.value)
        if kind == "float":
            return _float(node.value.lower())
        if kind == "bool":
            return {"true": True, "false": False}[node.value.lower()]
    except (KeyError, ValueError) as error:  # an explicit tag, or too many digits
        raise yaml.constructor.ConstructorError(None, None, f"{node.value[:40]!r} is no {kind}", node.start_mark) from error
    return None


class _Writing(_Loader):
    """Loader of the core schema that keeps the text of scalars."""


def _kept(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    value = _scalar(loader, node)
    return value if node.value == _canonical(value) else Scalar(node.value, value)


for _kind in ("int", "float", "bool", "null"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _scalar)
    _Writing.add_constructor(f"tag:yaml.org,2002:{_kind}", _kept)


def _canonical(value: Any) -> str:
    """Return the one way in which Python writes a value, if it is the common one."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else f"{'-' if value < 0 else ''}.inf"
    return repr(value)


def text_in(path: Path) -> str:
    """Read the text of a file, up to the length at which it is refused."""
    with path.open(encoding="utf-8") as file:
        return file.read(MOST_CHARACTERS + 1)


def read(text: str) -> Any:
    """Read the value of a YAML text.

    Raises:
        yaml.YAMLError: it stands for none.
    """
    return yaml.load(_checked(text), Loader=_Loader)


def written(text: str) -> Any:
    """Read a YAML text, with a :class:`Scalar` for each plain scalar that is not written in the one common way.

    Raises:
        yaml.YAMLError: it stands for no value.
    """
    return yaml.load(_checked(text), Loader=_Writing)


def entries(text: str) -> list[YamlLeaf] | None:
    """List the values of a mapping, nested ones included, in order; ``None`` if the text is no mapping.

    An empty mapping is a value.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    loader = _Writing(_checked(text))
    try:
        node = loader.get_single_node()
        return list(_entries(loader, node, ())) if isinstance(node, yaml.MappingNode) else None
    finally:
        loader.dispose()


def _entries(loader: _Writing, node: yaml.MappingNode, path: tuple[Any, ...]) -> Iterator[YamlLeaf]:
    loader.flatten_mapping(node)
    for name, value in node.value:
        where = (*path, loader.construct_object(name, deep=True))
        if isinstance(value, yaml.MappingNode) and value.value:
            yield from _entries(loader, value, where)
        else:
            yield YamlLeaf(where, loader.construct_object(value, deep=True), name.start_mark.line + 1)


class _Dumper(yaml.SafeDumper):
    """Writes in quotes any text that would not be read as text."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", INTEGER, list("-+0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


def dump(value: Any) -> str:
    """Write a nested mapping of plain values as YAML, which :func:`read` gives back."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=float("inf"))
    return text


def repeated(text: str) -> list[str]:
    """Return a sentence for each name that a mapping has twice, of which YAML would take the last.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    return list(_repeated(yaml.compose(_checked(text), Loader=_Loader), ""))


def _repeated(node: Any, where: str) -> Iterator[str]:
    if isinstance(node, yaml.MappingNode):
        seen: dict[Any, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in seen:
                first = seen[name]
                yield f"{where}{name} is given twice" + (f", in lines {first} and {line}" if first != line else "")
            if name is not None:
                seen[name] = line
            yield from _repeated(value, f"{where}{name}.")
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value, start=1):
            yield from _repeated(value, f"{where}{number}.")


def plain(value: Any) -> Any:
    """Replace scalars by the values of the core schema."""
    if isinstance(value, Scalar):
        return value.value
    if isinstance(value, dict):
        return {plain(key): plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list) else value


def text_of(value: Any) -> str:
    """Write a value as it is typed behind ``KEY=``, so that :func:`written` reads it back."""
    if isinstance(value, str):
        return value if _is_itself(value) else json.dumps(value, ensure_ascii=False)
    return _inside(value)


def _is_itself(text: str) -> bool:
    try:
        return bool(written(text) == text) and isinstance(written(text), str)
    except yaml.YAMLError:  # the command line takes anything that is not YAML as text
        return "\n" not in text


def _name(key: Any) -> str:
    return key if isinstance(key, str) and re.fullmatch(r"[A-Za-z_][\w.-]*", key) and _is_itself(key) else _inside(key)


def _inside(value: Any) -> str:
    if isinstance(value, Scalar):
        return value.text
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_name(key)}: {_inside(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_inside, value)) + "]"
    if value is None or isinstance(value, (bool, int, float)):
        return _canonical(value)
    return json.dumps(value if isinstance(value, str) else str(value), ensure_ascii=False)
