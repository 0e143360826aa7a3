"""Conversion of typed text to a key's type, or its refusal in plain words.

A value has the type of its key, whatever YAML would make of it: ``007`` is the number 7 for a key that holds a whole number, and the
text ``007`` for one that holds text. Keys without a type (those of free mappings such as ``optimizer.options``) take YAML's core schema.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from bpfree.errors import did_you_mean
from bpfree.yaml_values import FLOAT, Scalar, plain, text_of

__all__ = ["Misfit", "typed"]

WHOLE = re.compile(r"[-+]?[0-9]+")
TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NOTHING = ("null", "Null", "NULL")


class Misfit(Exception):
    """A value that is not of its key's type; the message is the end of a sentence that begins with the key.

    Args:
        what: the key must be, without the remedy.
        fix: the remedy.
    """

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(": ".join(filter(None, [what, fix])))
        self.what, self.fix = what, fix


def typed(value: Any, kind: Any, key: str) -> Any:
    """Convert a value to the type of a key.

    Args:
        value: a plain one, or a :class:`~bpfree.yaml_values.Scalar`.
        kind: the type, as a dataclass's field has it.
        key: for examples.

    Raises:
        Misfit: it is not of this type.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(value, Scalar) and not value.text:
        name, colon, text = key.rpartition(".")[2].partition(":")
        spaced = f"write a space behind the colon: {{{name}: {text}}}" if colon else ""
        raise Misfit("has no value", spaced or f"give one{', null for none' if type(None) in parts else ''}, or leave the key out")
    if origin in (typing.Union, types.UnionType):
        return _one_of(value, parts, key)
    if origin is typing.Literal:
        return _choice(value, parts)
    if origin in (list, tuple) or kind in (list, tuple):
        return _list(value, parts[0] if parts else Any, key)
    if origin is dict or kind is dict:
        return _mapping(value, parts[1] if parts else Any, key)
    convert = {bool: _bool, int: _int, float: _float, str: _text}.get(kind)
    return plain(value) if convert is None else convert(value)


def _one_of(value: Any, kinds: tuple[Any, ...], key: str) -> Any:
    others = [kind for kind in kinds if kind is not type(None)]
    nothing = value is None or (isinstance(value, Scalar) and value.value is None)
    if nothing and len(others) < len(kinds) and not (str in others and isinstance(value, Scalar) and value.text not in NOTHING):
        return None  # but ~ is a folder, where text is asked for
    troubles = []
    for kind in sorted(others, key=lambda kind: kind is str):  # anything is text
        try:
            return typed(value, kind, key)
        except Misfit as error:
            troubles.append(str(error))
    raise Misfit(" or ".join(dict.fromkeys(troubles)) + (", or null" if len(others) < len(kinds) else ""))


def _written(value: Any) -> str | None:
    """Return the text of a scalar, ``None`` for lists and mappings."""
    if isinstance(value, str):
        return value
    return value.text if isinstance(value, Scalar) else None if isinstance(value, (list, tuple, Mapping)) else text_of(value)


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = _written(value) if isinstance(value, (str, Scalar)) else None
    if text is None or text.lower() not in TRUTH:
        raise Misfit("must be true or false")
    return TRUTH[text.lower()]


def _int(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return _of_64_bits(value)
    text = (_written(value) or "").strip() if isinstance(value, (str, Scalar)) else ""
    if len(text) > 100 or not WHOLE.fullmatch(text):
        number = plain(value) if not isinstance(value, str) else value.replace("_", "").replace(",", "")
        try:
            whole = int(float(number)) if float(number).is_integer() and not isinstance(number, bool) else None
        except (TypeError, ValueError, OverflowError):
            whole = None
        raise Misfit("must be a whole number" + (f", such as {whole}" if whole is not None else ""))
    return _of_64_bits(int(text))


def _of_64_bits(value: int) -> int:
    if not -(2**63) <= value < 2**63:
        raise Misfit("is too large for a whole number")
    return value


def _float(value: Any) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return _as_float(value)
    text = (_written(value) or "").strip() if isinstance(value, (str, Scalar)) else ""
    if WHOLE.fullmatch(text) or FLOAT.match(text):
        return _as_float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    raise Misfit("must be a number")


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        raise Misfit("is too large") from None


def _text(value: Any) -> str:
    if value is None or (isinstance(value, Scalar) and value.text in NOTHING):
        raise Misfit("must be text, not null; in quotes, null is a text like any other")
    text = _written(value)
    if text is None:
        raise Misfit("must be text, not a list or a mapping; if it is meant as text, put it into quotes")
    return text


def _choice(value: Any, choices: tuple[Any, ...]) -> Any:
    text = _written(value)
    for choice in choices:
        if choice is value or (text is not None and text == (choice if isinstance(choice, str) else text_of(choice))):
            return choice
    known = list(map(str, choices))
    raise Misfit(f"must be one of {', '.join(known)}", did_you_mean(text or "", known))


def _list(value: Any, kind: Any, key: str) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [typed(entry, kind, key) for entry in value]
    text = _written(value)
    raise Misfit("must be a list", f"{key}=[{text.strip('[]() ')}]" if text else "[a, b, ...]")


def _mapping(value: Any, kind: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise Misfit("must be a mapping", f"{key}={{name: value}}, or {key}.NAME=value")
    for name in value:
        if not isinstance(name, str):
            raise Misfit(f"must have names that are text, not {plain(name)!r}")
    return {name: typed(entry, kind, key) for name, entry in value.items()}
