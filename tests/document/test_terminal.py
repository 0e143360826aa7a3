"""Text for terminals of any width. Oracles: lines written by hand, and the words, which are neither lost nor changed."""

from __future__ import annotations

import io
import os
import pty

import pytest

from bpfree.document.tables import text_pairs, text_table
from bpfree.document.terminal import fitted, width_of

HEADERS = ["rule", "n", "what it is"]
ROWS = [["local-forward-gradient", 12, "noise times the derivative along it"], ["dfa", 3456, "fixed random matrices"]]


def test_a_table_wraps_its_cells_but_no_numbers() -> None:
    assert text_table(HEADERS, ROWS, [1], 50) == [
        "rule                       n  what it is",
        "----------------------  ----  --------------------",
        "local-forward-gradient    12  noise times the",
        "                              derivative along it",
        "dfa                     3456  fixed random",
        "                              matrices",
    ]
    assert text_table(HEADERS, ROWS, [1], 36) == [
        "rule               n  what it is",
        "--------------  ----  --------------",
        "local-forward-    12  noise times",
        "gradient              the derivative",
        "                      along it",
        "dfa             3456  fixed random",
        "                      matrices",
    ]


def test_a_table_that_cannot_be_so_narrow_becomes_lists() -> None:
    assert text_table(HEADERS, ROWS[::-1], [1], 22)[:5] == [
        "rule        dfa",
        "n           3456",
        "what it is  fixed",
        "            random",
        "            matrices",
    ]


@pytest.mark.parametrize("width", [34, 36, 40, 58, 80, 200, None])
def test_no_line_is_longer_and_no_word_is_lost(width: int | None) -> None:
    table = text_table(HEADERS, ROWS, [1], width)
    pairs = text_pairs([("equation", "a b c " * 30), ("notes", "one\ntwo " + "three " * 20)], width)
    assert all(width is None or len(line) <= width for line in table + pairs)
    whole = "".join("".join(table).split()).replace("-", "")
    for row in ROWS:
        assert all(whole.count(character) for character in "".join(map(str, row)).replace(" ", "").replace("-", ""))
    assert " ".join(pairs).split().count("three") == 20


def test_a_line_continues_below_its_text() -> None:
    assert fitted("  fix:   choose one of the others\ndata  a b c d e f g h i j k l m n\n  - a fault that is long", 20) == "\n".join(
        [
            "  fix:   choose one",
            "         of the",
            "         others",
            "data  a b c d e f g",
            "      h i j k l m n",
            "  - a fault that is",
            "    long",
        ]
    )
    path = "/a/very/long/path/that/is/copied/as/a/whole"
    assert fitted(f"folder  it is {path} here", 20).splitlines()[1].strip() == path


def test_the_width_is_given_or_the_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a pseudo-terminal of a known size."""
    monkeypatch.delenv("COLUMNS", raising=False)
    assert width_of(io.StringIO()) is None
    master, terminal = pty.openpty()
    try:
        import fcntl
        import struct
        import termios

        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 73, 0, 0))
        with os.fdopen(os.dup(terminal), "w") as stream:
            assert width_of(stream) == 73
            monkeypatch.setenv("COLUMNS", "60")
            assert width_of(stream) == 60
    finally:
        os.close(master)
        os.close(terminal)
    assert width_of(io.StringIO()) == 60
    monkeypatch.setenv("COLUMNS", "0")
    assert width_of(io.StringIO()) is None
