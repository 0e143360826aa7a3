"""Hashes of sources. Oracle: the code without comments, docstrings and blank lines, written out by hand; files changed on purpose."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from bpfree import sources

CODE = '''\
#!/usr/bin/env python
"""Module: # no comment."""

LEVEL = 1  # a comment
"""Of an attribute."""; MORE = "two"


def f(x: str = "# no comment", *, deep: bool = False) -> str:  # says "nothing
    """First.

    Second é.
    """
    # alone

    text = """kept

    # in a string"""
    return (
        "a"  # one
        \'b"\\\'#\'
        f"{x!r:>{LEVEL}}#{{}}" + text + \\
        r"\\\\"
    )
'''
STRIPPED = '''
LEVEL = 1
; MORE = "two"
def f(x: str = "# no comment", *, deep: bool = False) -> str:
    text = """kept

    # in a string"""
    return (
        "a"
        \'b"\\\'#\'
        f"{x!r:>{LEVEL}}#{{}}" + text + \\
        r"\\\\"
    )
'''


def hash_of(folder: Path, content: str | bytes, name: str = "a.py") -> str:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    sources.hash_of.cache_clear()
    return sources.hash_of(folder)


def by_hand(content: bytes, name: str = "a.py") -> str:
    return hashlib.sha256(f"{name}\0{hashlib.sha256(content).hexdigest()}\0".encode()).hexdigest()[:16]


def test_only_code_counts(tmp_path: Path) -> None:
    """On every version of Python the same: the expected text is written out."""
    assert hash_of(tmp_path, CODE) == by_hand(STRIPPED.encode())
    assert hash_of(tmp_path, CODE.replace("\n", "\r\n")) == by_hand(STRIPPED.encode())


@pytest.mark.parametrize(
    ("old", "new"),
    [("a comment", "another"), ("Module:", "It:"), ("Of an attribute", "Another"), ("Second é.", "One\n    more."), ("# alone\n", "\n\n")],
)
def test_comments_docstrings_and_blank_lines_do_not_count(tmp_path: Path, old: str, new: str) -> None:
    assert old in CODE
    assert hash_of(tmp_path, CODE.replace(old, new)) == hash_of(tmp_path, CODE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("LEVEL = 1", "LEVEL = 2"),
        ("deep: bool = False", "deep: bool = True"),
        ("kept\n\n", "kept\n"),
        ('# no comment",', '# no",'),
        ("# in a string", "# in one"),
        ("}}#{{}}", "}}##{{"),
        ("    text = ", "        text = "),
    ],
)
def test_code_defaults_and_strings_count(tmp_path: Path, old: str, new: str) -> None:
    assert old in CODE
    assert hash_of(tmp_path, CODE.replace(old, new)) != hash_of(tmp_path, CODE)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.cu", b"int a; # 1\n\n"), ("a.py", b"no python # 1\n"), ("a.py", b"a = '\xe9'  # 1\n"), ("a.py", b'a = f"{b["#"]}{1}"\n')],
    ids=["another language", "invalid", "not UTF-8", "quotes within quotes"],
)
def test_what_cannot_be_read_as_python_is_hashed_by_its_bytes(tmp_path: Path, name: str, content: bytes) -> None:
    """Nested quotes of one kind are read by Python 3.12, and not before: neither version looks inside."""
    assert hash_of(tmp_path, content, name) == by_hand(content, name)
