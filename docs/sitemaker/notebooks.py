"""Pages as notebooks: their Python is in cells to be run, all else in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from sitemaker.blocks import Block, blocks, outside_code, pieces

__all__ = ["notebook", "write_notebook"]

LOCAL = re.compile(r"!?\[([^\]]*)\]\((?![a-z]+:)[^)\s]*\)")
FEWEST = 2
"""Blocks that a page must have for a notebook to be worth it."""
FOLLOWED = ("tutorial.md",)
"""Pages all of whose commands can be run as they stand, and whose files are written: a test follows these pages."""


def notebook(page: Path) -> nbformat.NotebookNode:
    """Make a notebook of a page; links to other pages become their text, since a downloaded file has no neighbours."""
    cells = []
    for number, cell in enumerate(_cells(page)):
        cell["id"] = f"{page.stem}-{number}"
        cells.append(cell)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def _cells(page: Path) -> Iterator[nbformat.NotebookNode]:
    prose = ""
    for piece in pieces(page.read_text(encoding="utf-8")):
        code = "" if isinstance(piece, str) else _code(piece, page.name)
        if not code:
            prose += piece if isinstance(piece, str) else f"```{piece.language}\n{piece.text}```"
            continue
        if prose.strip():
            yield new_markdown_cell(_alone(prose))
        yield new_code_cell(code)
        prose = ""
    if prose.strip():
        yield new_markdown_cell(_alone(prose))


def _code(block: Block, page: str) -> str:
    if block.runs:
        return block.text.rstrip()
    if page not in FOLLOWED:
        return ""
    if block.remark.startswith("written to "):
        return f"%%writefile {block.remark.removeprefix('written to ')}\n{block.text.rstrip()}"
    return "\n".join(f"!{line}" for line in block.text.splitlines() if line) if block.language == "bash" else ""


def _alone(prose: str) -> str:
    return outside_code(prose, lambda text: LOCAL.sub(r"\1", text)).strip()


def write_notebook(page: Path, folder: Path) -> Path | None:
    """Write the notebook of a page into a folder; ``None``: the page has too little that runs."""
    if sum(block.runs for block in blocks(page)) < FEWEST:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{page.stem}.ipynb"
    nbformat.write(notebook(page), path)
    return path
