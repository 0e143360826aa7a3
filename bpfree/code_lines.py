"""The size of a rule's code: lines of its class and of the bases from its package."""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize

__all__ = ["class_lines", "code_lines"]

CONTRACT = "bpfree.rule"
"""The module of the base classes that every rule has."""

NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def class_lines(kind: type) -> int | None:
    """Count the lines of code of a class and of its bases from the same package, without the contract of rules.

    Functions beside the classes do not count, nor does what is inherited from other packages.

    Returns:
        ``None`` where the source cannot be read, as of a class that was typed in.
    """
    package = kind.__module__.partition(".")[0]
    own = [base for base in kind.__mro__ if base.__module__.partition(".")[0] == package and base.__module__ != CONTRACT]
    try:
        return sum(code_lines(inspect.getsource(base)) for base in own)
    except (OSError, TypeError, SyntaxError, tokenize.TokenError):
        return None


def code_lines(source: str) -> int:
    """Count the lines that hold code: no blank ones, no comments, no docstrings (nor other strings that are statements).

    Raises:
        SyntaxError, tokenize.TokenError: it is not Python.
    """
    text = textwrap.dedent(source)
    statements = (node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Expr))
    idle = {(node.lineno, node.col_offset) for node in statements if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE and token.start not in idle:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines)
