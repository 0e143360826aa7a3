"""Check plain values against a JSON Schema, with the package ``jsonschema`` of the extra ``registry``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bpfree.errors import BpfreeError

__all__ = ["schema_problems"]


def schema_problems(value: Any, schema: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Find faults as pairs ``(place, problem)``; the place is a path such as ``results/0/mean``.

    Raises:
        BpfreeError: jsonschema is not installed.
    """
    try:
        from jsonschema import Draft202012Validator
    except ImportError as error:
        raise BpfreeError(
            f"entries are checked with jsonschema ({error})", where="registry", fix="pip install 'bpfree[registry]'"
        ) from error
    found = (
        ("/".join(map(str, [*error.absolute_path, *name])), fault)
        for error in Draft202012Validator(schema).iter_errors(value)
        for name, fault in _said(error)
    )
    yield from dict.fromkeys(found)  # jsonschema reports an error for each missing name, each with all names


def _said(error: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """Describe an error: the path below its place, and the problem there."""
    if error.validator == "required":
        yield from (((name,), "is missing") for name in error.validator_value if name not in error.instance)
    elif error.validator == "additionalProperties":
        known = error.schema.get("properties", {})
        yield from (((name,), f"is not known; known: {', '.join(sorted(known))}") for name in error.instance if name not in known)
    elif error.validator == "enum":
        yield (), f"is {error.instance!r}, not one of {', '.join(map(str, error.validator_value))}"
    else:
        yield (), f"is not valid: {error.message}"
