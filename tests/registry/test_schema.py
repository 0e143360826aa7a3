"""Where an entry departs from the registry's schema, and what is said. Oracle: the wording of JSON Schema's draft 2020-12."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from bpfree import BpfreeError
from bpfree.registry.entries import schema
from bpfree.registry.schema import schema_problems

CASES: list[tuple[dict[str, Any], Any, list[tuple[str, str]]]] = [
    ({"type": "integer"}, 1.0, []),  # a number with a zero fractional part is an integer
    ({"type": "integer"}, True, [("", "is not valid: True is not of type 'integer'")]),
    ({"enum": ["a", "b"]}, "c", [("", "is 'c', not one of a, b")]),
    ({"items": {"type": "string"}}, ["a", 1, 2], [(place, f"is not valid: {place} is not of type 'string'") for place in ("1", "2")]),
    ({"required": ["a", "b", "c"]}, {"b": 1}, [("a", "is missing"), ("c", "is missing")]),
    ({"properties": {"a": {}}, "additionalProperties": False}, {"b": 2, "c": 3}, [(name, "is not known; known: a") for name in "bc"]),
    ({"additionalProperties": {"minimum": 3}}, {"b": 2}, [("b", "is not valid: 2 is less than the minimum of 3")]),
    ({"$ref": "#/$defs/x", "$defs": {"x": {"items": {"pattern": "^b"}}}}, ["b", "ab"], [("1", "is not valid: 'ab' does not match '^b'")]),
    ({"properties": {"a": {"items": {"required": ["b"]}}}}, {"a": [{"b": 1}, {}]}, [("a/1/b", "is missing")]),
]


@pytest.mark.parametrize(("rules", "value", "expected"), CASES)
def test_each_fault_has_its_place(rules: dict[str, Any], value: Any, expected: list[tuple[str, str]]) -> None:
    assert list(schema_problems(value, rules)) == expected


def test_the_registry_s_schema_is_one() -> None:
    """Oracle: the draft's own schema."""
    Draft202012Validator.check_schema(schema())


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(BpfreeError, match=r"pip install 'bpfree\[registry\]'"):
        list(schema_problems({}, {}))
