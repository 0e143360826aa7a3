"""Show progress in a notebook: an output that is replaced in place, and remains when the run has ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

from bpfree.document.charts import escape

__all__ = ["Place", "in_notebook", "output"]

BETWEEN = 0.25
"""Seconds between two updates of an output."""


def in_notebook() -> bool:
    """Tell whether a notebook (Jupyter, Colab, VS Code) shows the output of this process; nothing is imported for it."""
    module = sys.modules.get("IPython")
    shell = None if module is None else module.get_ipython()
    return hasattr(shell, "kernel")


def output() -> TextIO:
    """Return the stream for lines that people read: standard error, which a notebook would show as errors."""
    return sys.stdout if in_notebook() else sys.stderr


class Place:
    """An output of the cell that is running."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._shown = 0.0

    def show(self, title: str, texts: Sequence[str], share: float | None = None, lines: Sequence[str] = (), *, last: bool = False) -> None:
        """Show or replace the content, at most four times a second.

        Args:
            title: in bold.
            texts: after the bar.
            share: of the work that is done, for the bar; ``None``: no bar.
            lines: below, as they are.
            last: whether the content stays, so that it must be shown.
        """
        if not last and self._handle is not None and time.monotonic() - self._shown < BETWEEN:
            return
        from IPython.display import display

        self._shown = time.monotonic()
        said = [text for text in texts if text]
        bar = "" if share is None else f'<progress max="1" value="{min(1.0, share):.3f}" style="vertical-align:middle"></progress> '
        below = f'<pre style="margin:.2em 0 0;background:none;color:inherit">{escape(chr(10).join(lines))}</pre>' if lines else ""
        html = f"<div><b>{escape(title)}</b> {bar}{escape(' · '.join(said))}{below}</div>"
        content = {"text/html": html, "text/plain": "\n".join([f"{title}: {'  '.join(said)}", *lines])}
        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(content, raw=True)
