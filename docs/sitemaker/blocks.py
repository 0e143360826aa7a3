"""The pages of the documentation, and the fenced blocks in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FENCE", "LINK", "Block", "blocks", "outside_code", "page_paths", "pieces"]

FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<text>.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"^```[^\n`]*\n.*?^```[ ]*$|`[^`\n]*`", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, what else its first line says, its text, and the line where the text begins."""

    language: str
    remark: str
    text: str
    line: int

    @property
    def runs(self) -> bool:
        """Whether it is Python that is executed where the page is followed."""
        return self.language == "python" and not self.remark


def pieces(text: str) -> Iterator[str | Block]:
    """Yield a page's prose and its blocks, in their order."""
    position = 0
    for match in FENCE.finditer(text):
        yield text[position : match.start()]
        language, _, remark = match["info"].strip().partition(" ")
        yield Block(language, remark.strip(), match["text"], text.count("\n", 0, match.start("text")) + 1)
        position = match.end()
    yield text[position:]


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page."""
    return [piece for piece in pieces(page.read_text(encoding="utf-8")) if isinstance(piece, Block)]


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """Change a page's text, but neither its blocks nor what stands between backticks."""
    position, parts = 0, list[str]()
    for match in CODE.finditer(text):
        parts += [change(text[position : match.start()]), match[0]]
        position = match.end()
    return "".join([*parts, change(text[position:])])


def page_paths(root: Path) -> list[Path]:
    """Return every page of a checkout that is written for readers."""
    named = ("README.md", "CONTRIBUTING.md", "registry/README.md")
    return [*(root / name for name in named), *sorted(root.glob("docs/*.md")), *sorted(root.glob("plugins/*/README.md"))]
