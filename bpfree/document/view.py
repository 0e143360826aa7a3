"""Show parts of a document in a notebook: HTML that needs no script and nothing from elsewhere, with a style that stays inside it.

Its ground and its colours are its own, so that it is legible in whatever theme; those of Jupyter and VS Code say which is dark.
"""

from __future__ import annotations

from collections.abc import Sequence

from bpfree.document.charts import escape
from bpfree.document.content import Section
from bpfree.document.page import html_parts
from bpfree.document.style import VIEW_STYLE

__all__ = ["html_view"]


def html_view(title: str, sections: Sequence[Section]) -> str:
    """Write sections as the HTML of an object in a notebook.

    Args:
        title: of the object.
        sections: below it, with their headings if they have any.
    """
    body = "".join((f"<h4>{escape(each.title)}</h4>" if each.title else "") + html_parts(each.parts) for each in sections)
    return f'<div class="bpfree-view"><style>{VIEW_STYLE}</style><h3>{escape(title)}</h3>\n{body}</div>\n'
