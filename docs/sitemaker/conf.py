"""How Sphinx makes the site from what ``__main__.py`` has put together."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

import bpfree

project = "bpfree"
author = copyright = "the bpfree authors"
version = release = bpfree.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "sitemaker.mathml"]
language = "en"
smartquotes = False  # options begin with two dashes

myst_heading_anchors = 4  # by the names that code-hosting sites give them
myst_enable_extensions = ["dollarmath"]
pygments_style, pygments_dark_style = "a11y-high-contrast-light", "a11y-high-contrast-dark"
copybutton_exclude = ".linenos, .gp, .go"
html_math_renderer = "mathml"

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
add_module_names = False
python_maximum_signature_line_length = 100
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"bpfree {release}"
html_static_path = [str(Path(__file__).parent / "static")]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options: dict[str, Any] = {"navigation_with_keys": True, "top_of_page_buttons": []}


SHAPE = re.compile(r"(?<=, )\*(?=\w+[,)])")
"""The star of a shape's remaining dimensions."""

SENTENCES: dict[str, list[str]] = {}
"""Docstrings of attributes as they were before napoleon, by name."""


def describe_options(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Give a configuration's class its options, which are documented by their help texts."""
    if what != "class" or not dataclasses.is_dataclass(obj):
        return
    helps = [(field.name, field.metadata["help"]) for field in dataclasses.fields(obj) if field.metadata.get("help")]
    named = "\n".join(lines)
    lines += [line for key, text in helps if f":ivar {key}:" not in named for line in ("", f":ivar {key}: {text}")]


def escape_shapes(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keep ``(N, *shape)`` from being taken for emphasis that does not end."""
    lines[:] = [SHAPE.sub(r"\\*", line) for line in lines]


def keep_sentences(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keep the docstring of an attribute as it is: napoleon takes what comes before a colon for a type."""
    if what in ("attribute", "data", "property"):
        lines[:] = SENTENCES.setdefault(name, list(lines))


def without_generated_text(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Leave out what ``dataclass`` writes where a class has no docstring, and what a member inherits from a library."""
    if what == "class" and lines and lines[0].startswith(f"{name.rpartition('.')[2]}(") and dataclasses.is_dataclass(obj):
        lines.clear()
    module = inspect.getmodule(obj)
    if what == "method" and module is not None and not module.__name__.startswith("bpfree"):
        lines.clear()


def setup(app: Sphinx) -> None:
    for before_and_after in (100, 800):
        app.connect("autodoc-process-docstring", keep_sentences, priority=before_and_after)
    app.connect("autodoc-process-docstring", without_generated_text, priority=100)
    app.connect("autodoc-process-docstring", escape_shapes, priority=900)
    app.connect("autodoc-process-docstring", describe_options, priority=900)
