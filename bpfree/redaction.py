"""Redaction of addresses: user, password, token and query are ``***`` wherever an address is written.

A run's records can be read by anyone with access to its folder, its tracking store or its report; the settings in use keep the whole
address. A recorded address is recognised by its ``***`` (:func:`is_redacted`), and must be given again.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["is_redacted", "redact", "redact_logs", "redact_word", "redacted"]

HIDDEN = "***"
WHOLE = re.compile(r"\A([\w+.-]{1,40}://)(?![/\s])[^\n]*@")
"""An address up to its last ``@``, in a text that is nothing else: a password may hold blanks."""
USER = re.compile(r"(?<![\w/.])[^\s:/@'\"=()]{1,200}:[^\s/'\"]{1,200}@(?=[\w\[])")
"""``user:password@host``, as it is typed without a scheme."""
QUERY = re.compile(r"\?[\w.~%\[\]-]{1,80}=")
"""Begin of the query of an address of which a library's message shows but the path."""
AROUND = ")]}>\"'`,.:;"


def redact(text: str) -> str:
    """Return the text with ``***`` for users, passwords, tokens and queries of the addresses in it."""
    return "".join(map(_part, re.split(r"(\s+)", WHOLE.sub(rf"\1{HIDDEN}@", text))))


def _part(part: str) -> str:
    """Redact a part of a text between blanks."""
    before, scheme, address = part.partition("://")
    before = USER.sub(f"{HIDDEN}@", before)
    query = QUERY.search(before)
    if query is not None:
        return _cut(f"{before}{scheme}{address}", query.start())
    if "@" in address and not address.startswith("/"):
        address = f"{HIDDEN}@{address.rpartition('@')[2]}"  # the last one: a password may hold it, as it may hold a slash
    value = address.rfind("=")
    places = [address.find("?"), *(place for place in (address.find("#"), address.find(";")) if place < value)]
    first = min((place for place in places if place >= 0), default=None)
    return f"{before}{scheme}{address if first is None else _cut(address, first)}"


def _cut(text: str, place: int) -> str:
    """Replace the text after a place, except for a quotation mark or a full stop at its end."""
    query = text[place + 1 :]
    end = query[len(query.rstrip(AROUND)) :]
    return f"{text[: place + 1]}{HIDDEN}{end}" if len(end) < len(query) else text


def redacted(value: Any) -> Any:
    """Return a value as it is recorded: every address in it redacted, also inside lists and mappings.

    Text is an address by its scheme, or by its key: ``uri``, or one that ends with ``.uri``.
    """
    if isinstance(value, Mapping):
        named = {key for key, entry in value.items() if str(key).rpartition(".")[2] == "uri" and isinstance(entry, str)}
        return {key: redact(entry) if key in named else redacted(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(redacted, value))
    return redact(value) if isinstance(value, str) and "://" in value else value


def redact_word(word: str) -> str:
    """Return a word of the command line, such as ``tracking.uri=http://...``, with its addresses redacted."""
    key, sign, value = word.partition("=")
    return f"{key}{sign}{redact(value)}" if sign else redact(word)


def is_redacted(value: Any) -> bool:
    """Tell whether a value is a redacted address, whose hidden part is not known here."""
    return isinstance(value, str) and HIDDEN in value and (value.startswith(HIDDEN) or "://" in value) and redact(value) == value


class _Redacting(logging.Filter):
    """Redacts messages and tracebacks."""

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            message = record.getMessage()
        except Exception:  # arguments that do not fit, of which the handler will complain
            return True
        if redact(message) != message:
            record.msg, record.args = redact(message), ()
        trace = logging.Formatter().formatException(record.exc_info) if record.exc_info and not record.exc_text else ""
        if redact(trace) != trace:
            record.exc_text = redact(trace)
        return True


REDACTING = _Redacting()
LOGGERS = ("bpfree", "mlflow", "sqlalchemy", "urllib3")


def redact_logs(others: Iterable[logging.Filterer] = ()) -> None:
    """Redact the messages of this package's loggers, of libraries that take addresses, and of further loggers or handlers.

    A library's loggers exist once it is imported; this function may be called again.
    """
    known = [name for name in ("bpfree", *logging.root.manager.loggerDict) if name.split(".")[0] in LOGGERS]
    for one in (*map(logging.getLogger, known), *others):
        one.addFilter(REDACTING)
