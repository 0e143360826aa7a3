"""Checking plain values against a JSON Schema: the part of draft 2020-12 that the registry's schema uses, and no more.

A keyword outside of that part is an error of the schema, so that nothing it says goes unchecked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

__all__ = ["schema_problems"]

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
}
REMARKS = {"$schema", "$id", "$defs", "title", "description"}
"""Keywords that check nothing."""
Check = Callable[[Any, Any], str | None]


def schema_problems(
    value: Any, schema: Mapping[str, Any], root: Mapping[str, Any] | None = None, where: str = ""
) -> Iterator[tuple[str, str]]:
    """``(place, what is wrong)`` for each fault; the place is a path such as ``results/0/mean``.

    Raises:
        ValueError: the schema uses a keyword that is not known here.
    """
    root = schema if root is None else root
    unknown = set(schema) - REMARKS - set(CHECKS) - {"$ref", "type", "properties", "required", "additionalProperties", "items"}
    if unknown:
        raise ValueError(f"keywords that this validator does not know: {', '.join(sorted(unknown))}")
    if "$ref" in schema:
        yield from schema_problems(value, _resolved(schema["$ref"], root), root, where)
    wanted = schema.get("type")
    if wanted is not None and not _is(value, wanted):
        yield where, f"is {value!r}, which is no {wanted}"
        return
    for keyword, check in CHECKS.items():
        if keyword in schema and (fault := check(value, schema[keyword])):
            yield where, fault
    if isinstance(value, dict):
        yield from _in_object(value, schema, root, where)
    if isinstance(value, list) and "items" in schema:
        for number, item in enumerate(value):
            yield from schema_problems(item, schema["items"], root, _below(where, number))


def _in_object(value: dict[str, Any], schema: Mapping[str, Any], root: Mapping[str, Any], where: str) -> Iterator[tuple[str, str]]:
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name in schema.get("required", ()):
        if name not in value:
            yield _below(where, name), "is missing"
    for name, item in value.items():
        if name in properties:
            yield from schema_problems(item, properties[name], root, _below(where, name))
        elif others is False:
            yield _below(where, name), f"is not known; known: {', '.join(sorted(properties))}"
        elif others is not True:
            yield from schema_problems(item, others, root, _below(where, name))


def _below(where: str, name: object) -> str:
    return f"{where}/{name}" if where else str(name)


def _resolved(reference: str, root: Mapping[str, Any]) -> Mapping[str, Any]:
    prefix, _, name = reference.rpartition("/")
    if prefix != "#/$defs":
        raise ValueError(f"{reference}: only references to #/$defs/NAME are known")
    return root["$defs"][name]  # type: ignore[no-any-return]


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):  # which Python takes for an integer
        return kind == "boolean"
    return isinstance(value, TYPES[kind]) or (kind == "integer" and isinstance(value, float) and value.is_integer())


def _enum(value: Any, allowed: list[Any]) -> str | None:
    return None if value in allowed else f"is {value!r}, not one of {', '.join(map(str, allowed))}"


def _pattern(value: Any, pattern: str) -> str | None:
    wrong = isinstance(value, str) and re.search(pattern, value) is None
    return f"is {value!r}, which does not match {pattern}" if wrong else None


def _minimum(value: Any, bound: float) -> str | None:
    return f"is {value}, less than {bound}" if _is(value, "number") and value < bound else None


def _maximum(value: Any, bound: float) -> str | None:
    return f"is {value}, more than {bound}" if _is(value, "number") and value > bound else None


def _min_length(value: Any, bound: int) -> str | None:
    return f"has fewer than {bound} characters" if isinstance(value, str) and len(value) < bound else None


def _min_items(value: Any, bound: int) -> str | None:
    return f"has fewer than {bound} items" if isinstance(value, list) and len(value) < bound else None


def _max_items(value: Any, bound: int) -> str | None:
    return f"has more than {bound} items" if isinstance(value, list) and len(value) > bound else None


def _unique_items(value: Any, wanted: bool) -> str | None:
    twice = wanted and isinstance(value, list) and any(item in value[:number] for number, item in enumerate(value))
    return "has an item twice" if twice else None


CHECKS: dict[str, Check] = {
    "enum": _enum,
    "pattern": _pattern,
    "minimum": _minimum,
    "maximum": _maximum,
    "minLength": _min_length,
    "minItems": _min_items,
    "maxItems": _max_items,
    "uniqueItems": _unique_items,
}
