"""Addresses without their secrets. Oracle: the secrets, none of which is in what is written."""

from __future__ import annotations

import logging

import pytest

from bpfree import BpfreeError, UsageError
from bpfree.redaction import is_redacted, redact, redact_logs, redact_word, redacted

SECRETS = ("hunter2", "somebody", "TOKEN", "p@ss", "ss@", "ha?sh", "sl/ash")
ADDRESSES = {
    "http://somebody:hunter2@host:5000/path": "http://***@host:5000/path",
    "http://:hunter2@host": "http://***@host",
    "http://TOKEN@host/": "http://***@host/",
    "https://somebody:p@ss@host": "https://***@host",
    "https://somebody:p@ss:hunter2@[::1]:80/x": "https://***@[::1]:80/x",
    "https://somebody:sl/ash@host/x": "https://***@host/x",
    "https://somebody:ha?sh#hunter2@host": "https://***@host",
    "postgresql+psycopg2://somebody:hunter2@host:5432/db?sslmode=require": "postgresql+psycopg2://***@host:5432/db?***",
    "http://host/path?password=hunter2&x=1": "http://host/path?***",
    "http://host?TOKEN": "http://host?***",
    "http://host/#access_token=TOKEN": "http://host/#***",
    "http://host/path;key=TOKEN": "http://host/path;***",
    "sqlite:///mlflow.db?password=hunter2": "sqlite:///mlflow.db?***",
    "HTTP://somebody:hunter2@host": "HTTP://***@host",
    "/api?password=hunter2&next=http://host": "/api?***",
    "somebody:p@ss@host": "***@host",
    "somebody:hunter2@host:5000": "***@host:5000",
}
INNOCENT = (
    "http://host:5000/path",
    "sqlite:////home/me@work/mlflow.db",
    "file:///home/me@work",
    "databricks",
    "http://host/#/experiments/1/runs/abc",
    "the port 12:30 of me@work, and is it there?",
    "did you mean http://host/path?",
    "rule=dfa task=digits optimizer.lr=0.01 network.widths=[256,128]",
    "test/accuracy 0.93; seeds 0, 1: a+b (c) = d?",
)


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "tracking.uri={}",
        "'{}'",
        '{{"uri": "{}", "mail": "me@work"}}',
        "cannot reach {}: refused",
        "a line\n{}\nanother, of me@work",
        "HTTPConnectionPool(host='host'): see <{}>.",
    ],
)
def test_what_lets_anybody_in_is_left_out(address: str, text: str) -> None:
    found = redact(text.format(address))
    assert not [secret for secret in SECRETS if secret in found]
    assert redact(found) == found
    assert ADDRESSES[address] in found
    assert redact_word(f"tracking.uri={address}") == f"tracking.uri={ADDRESSES[address]}"


@pytest.mark.parametrize("text", INNOCENT)
def test_anything_else_stays(text: str) -> None:
    assert redact(text) == text
    assert not is_redacted(text)


def test_texts_that_are_an_address_and_messages_of_libraries() -> None:
    assert redact("http://somebody:hun ter2@host/x") == "http://***@host/x"
    text = "HTTPConnectionPool(host='h', port=80): Max retries exceeded with url: /api/2.0/mlflow?password=hunter2 (Caused by X)"
    assert redact(text).endswith("url: /api/2.0/mlflow?*** (Caused by X)")
    assert redact("(psycopg2.OperationalError) 'postgresql://somebody:***@h'") == "(psycopg2.OperationalError) 'postgresql://***@h'"


def test_long_texts_take_no_time_to_speak_of() -> None:
    """Quadratic patterns would not end on these."""
    for text in ("a" * 300_000, "://" * 30_000, "?a=" + ":" * 100_000, "a:" * 50_000, "http://h?" + "'" * 100_000, "#=" * 50_000):
        redact(text)


def test_values_are_redacted_where_they_are_addresses() -> None:
    tree = {"a": ["http://u:hunter2@h", 1, None], "b": {"c": ("x:y@z", "?a=b")}, "d": 2.5}
    assert redacted(tree) == {"a": ["http://***@h", 1, None], "b": {"c": ("x:y@z", "?a=b")}, "d": 2.5}
    assert is_redacted("http://***@h")
    assert is_redacted("***@h")
    assert not is_redacted("three stars: ***")
    assert not is_redacted(None)


def test_errors_show_no_address_whole() -> None:
    error = BpfreeError("no answer of http://u:hunter2@h", where="tracking.uri=http://TOKEN@h", fix="open http://h?key=TOKEN")
    several = UsageError.of(["output=http://u:hunter2@h: no folder", "more"], "configuration")
    assert "hunter2" not in f"{error} {error.what} {error.problems} {several} {several.problems}"
    assert "TOKEN" not in f"{error} {error.where} {error.fix} {error.problems}"


def test_logged_messages_and_tracebacks(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("bpfree.tracking")
    redact_logs()
    redact_logs()
    try:
        raise OSError("http://somebody:hunter2@h is away")
    except OSError:
        logger.warning("at %s: %s", "http://TOKEN@h", "100 % away", exc_info=True)
    logger.warning("%d %%", 5)
    logging.Logger.filter(logger, logging.makeLogRecord({"msg": "%d", "args": ("no number",)}))
    assert "hunter2" not in caplog.text
    assert "TOKEN" not in caplog.text
    assert "at http://***@h: 100 % away" in caplog.text
    assert caplog.records[1].getMessage() == "5 %"
