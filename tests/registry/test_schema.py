"""The validator of the registry's schema. Oracle: the wording of JSON Schema's draft 2020-12, keyword by keyword."""

from __future__ import annotations

from typing import Any

import pytest

from bpfree.registry.entries import schema
from bpfree.registry.schema import schema_problems

CASES: list[tuple[dict[str, Any], Any, list[str]]] = [
    ({"type": "string"}, "a", []),
    ({"type": "string"}, 1, [""]),
    ({"type": "integer"}, 1.0, []),  # a number with a zero fractional part is an integer
    ({"type": "integer"}, 1.5, [""]),
    ({"type": "integer"}, True, [""]),
    ({"type": "number"}, False, [""]),
    ({"type": "boolean"}, False, []),
    ({"enum": ["a", "b"]}, "c", [""]),
    ({"pattern": "b+"}, "abba", []),  # not anchored
    ({"pattern": "^b"}, "abba", [""]),
    ({"pattern": "^b"}, 5, []),  # keywords for strings say nothing of numbers
    ({"minimum": 2}, 2, []),
    ({"minimum": 2}, 1.9, [""]),
    ({"maximum": 2}, 2.1, [""]),
    ({"minimum": 2}, "a", []),
    ({"minLength": 2}, "a", [""]),
    ({"minItems": 1}, [], [""]),
    ({"maxItems": 1}, [1, 2], [""]),
    ({"uniqueItems": True}, [1, 2, 1], [""]),
    ({"items": {"type": "string"}}, ["a", 1, 2], ["1", "2"]),
    ({"required": ["a"]}, {}, ["a"]),
    ({"required": ["a"]}, [], []),
    ({"properties": {"a": {"type": "string"}}}, {"a": 1, "b": 2}, ["a"]),
    ({"properties": {"a": {}}, "additionalProperties": False}, {"a": 1, "b": 2}, ["b"]),
    ({"additionalProperties": {"type": "string"}}, {"b": 2}, ["b"]),
    ({"$ref": "#/$defs/x", "$defs": {"x": {"type": "array", "items": {"$ref": "#/$defs/y"}}, "y": {"minimum": 1}}}, [1, 0], ["1"]),
    ({"properties": {"a": {"items": {"required": ["b"]}}}}, {"a": [{"b": 1}, {}]}, ["a/1/b"]),
]


@pytest.mark.parametrize(("rules", "value", "places"), CASES)
def test_each_keyword(rules: dict[str, Any], value: Any, places: list[str]) -> None:
    assert [place for place, _ in schema_problems(value, rules)] == places


@pytest.mark.parametrize("rules", [{"oneOf": []}, {"properties": {"a": {"format": "date"}}}, {"$ref": "other.json"}])
def test_what_it_does_not_know_is_an_error(rules: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="know"):
        list(schema_problems({"a": 1}, rules))


def test_the_registry_s_schema_uses_known_keywords_alone() -> None:
    """Every subschema is walked, also those that no entry reaches."""

    def subschemas(rules: Any) -> list[dict[str, Any]]:
        below = [*rules.get("properties", {}).values(), *rules.get("$defs", {}).values(), *([rules["items"]] if "items" in rules else [])]
        return [rules, *(inner for part in below for inner in subschemas(part))]

    found = subschemas(schema())
    assert len(found) > 20
    for rules in found:
        list(schema_problems(None, {**rules, "type": "string"}, root=schema()))  # raises on an unknown keyword
