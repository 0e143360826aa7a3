"""The hash of a Python file's code, which comments, docstrings and blank lines do not change: better words need no new measurement."""

from __future__ import annotations

import ast
import hashlib
import re
import warnings
from collections.abc import Iterator

__all__ = ["hash_of_python"]

TOKEN = re.compile(
    rb'''("""(?:[^\\]|\\.)*?"""|\'\'\'(?:[^\\]|\\.)*?\'\'\'|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|\\\n)|\s*#[^\n]*|\s*\n''', re.DOTALL
)
"""A string or a continued line, which is kept; a comment; the end of a line, with the blank lines after it."""


def hash_of_python(content: bytes) -> str:
    """Return the SHA-256 of the code, the same on every version of Python; of the bytes if this one cannot parse them.

    The syntax tree is used for the places of docstrings alone, since its other details differ between versions.
    """
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
        code = text.encode()
        lines = [0]
        for line in code.split(b"\n"):
            lines.append(lines[-1] + len(line) + 1)
        with warnings.catch_warnings(action="ignore"):  # of strings with unknown escapes: their author sees them on import
            module = ast.parse(text)
        for node in sorted(_texts(module), key=lambda node: (node.lineno, node.col_offset), reverse=True):
            code = code[: lines[node.lineno - 1] + node.col_offset] + code[lines[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0) :]
        content = TOKEN.sub(_kept, code)
    except (SyntaxError, ValueError):  # no Python, or none that this version reads
        pass
    return hashlib.sha256(content).hexdigest()


def _texts(module: ast.Module) -> Iterator[ast.Expr]:
    """Yield all statements that are nothing but a string: docstrings, also those of attributes."""
    nodes: list[ast.AST] = [module]
    for node in nodes:
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            for inner in getattr(node, name, ()):
                if isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Constant) and isinstance(inner.value.value, str):
                    yield inner
                elif isinstance(inner, ast.AST):
                    nodes.append(inner)


def _kept(match: re.Match[bytes]) -> bytes:
    """Return what remains of a token.

    Raises:
        ValueError: an f-string with its own quotes inside, as Python 3.12 allows: where it ends cannot be seen.
    """
    token = match[1]
    if token is None:
        return b"\n" if match[0].isspace() else b""
    if token.count(b"{") != token.count(b"}") and re.search(rb"[fF][rR]?$", match.string[max(match.start() - 2, 0) : match.start()]):
        raise ValueError("quotes within their own quotes")
    return token
