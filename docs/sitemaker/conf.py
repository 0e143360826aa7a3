"""How Sphinx makes the site from what ``__main__.py`` has put together."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

import bpfree
from bpfree.options import describe

project = "bpfree"
author = copyright = "the bpfree authors"
version = release = bpfree.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "sitemaker.mathml"]
language = "en"
smartquotes_action = "D"  # dashes alone

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
COLON = "\ue000"
"""Stands for a colon while napoleon looks for the type of an attribute before one."""


def describe_options(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Give a configuration's class its options, which are documented by their help texts."""
    if not is_configuration(obj):
        return
    named = "\n".join(lines)
    for key, kind, default, meaning in describe(obj):
        if f":ivar {key}:" not in named:
            nested = dataclasses.is_dataclass(default)
            told = "" if default is None or nested else f", {default!r} by default"
            lines += [
                "",
                f":ivar {key}: {meaning or 'see there'} ({f':class:`bpfree.{kind}`' if nested else f'``{kind}``'}{told})".replace(
                    "*", r"\*"
                ),
            ]


def is_configuration(thing: Any) -> bool:
    """Tell whether something is a class of options."""
    fields = dataclasses.fields(thing) if isinstance(thing, type) and dataclasses.is_dataclass(thing) else ()
    return any(field.metadata.get("help") for field in fields)


def shorten_signature(app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returns: str) -> tuple[str, str] | None:
    """Leave out the arguments of a configuration: they are its options, which are described."""
    return ("(**options)", returns) if is_configuration(obj) else None


def skip_aliases(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Skip the fields of a named tuple, which its own text describes."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def escape_shapes(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keep ``(N, *shape)`` from being taken for emphasis that does not end."""
    lines[:] = [SHAPE.sub(r"\\*", line) for line in lines]


def hide_colons(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keep the first line of an attribute's docstring whole: napoleon takes what comes before a colon for a type."""
    if what in ("attribute", "data", "property") and lines:
        lines[0] = re.sub(r"(?<!:):(?!:)", COLON, lines[0])


def show_colons(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = [line.replace(COLON, ":") for line in lines]


def without_generated_text(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Leave out what ``dataclass`` writes where a class has no docstring, and what a member inherits from a library."""
    if what == "class" and lines and lines[0].startswith(f"{name.rpartition('.')[2]}(") and dataclasses.is_dataclass(obj):
        lines.clear()
    module = inspect.getmodule(obj)
    if what == "method" and module is not None and not module.__name__.startswith("bpfree"):
        lines.clear()


def setup(app: Sphinx) -> None:
    for hook, priority in (
        (without_generated_text, 100),
        (hide_colons, 110),  # napoleon comes at 500
        (show_colons, 800),
        (escape_shapes, 900),
        (describe_options, 910),
    ):
        app.connect("autodoc-process-docstring", hook, priority=priority)
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("autodoc-skip-member", skip_aliases)
